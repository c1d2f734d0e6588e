"""From the bytes asked for to the bytes of a block, and to the bytes of a segment."""

from __future__ import annotations

from collections.abc import Sequence

from ullage.allocator.constants import (
    DEFAULT_LARGE_SEGMENT_BYTES,
    FIRST_ROUNDUP_EXPONENT,
    MIN_BLOCK_BYTES,
    MIN_LARGE_BYTES,
    NUM_ROUNDUP_INTERVALS,
    ROUND_LARGE_BYTES,
    SMALL_BYTES,
    SMALL_SEGMENT_BYTES,
)
from ullage.units import round_up


def round_size(size_bytes: int, divisions: Sequence[int] = ()) -> int:
    """Return the bytes of the block for a request of ``size_bytes``.

    Formula: 512 when n < 512; the next of d divisions between powers of two when d > 1 and n > 512 d; else
        512 ceil(n / 512).
    Symbols: n: bytes asked for; d: divisions of the interval n lies in.
    Source: pytorch@2.11:c10/cuda/CUDACachingAllocator.cpp:round_size.
    Known error: none.
    """
    if size_bytes < MIN_BLOCK_BYTES:
        return MIN_BLOCK_BYTES
    num_divisions = divisions_of(size_bytes, divisions) if divisions else 0
    if num_divisions > 1 and size_bytes > MIN_BLOCK_BYTES * num_divisions:
        return next_division(size_bytes, num_divisions)
    return round_up(size_bytes, MIN_BLOCK_BYTES)


def divisions_of(size_bytes: int, divisions: Sequence[int]) -> int:
    """Return the divisions of the interval in which a size lies.

    Source: pytorch@2.13.0:c10/core/AllocatorConfig.h:roundup_power2_divisions(size_t); interval i holds the sizes whose
    highest bit is bit 20 + i, the first also all below, the last also all above.
    """
    interval = size_bytes.bit_length() - 1 - FIRST_ROUNDUP_EXPONENT
    return divisions[min(max(interval, 0), NUM_ROUNDUP_INTERVALS - 1)]


def next_division(size_bytes: int, num_divisions: int) -> int:
    """Round up to the next of ``num_divisions`` equal steps between a power of two and the next one.

    Formula: f = 2^floor(log2 n), q = f / d, result = q ceil(n / q); n itself when a power of two; 2 f when q is 0.
    Symbols: n: bytes; d: divisions, a power of two.
    Source: pytorch@2.11:c10/cuda/CUDACachingAllocator.cpp:roundup_power2_next_division.
    Known error: none.
    """
    if size_bytes <= 4 or num_divisions <= 1 or size_bytes & (size_bytes - 1) == 0:
        return size_bytes
    floor = 1 << (size_bytes.bit_length() - 1)
    step = floor >> (num_divisions.bit_length() - 1)
    return round_up(size_bytes, step) if step else 2 * floor


def is_small(rounded_bytes: int) -> bool:
    """Tell whether a block of this size lives in the small pool (source: as :func:`round_size`, get_pool)."""
    return rounded_bytes <= SMALL_BYTES


def segment_bytes(rounded_bytes: int, large_segment_bytes: int = DEFAULT_LARGE_SEGMENT_BYTES) -> int:
    """Return what the driver is asked for when no free block fits.

    Formula: 2 MiB up to 1 MiB; large_segment_size below 10 MiB; else 2 MiB ceil(r / 2 MiB).
    Symbols: r: rounded bytes.
    Source: pytorch@2.11:c10/cuda/CUDACachingAllocator.cpp:get_allocation_size.
    Known error: none.
    """
    if rounded_bytes <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if rounded_bytes < MIN_LARGE_BYTES:
        return large_segment_bytes
    return round_up(rounded_bytes, ROUND_LARGE_BYTES)
