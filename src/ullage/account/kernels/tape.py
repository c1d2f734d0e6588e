"""A tape of sizes: programs of eager PyTorch written as what they make, keep and let go; no tensor holds a value.

A program calls :meth:`Tape.op` where PyTorch would run an operation. Lifetimes are Python's own, as in eager PyTorch:
a tensor's bytes go when its last reader goes, be it a variable, a saved tensor of the graph or a gradient. The
backward pass is the engine's: newest node first, gradients of a tensor with several readers are summed, leaves
accumulate in place.

Source: torch@2.13.0:torch/csrc/autograd/engine.cpp (evaluate_function, call_function, validate_outputs),
    input_buffer.cpp (accumulate), functions/accumulate_grad.h (accumulateGrad); c10/cuda/CUDACachingAllocator.cpp.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from typing import Literal

from ullage.account.kernels.device import Device
from ullage.units import MiB, round_up

#: What the gradient of an input is: a new tensor of the output's size (reduced to the input's afterwards), the
#: output's own gradient passed on, or none.
Grad = Literal["new", "pass", "none"]

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


class Tape:
    """Runs a program and its backward pass, counting bytes."""

    def __init__(self, device: Device | None = None) -> None:
        self.device = device or Device(num_multiprocessors=0)
        self.memory = Memory()
        self.recording = True
        self._number = 0

    # --- tensors -------------------------------------------------------------------------------------------------

    def empty(self, num_elements: int, width: float) -> Tensor:
        """Make a tensor without a gradient."""
        return Tensor(Storage(self.memory, int(num_elements * width)), num_elements, width)

    def leaf(self, num_elements: int, width: float) -> Tensor:
        """Make a parameter or an input that a gradient is wanted for."""
        made = self.empty(num_elements, width)
        made.requires_grad = True
        return made

    def brief(self, num_bytes: int) -> None:
        """Allocate and free at once."""
        if num_bytes:
            Storage(self.memory, num_bytes)

    def op(
        self,
        inputs: Sequence[Tensor],
        num_elements: int,
        width: float,
        *,
        keeps: Sequence[Tensor] = (),
        keeps_result: bool = False,
        grads: Grad | Sequence[Grad] = "new",
        aside: int = 0,
        work: int = 0,
        grad_work: int = 0,
        backward: Backward | None = None,
    ) -> Tensor:
        """Run an operation with one output.

        Args:
            inputs: tensors it reads that may want a gradient.
            num_elements, width: of the output.
            keeps: tensors the graph keeps, besides the output (``keeps_result``) and ``aside`` bytes of statistics.
            grads: what the gradient of each input is.
            work, grad_work: bytes that are needed for a moment, forward and backward.
            backward: in place of ``grads``: a program of its own.
        """
        self.brief(work)
        made = self.empty(num_elements, width)
        made.per_row = any(each.per_row and each.num_elements == num_elements for each in inputs)
        kept = [*keeps, *([made] if keeps_result else [])]
        statistics = [self.empty(aside, 1)] if aside else []
        kinds = [grads] * len(inputs) if isinstance(grads, str) else list(grads)
        rule = backward or _standard(kinds, grad_work)
        return self.record(inputs, made, [*kept, *statistics], rule)

    def record(self, inputs: Sequence[Tensor], made: Tensor, kept: Sequence[Tensor], rule: Backward) -> Tensor:
        """Put an output on the graph."""
        return self.record_all(inputs, [made], kept, rule)[0]

    def record_all(
        self, inputs: Sequence[Tensor], made: Sequence[Tensor], kept: Sequence[Tensor], rule: Backward
    ) -> Sequence[Tensor]:
        """Put the outputs of one operation on the graph."""
        if self.recording and any(each.requires_grad for each in inputs):
            self._number += 1
            node = Node(self._number, inputs, kept, rule)
            for place, each in enumerate(made):
                each.node, each.place, each.requires_grad = node, place, True
        return made

    def view(self, x: Tensor, num_elements: int | None = None) -> Tensor:
        """Return a view: its gradient is passed on, or laid into zeros where it covers a part."""
        part = x.num_elements if num_elements is None else num_elements
        made = Tensor(x.storage, part, x.width)
        return self.record([x], made, (), _passed)

    # --- backward ------------------------------------------------------------------------------------------------

    def run_backward(self, output: Tensor, grad: Tensor, *, retain_graph: bool = False) -> None:
        """Run the backward pass of ``output``; the caller's hold on ``grad`` lasts as long as its variable."""
        self.run_backward_all([output], [grad], retain_graph=retain_graph)

    def run_backward_all(
        self,
        outputs: Sequence[Tensor],
        grads: Sequence[Tensor],
        *,
        retain_graph: bool = False,
        into: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Run the backward pass from several outputs.

        ``into``: tensors whose gradients are returned and nothing else is accumulated (``torch.autograd.grad``).
        """
        run = _Backward(self, into, retain_graph=retain_graph)
        held = []  # the engine holds what it was given, in the format of the output, until it is done
        for output, grad in zip(outputs, grads, strict=True):
            held.append(grad if grad.width == output.width else self.empty(grad.num_elements, output.width))
            run.root(output, passed(held[-1]))
        recording, self.recording = self.recording, False
        run.go()
        self.recording = recording
        return run.found


class _Backward:
    """One run of the engine. A target is a node, or a leaf: both gather what they are given until it is all there."""

    def __init__(self, tape: Tape, into: Sequence[Tensor] | None, *, retain_graph: bool) -> None:
        self.tape, self.retain_graph = tape, retain_graph
        self.wanted = None if into is None else {(each.node or each, each.place) for each in into}
        self.found: list[Tensor] = []
        self.buffers: dict[Target, list[Tensor | None]] = {}
        self.waiting: dict[Target, int] = {}
        self.ready: list[tuple[float, int, Target]] = []

    def root(self, output: Tensor, grad: Tensor) -> None:
        """Begin at an output."""
        target = output.node or output
        self._count(target)
        self._give(target, output.place, grad)

    def _count(self, start: Target) -> None:
        """Count how many gradients every target waits for."""
        if start in self.waiting:
            return
        self.waiting[start] = 0
        todo = [start]
        while todo:
            target = todo.pop()
            for edge in target.edges if isinstance(target, Node) else ():
                if edge is None:
                    continue
                if edge[0] not in self.waiting:
                    self.waiting[edge[0]] = 0
                    todo.append(edge[0])
                self.waiting[edge[0]] += 1

    def go(self) -> None:
        """Run every target once all its gradients are there: leaves at once, else the newest node first."""
        for target in list(self.waiting):
            self._queue(target)
        while self.ready:
            self._run(heapq.heappop(self.ready)[2])

    def _queue(self, target: Target) -> None:
        if self.waiting[target] == 0:
            order = -float(target.number) if isinstance(target, Node) else -math.inf
            heapq.heappush(self.ready, (order, len(self.waiting) - len(self.ready), target))

    def _run(self, target: Target) -> None:
        grads = self.buffers.pop(target, [])
        if self.wanted is not None:
            self.found += [g for place, g in enumerate(grads) if g is not None and (target, place) in self.wanted]
        if isinstance(target, Tensor):
            if self.wanted is None and grads and grads[0] is not None:
                _accumulate(self.tape, target, grads[0])
            return
        made: list[Tensor | None] = [None] * len(target.edges)
        if any(grads):
            made = list(target.backward(self.tape, target.kept, grads))
        _mark_shared(made, target, grads, retained=self.retain_graph)
        for index, (num_elements, width, per_row) in enumerate(target.sizes):
            grad = made[index]
            if grad is not None and target.edges[index] is None:
                made[index] = None
            elif grad is not None and (grad.num_elements != num_elements or grad.width != width):
                if not per_row:
                    self.tape.brief(self.tape.device.sum_buffer_bytes(num_elements, grad.num_elements // num_elements))
                made[index] = self.tape.empty(num_elements, width)
            del grad
        del grads
        if not self.retain_graph:
            target.kept = []
        for index, edge in enumerate(target.edges):
            given, made[index] = made[index], None
            if edge is not None:
                self._pass(edge, given)
            del given

    def _pass(self, edge: tuple[Target, int], grad: Tensor | None) -> None:
        """Give a gradient to the node or leaf it belongs to."""
        target, place = edge
        if grad is not None:
            self._give(target, place, grad)
        self.waiting[target] -= 1
        self._queue(target)

    def _give(self, target: Target, place: int, grad: Tensor) -> None:
        """Lay a gradient into a buffer; two are summed, in place where nobody else holds the first."""
        buffer = self.buffers.setdefault(target, [])
        while len(buffer) <= place:
            buffer.append(None)
        before = buffer[place]
        if before is None:
            buffer[place] = grad
        elif before.shared:
            buffer[place] = self.tape.empty(grad.num_elements, grad.width)


def _accumulate(tape: Tape, leaf: Tensor, grad: Tensor) -> None:
    """Add to a leaf's gradient: the first is taken over, or copied where others hold it; later ones in place."""
    if leaf.grad is None:
        leaf.grad = grad.detach() if grad.fresh else tape.empty(grad.num_elements, grad.width)


def _mark_shared(made: Sequence[Tensor | None], node: Node, grads: Sequence[Tensor | None], *, retained: bool) -> None:
    """Mark gradients whose bytes others hold too: two of one node, one that came in shared, one that is kept."""
    held = [each.storage for each in grads if each is not None and each.shared]
    kept = [each.storage for each in node.kept] if retained else []
    storages = [each.storage for each in made if each is not None]
    for each in made:
        if each is not None:
            twice = storages.count(each.storage) > 1
            each.shared = each.shared or twice or each.storage in held or each.storage in kept
            each.fresh = each.fresh and each.storage not in kept


def _standard(kinds: Sequence[Grad], grad_work: int) -> Backward:
    """Return a rule of new and passed gradients."""

    def rule(tape: Tape, kept: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        grad = grads[0]
        assert grad is not None
        work = tape.empty(grad_work, 1)
        made: list[Tensor | None] = []
        for kind in kinds:
            if kind == "new":
                made.append(tape.empty(grad.num_elements, grad.width))
            else:
                made.append(passed(grad) if kind == "pass" else None)
        del work
        return made

    return rule


def _passed(tape: Tape, kept: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradient of a view is the same bytes; that of a part is laid into zeros of the whole."""
    grad = grads[0]
    assert grad is not None
    return [viewed(grad)]


def viewed(grad: Tensor) -> Tensor:
    """A view of a gradient: a tensor of its own, whose bytes its base holds too, so nothing is added in place to it."""
    made = Tensor(grad.storage, grad.num_elements, grad.width)
    made.shared = True
    return made


def passed(grad: Tensor) -> Tensor:
    """The same tensor, held by more than one."""
    made = Tensor(grad.storage, grad.num_elements, grad.width)
    made.shared, made.fresh = True, False
    return made
