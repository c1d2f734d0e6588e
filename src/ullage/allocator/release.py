"""Giving memory back to the driver: the garbage collector, and the steps before a request is refused.

Source of all: pytorch@2.11:c10/cuda/CUDACachingAllocator.cpp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ullage.allocator import expandable
from ullage.allocator.constants import UNLIMITED_BYTES
from ullage.allocator.events import DEFAULT_POOL, SEGMENT_FREE
from ullage.allocator.state import Block, Pool

if TYPE_CHECKING:
    from ullage.allocator.request import Request
    from ullage.allocator.simulate import Allocator


def release_block(allocator: Allocator, block: Block) -> None:
    """Free a segment that is one free block (source: release_block)."""
    block.free_set.remove(block)
    del allocator.segments[block.address]
    allocator.reserved -= block.size
    allocator.counters.num_segments_freed += 1
    if allocator.on_driver is not None:
        allocator.on_driver(SEGMENT_FREE, block.address, block.size, block.free_set)


def release_pool(allocator: Allocator, pool: Pool) -> None:
    """Free all whole segments of a pool, then unmap what can be unmapped (source: release_blocks)."""
    growing, page = [], expandable.page_bytes(allocator, small=pool.small)
    for block in pool.blocks():
        if block.expandable:
            if block.size >= page:  # a smaller one holds no whole page
                growing.append(block)
        elif block.whole:
            release_block(allocator, block)
    for block in growing:
        expandable.unmap(allocator, block)


def release_cached_blocks(allocator: Allocator) -> None:
    """Synchronise, then free all that is free in the default pools (source: release_cached_blocks).

    Pools of CUDA graphs and MemPools are kept: whether one may be freed depends on whether it is still referenced,
    which no recording tells.
    """
    allocator.synchronise()
    for small in (False, True):
        pool = allocator.pools.get((DEFAULT_POOL, small))
        if pool is not None:
            release_pool(allocator, pool)


def release_available_cached_blocks(allocator: Allocator, request: Request) -> bool:
    """Free one block that is large enough, or several of the largest; only with a max_split_size.

    Source: release_available_cached_blocks.
    """
    most = allocator.settings.max_split_size_bytes
    if most == UNLIMITED_BYTES:
        return False
    free_set, wanted = request.free_set, max(request.rounded, most)
    index = free_set.first_fit(wanted)
    if index < len(free_set.keys) and not free_set.at(index).expandable:
        release_block(allocator, free_set.at(index))
        return True
    released = 0
    while index > 0 and released < wanted:
        index -= 1
        block = free_set.at(index)
        if block.size < most:
            break
        if not block.expandable:
            released += block.size
            release_block(allocator, block)
    return released >= wanted


def garbage_collect(allocator: Allocator) -> None:
    """Free large unused segments, the oldest first, when too much of the allowed memory is reserved.

    Formula: when reserved > t cap: free every free whole segment whose age is at least the average, again and again
        until reserved - t cap bytes are freed or none is left.
    Symbols: t: garbage_collection_threshold; cap: the memory allowed by the fraction; age: searches since freed.
    Source: garbage_collect_cached_blocks.
    Known error: none known; not checked against a recording.
    """
    pool = allocator.pools.get((DEFAULT_POOL, False))
    assert allocator.cap is not None
    threshold = int(allocator.gc_threshold * allocator.cap)
    if pool is None or allocator.reserved <= threshold:
        return
    target, reclaimed = allocator.reserved - threshold, 0
    whole = [block for block in pool.blocks() if block.whole]
    num_freeable, total_age = len(whole), sum(pool.num_calls - block.gc_base for block in whole)
    freed = True
    while reclaimed < target and freed and num_freeable > 0:
        average, freed, kept = total_age / num_freeable, False, []
        for block in whole:
            age = pool.num_calls - block.gc_base
            if block.expandable or age < average:
                kept.append(block)
                continue
            freed = True
            reclaimed += block.size
            total_age -= age
            num_freeable -= 1
            release_block(allocator, block)
        whole = kept
