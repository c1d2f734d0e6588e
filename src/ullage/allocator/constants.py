"""The allocator's fixed sizes.

Source: pytorch@2.13.0:c10/core/AllocatorConfig.h (lines 17 to 26), pytorch@2.11:c10/cuda/CUDACachingAllocator.cpp.
"""

from __future__ import annotations

MIN_BLOCK_BYTES = 512  # kMinBlockSize: every size is a multiple of it
SMALL_BYTES = 1_048_576  # kSmallSize: the largest request that goes to the small pool
SMALL_SEGMENT_BYTES = 2_097_152  # kSmallBuffer: what the small pool asks the driver for
MIN_LARGE_BYTES = 10_485_760  # kMinLargeAlloc: from here a request gets a segment of its own size
ROUND_LARGE_BYTES = 2_097_152  # kRoundLarge: such a segment is a multiple of it
DEFAULT_LARGE_SEGMENT_BYTES = 20_971_520  # large_segment_size, the constant kLargeBuffer before 2.11
UNLIMITED_BYTES = 2**64 - 1  # SIZE_MAX: max_split_size as it is when not set
#: roundup_power2_divisions is a table over the intervals from 1 MiB to 64 GiB, one per power of two.
NUM_ROUNDUP_INTERVALS = 16
FIRST_ROUNDUP_EXPONENT = 20
#: An expandable segment reserves addresses for 1 1/8 of the device's memory.
EXPANDABLE_RESERVE_NUMERATOR, EXPANDABLE_RESERVE_DENOMINATOR = 9, 8
