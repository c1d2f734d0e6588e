"""What PyTorch's caching allocator hands out for a sequence of tensors: sizes rounded, small rests kept with the block.

A fresh pool is assumed: every tensor is placed in the smallest free block that holds it, else in a new segment. What
comes in a row many times (layers, experts) is prepared once as a :class:`Batch`, and what a batch does to a
list of free blocks is remembered.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

from ullage.units import MiB

SMALL, SMALL_SEGMENT, LARGE_SEGMENT, MIN_OWN = MiB, 2 * MiB, 20 * MiB, 10 * MiB
#: No free block is as large: rests are what is left of a segment of 20 MiB, or less than 2 MiB.
NEVER_FREE = LARGE_SEGMENT - SMALL
#: Beyond so many free blocks no more are kept track of; a run of more tensors than this goes on as it was.
MAX_FREE, MAX_TENSORS = 4096, 200_000

Free = tuple[int, ...]


def rounded(num_bytes: int, step: int = 512) -> int:
    """Round up to a multiple of ``step``."""
    return -(-num_bytes // step) * step


def own_segment(want: int) -> int:
    """Bytes of the segment that is asked for where no free block holds ``want`` (over 1 MiB)."""
    return LARGE_SEGMENT if want < MIN_OWN else rounded(want, 2 * MiB)


class Batch:
    """Tensors that are allocated one after the other and stay.

    Attributes:
        fixed_bytes: of those whose place does not depend on what is free; placed: sizes of the others, in order.
    """

    __slots__ = ("_known", "fixed_bytes", "num_bytes", "placed")

    def __init__(self, sizes: Iterable[int]) -> None:
        self.num_bytes = self.fixed_bytes = 0
        self.placed: list[tuple[int, int]] = []
        self._known: dict[Free, list[tuple[int, Free]]] = {}
        for size in sizes:
            self.num_bytes += size
            want = rounded(size)
            if want <= SMALL:
                self.fixed_bytes += want
            elif want >= NEVER_FREE and rounded(want, 2 * MiB) - want <= SMALL:
                self.fixed_bytes += rounded(want, 2 * MiB)
            else:
                self.placed.append((want, own_segment(want)))

    def after(self, free: Free, times: int) -> tuple[int, Free]:
        """Return allocated bytes of the batch, ``times`` in a row, and the blocks that are free then.

        ``free`` blocks are at hand; what was placed once is remembered.
        """
        if not self.placed:
            return self.fixed_bytes * times, free
        chain = self._known.get(free)
        if chain is None:
            chain = self._known[free] = [(0, free)]
        while len(chain) <= times:
            total, before = chain[-1]
            more, after = self._place(list(before))
            if after == before or len(chain) * len(self.placed) > MAX_TENSORS:
                return total + more * (times - len(chain) + 1), after
            chain.append((total + more, after))
        return chain[times]

    def _place(self, free: list[int]) -> tuple[int, Free]:
        total = self.fixed_bytes
        for want, segment in self.placed:
            at = bisect_left(free, want)
            block = free.pop(at) if at < len(free) else segment
            rest = block - want
            if rest > SMALL:
                if len(free) < MAX_FREE:
                    insort(free, rest)
                total += want
            else:
                total += block
        return total, tuple(free)


def placed_runs(runs: Sequence[tuple[Batch, int]]) -> int:
    """Return allocated bytes of batches, each so many times in a row, none freed.

    Formula: sizes round to 512 bytes; tensors over 1 MiB come from segments of 20 MiB (own segments of whole 2 MiB from
        10 MiB on); a rest of at most 1 MiB stays with the block and counts as allocated.
    Source: pytorch@2.9:c10/cuda/CUDACachingAllocator.cpp:get_allocation_size, should_split, alloc_found_block.
    """
    free: Free = ()
    total = 0
    for batch, times in runs:
        more, free = batch.after(free, times)
        total += more
    return total


def placed_rest(runs: Sequence[tuple[Batch, int]]) -> int:
    """Return what the allocator adds to the tensors' own bytes."""
    return placed_runs(runs) - sum([batch.num_bytes * times for batch, times in runs])


def placed_bytes(sizes: Iterable[int]) -> int:
    """Return allocated bytes of tensors of these sizes, in this order, none freed."""
    return placed_runs([(Batch(sizes), 1)])
