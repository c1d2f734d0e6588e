"""What is asked of the allocator, prepared once and served often."""

from __future__ import annotations

from collections.abc import Callable

from ullage.allocator.constants import MIN_BLOCK_BYTES, SMALL_BYTES, UNLIMITED_BYTES
from ullage.allocator.rounding import is_small, round_size, segment_bytes
from ullage.allocator.settings import AllocatorSettings
from ullage.allocator.state import ADDRESS_BITS, FreeSet


class Request:
    """All that is known of a request before it is served: one per (bytes, place), made once."""

    __slots__ = (
        "blocks",
        "bound",
        "free_set",
        "keys",
        "limit",
        "min_rest",
        "pool",
        "requested",
        "rounded",
        "segment",
        "spare",
    )

    def __init__(self, requested: int, free_set_of: Callable[[bool], FreeSet], settings: AllocatorSettings) -> None:
        self.requested = requested
        self.rounded = rounded = round_size(requested + settings.padding_bytes, settings.divisions)
        self.segment = segment_bytes(rounded, settings.large_segment_size_bytes)
        free_set = self.free_set = free_set_of(is_small(rounded))
        self.keys, self.blocks, self.spare = free_set.keys, free_set.blocks, free_set.spare
        self.pool = free_set.pool
        self.bound = rounded << ADDRESS_BITS
        # get_free_block: blocks from this size on are not for this request
        most = settings.max_split_size_bytes
        self.limit = (most if rounded < most else rounded + settings.max_non_split_rounding_bytes) << ADDRESS_BITS
        # should_split: what must be left over for the block to be split
        if free_set.small or settings.expandable_segments:
            self.min_rest = MIN_BLOCK_BYTES
        else:
            self.min_rest = SMALL_BYTES + 1 if rounded < settings.max_split_size_bytes else UNLIMITED_BYTES
