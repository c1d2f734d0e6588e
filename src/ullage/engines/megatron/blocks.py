"""What PyTorch's caching allocator hands out for a sequence of tensors: sizes rounded, small rests kept with the block.

A fresh pool is assumed: every tensor is placed in the smallest free block that holds it, else in a new segment.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable

from ullage.units import MiB

SMALL, SMALL_SEGMENT, LARGE_SEGMENT, MIN_OWN = MiB, 2 * MiB, 20 * MiB, 10 * MiB
#: More tensors than this are counted without placing them.
MAX_TENSORS = 20_000


def rounded(num_bytes: int, step: int = 512) -> int:
    """Round up to a multiple of ``step``."""
    return -(-num_bytes // step) * step


def placed_bytes(sizes: Iterable[int]) -> int:
    """Return allocated bytes of tensors of these sizes, in this order, none freed.

    Formula: sizes round to 512 bytes; tensors over 1 MiB come from segments of 20 MiB (own segments of whole 2 MiB from
        10 MiB on); a rest of at most 1 MiB stays with the block and counts as allocated.
    Source: pytorch@2.9:c10/cuda/CUDACachingAllocator.cpp:get_allocation_size, should_split, alloc_found_block.
    """
    free: list[int] = []
    total = 0
    for number, size in enumerate(sizes):
        want = rounded(size)
        if want <= SMALL or number > MAX_TENSORS:
            total += want
            continue
        at = next((index for index, block in enumerate(free) if block >= want), None)
        block = free.pop(at) if at is not None else (LARGE_SEGMENT if want < MIN_OWN else rounded(want, 2 * MiB))
        rest = block - want
        if rest > SMALL:
            insort(free, rest)
            total += want
        else:
            total += block
    return total
