"""Sizes on the device: storages that go with their last holder, tensors on them, and the nodes of a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ullage.units import MiB, round_up

if TYPE_CHECKING:
    from ullage.account.kernels.tape import Tape

#: Blocks from this size on get segments of their own, in steps of 2 MiB; a rest of at most 1 MiB stays in the block.
#: Source: torch@2.13.0:c10/cuda/CUDACachingAllocator.cpp (kMinLargeAlloc, kRoundLarge, should_split).
_OWN_SEGMENT, _SEGMENT_STEP, _SMALLEST_REST, _STEP = 10 * MiB, 2 * MiB, MiB, 512


def block_bytes(num_bytes: int) -> int:
    """Return the block that the caching allocator counts for a request.

    Known error: where a cached block of another size is used again, up to 1 MiB more.
    """
    size = round_up(num_bytes, _STEP)
    if size < _OWN_SEGMENT:
        return size
    whole = round_up(size, _SEGMENT_STEP)
    return whole if whole - size <= _SMALLEST_REST else size


class Memory:
    """Bytes alive, and the most since the last :meth:`reset`."""

    def __init__(self) -> None:
        self.live = self.peak = 0

    def reset(self) -> None:
        """Forget the peak so far."""
        self.peak = self.live


class Storage:
    """Bytes on the device; they go with the last tensor that refers to them."""

    __slots__ = ("memory", "num_bytes")

    def __init__(self, memory: Memory, num_bytes: int) -> None:
        self.memory, self.num_bytes = memory, block_bytes(num_bytes)
        memory.live += self.num_bytes
        memory.peak = max(memory.peak, memory.live)

    def __del__(self) -> None:
        self.memory.live -= self.num_bytes


class Tensor:
    """A size on a storage, and the node that made it (None: a leaf, or nothing that has a gradient)."""

    __slots__ = (
        "fresh",
        "grad",
        "node",
        "num_elements",
        "per_row",
        "place",
        "requires_grad",
        "shared",
        "storage",
        "width",
    )

    def __init__(self, storage: Storage, num_elements: int, width: float, *, requires_grad: bool = False) -> None:
        self.storage, self.num_elements, self.width = storage, num_elements, width
        self.requires_grad = requires_grad
        self.node: Node | None = None
        self.place = 0
        self.grad: Tensor | None = None
        #: Of a gradient: others hold its bytes; nobody else holds the tensor itself (a new view counts as such).
        self.shared, self.fresh = False, True
        #: One value for each row: what sums a gradient to its size runs along rows, and needs no buffer.
        self.per_row = False

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return int(self.num_elements * self.width)

    def detach(self) -> Tensor:
        """Return the same bytes without a gradient."""
        return Tensor(self.storage, self.num_elements, self.width)


#: Makes the gradients of a node's inputs: (tape, kept tensors, gradients of the outputs) to one per input or None.
Backward = Callable[["Tape", Sequence[Tensor], Sequence[Tensor | None]], Sequence[Tensor | None]]


class Node:
    """An operation on the graph: where gradients go, what it keeps, how it makes them."""

    __slots__ = ("backward", "edges", "kept", "number", "sizes")

    def __init__(
        self,
        number: int,
        inputs: Sequence[Tensor],
        kept: Sequence[Tensor],
        backward: Backward,
    ) -> None:
        self.number, self.backward = number, backward
        self.edges: list[tuple[Node | Tensor, int] | None] = [
            ((each.node or each), each.place) if each.requires_grad else None for each in inputs
        ]
        self.kept: list[Tensor] = [each.detach() for each in kept]
        self.sizes = [(each.num_elements, each.width, each.per_row) for each in inputs]


#: Where a gradient goes: the node that made a tensor, or a leaf.
Target = Node | Tensor


def passed(grad: Tensor) -> Tensor:
    """The same tensor, held by more than one."""
    made = Tensor(grad.storage, grad.num_elements, grad.width)
    made.shared, made.fresh = True, False
    return made


def viewed(grad: Tensor) -> Tensor:
    """A view of a gradient: a tensor of its own, whose bytes its base holds too, so nothing is added in place to it."""
    made = Tensor(grad.storage, grad.num_elements, grad.width)
    made.shared = True
    return made
