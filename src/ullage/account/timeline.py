"""One training step as a stream of allocations: who holds what at the fullest instant of each moment.

A walk asks for buffers under a category (``activations``, ``gradients`` ...) and lets them go; the timeline keeps the
sum by category at each moment's peak and lays every buffer into the allocator.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ullage.account.pools import Block, Pools
from ullage.allocator.constants import MIN_BLOCK_BYTES


class Buffer:
    """Bytes on the device that several holders may share; the last to let go frees them."""

    __slots__ = ("block", "category", "holders", "num_bytes")

    def __init__(self, num_bytes: int, category: str, block: Block | None) -> None:
        self.num_bytes, self.category, self.block = num_bytes, category, block
        self.holders = 1

    def hold(self) -> Buffer:
        """Share the buffer."""
        self.holders += 1
        return self


@dataclass
class Moment:
    """The fullest instant of a named part of the step."""

    name: str
    peak_bytes: int = 0
    by_category: dict[str, int] = field(default_factory=dict)


class Timeline:
    """Allocations in order, with the sum by category."""

    def __init__(self, pools: Pools) -> None:
        self.pools = pools
        self.allocated = 0
        self.by_category: dict[str, int] = {}
        self.moments: list[Moment] = []
        self._highest = 0  # of the moment that is open

    def begin(self, name: str) -> None:
        """Open a moment; what is allocated from now on counts for its peak."""
        self.moments.append(Moment(name=name))
        self._peak()

    def take(self, category: str, num_bytes: int, stream: str = "main") -> Buffer:
        """Allocate; sizes are rounded to 512 bytes as the allocator counts them."""
        if num_bytes <= 0:
            return Buffer(0, category, None)
        size = (num_bytes + MIN_BLOCK_BYTES - 1) // MIN_BLOCK_BYTES * MIN_BLOCK_BYTES
        buffer = Buffer(size, category, self.pools.take(size, stream))
        self.allocated += size
        known = self.by_category
        known[category] = known.get(category, 0) + size
        if self.allocated > self._highest and self.moments:
            self._peak()
        return buffer

    def drop(self, buffer: Buffer | None) -> None:
        """Let go of a buffer; it is freed with its last holder."""
        if buffer is None:
            return
        buffer.holders -= 1
        block = buffer.block
        if block is None or buffer.holders:
            return
        self.pools.give(block)
        buffer.block = None
        self.allocated -= buffer.num_bytes
        self.by_category[buffer.category] -= buffer.num_bytes

    def relabel(self, buffer: Buffer, category: str) -> None:
        """Count a buffer under another category from now on."""
        if buffer.block is None or buffer.category == category:
            return
        self.by_category[buffer.category] -= buffer.num_bytes
        self.by_category[category] = self.by_category.get(category, 0) + buffer.num_bytes
        buffer.category = category

    def brief(self, category: str, num_bytes: int, stream: str = "main") -> None:
        """Allocate and free at once: a workspace."""
        self.drop(self.take(category, num_bytes, stream))

    def _peak(self) -> None:
        moment = self.moments[-1]
        moment.peak_bytes = self._highest = self.allocated
        moment.by_category = dict(self.by_category)
