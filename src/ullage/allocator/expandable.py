"""Expandable segments: addresses are reserved once, memory is mapped under them in pages.

Source of all: pytorch@2.11:c10/cuda/CUDACachingAllocator.cpp. Not checked against a CUDA recording: none is public.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from typing import TYPE_CHECKING

from ullage.allocator.constants import (
    EXPANDABLE_RESERVE_DENOMINATOR,
    EXPANDABLE_RESERVE_NUMERATOR,
    SMALL_SEGMENT_BYTES,
)
from ullage.allocator.events import SEGMENT_MAP, SEGMENT_UNMAP, SegmentLayout
from ullage.allocator.state import FREE, UNMAPPED, Block, FreeSet
from ullage.units import TiB, cdiv

if TYPE_CHECKING:
    from ullage.allocator.simulate import Allocator

#: Addresses to reserve when the device's memory is not known: more than any device has.
UNKNOWN_TOTAL_BYTES = 1 * TiB


def page_bytes(allocator: Allocator, *, small: bool) -> int:
    """Return the bytes that are mapped at a time: 2 MiB for small blocks, large_segment_size for large ones."""
    return SMALL_SEGMENT_BYTES if small else allocator.settings.large_segment_size_bytes


def reserve_bytes(allocator: Allocator, page: int) -> int:
    """Return the addresses reserved for one segment.

    Formula: ceil(1.125 total / page) page.
    Symbols: total: the device's memory; page: bytes mapped at a time.
    Source: ExpandableSegment::ExpandableSegment, max_handles.
    Known error: none.
    """
    total = allocator.total or UNKNOWN_TOTAL_BYTES
    return cdiv(total * EXPANDABLE_RESERVE_NUMERATOR, EXPANDABLE_RESERVE_DENOMINATOR * page) * page


def best_fit(free_set: FreeSet, index: int, *, growing: bool) -> int:
    """Move on from the first fit: to the block whose segment need grow least, or past all that may not be used.

    Source: get_free_block.
    """
    end = len(free_set.keys)
    if not growing:  # the setting was switched off later
        while index < end and free_set.at(index).expandable:
            index += 1
        return index
    while index + 1 < end and free_set.at(index).expandable:
        if _can_grow_to(free_set.at(index + 1)) >= _can_grow_to(free_set.at(index)):
            break
        index += 1
    return index


def _can_grow_to(block: Block) -> int:
    following = block.next
    return block.size + (following.size if following is not None and following.state == UNMAPPED else 0)


def allocate(allocator: Allocator, free_set: FreeSet, size: int) -> Block | None:
    """Map memory until a block of ``size`` is there (source: try_allocate_expandable_block)."""
    if size > reserve_bytes(allocator, page_bytes(allocator, small=free_set.small)):
        return None
    block: Block | None = _find(free_set, size) or _new_segment(allocator, free_set)
    assert block is not None
    if block.state == UNMAPPED:
        block = _map(allocator, block, min(block.size, size))
    while block is not None and block.size < size:
        following = block.next
        assert following is not None and following.state == UNMAPPED
        block = _map(allocator, following, min(size - block.size, following.size))
    if block is not None:
        free_set.remove(block)
    return block


def _find(free_set: FreeSet, size: int) -> Block | None:
    """Return where enough free or unmapped addresses begin (source: find_expandable_block)."""
    end = 0  # of the stretch that was last too short
    for address in free_set.unmapped_addresses:
        if address < end:
            continue
        start = free_set.unmapped[address]
        if start.prev is not None and start.prev.state == FREE:
            start = start.prev
        available, block = 0, start
        while available < size and block is not None and block.state in (FREE, UNMAPPED):
            available += block.size
            block = block.next  # type: ignore[assignment]
        if available >= size:
            return start
        end = start.address + available
    return None


def _new_segment(allocator: Allocator, free_set: FreeSet) -> Block:
    size = reserve_bytes(allocator, page_bytes(allocator, small=free_set.small))
    block = Block(allocator.addresses(size), size, free_set, UNMAPPED, True)
    allocator.segments[block.address] = block
    insort(free_set.bases, block.address)
    free_set.insert_unmapped(block)
    return block


def _map(allocator: Allocator, block: Block, size: int) -> Block | None:
    """Map whole pages at the start of an unmapped block; return the free block they are part of (source: map_block)."""
    free_set = block.free_set
    page = page_bytes(allocator, small=free_set.small)
    mapped = min(cdiv(size, page) * page, block.size)
    if not allocator.take(mapped):
        return None
    allocator.counters.num_maps += 1
    if allocator.on_driver is not None:
        allocator.on_driver(SEGMENT_MAP, block.address, mapped, free_set)
    free_set.remove_unmapped(block)
    if mapped < block.size:
        rest = Block(block.address + mapped, block.size - mapped, free_set, UNMAPPED, True)
        rest.insert_after(block)
        free_set.insert_unmapped(rest)
        block.size = mapped
    before = block.prev
    allocator.active += block.size  # as if it had been in use: freeing it merges it with what is free around it
    allocator.free(block)
    return before if before is not None and before.state == FREE else block


def unmap(allocator: Allocator, block: Block) -> None:
    """Unmap the whole pages inside a free block (source: unmap_block, release_blocks)."""
    free_set = block.free_set
    page = page_bytes(allocator, small=free_set.small)
    base = free_set.bases[bisect_right(free_set.bases, block.address) - 1]
    start = base + cdiv(block.address - base, page) * page
    end = base + (block.address + block.size - base) // page * page
    if start >= end:
        return
    free_set.remove(block)
    allocator.reserved -= end - start
    allocator.counters.num_unmaps += 1
    if allocator.on_driver is not None:
        allocator.on_driver(SEGMENT_UNMAP, start, end - start, free_set)
    if block.address + block.size > end:
        rest = Block(end, block.address + block.size - end, free_set, FREE, True)
        rest.insert_after(block)
        free_set.insert(rest)
    if block.address < start:
        hole = Block(start, end - start, free_set, UNMAPPED, True)
        hole.insert_after(block)
        block.size = start - block.address
        free_set.insert(block)
        block = hole
    block.size = end - start
    _join_unmapped(allocator, block)


def _join_unmapped(allocator: Allocator, block: Block) -> None:
    """Merge an unmapped block with its unmapped neighbours; drop a segment under which no memory is left."""
    free_set = block.free_set
    before = block.prev
    if before is not None and before.state == UNMAPPED:
        free_set.remove_unmapped(before)
        before.size += block.size
        block.unlink()
        block = before
    following = block.next
    if following is not None and following.state == UNMAPPED:
        free_set.remove_unmapped(following)
        block.size += following.size
        following.unlink()
    if block.whole:
        del allocator.segments[block.address]
        free_set.bases.remove(block.address)
    else:
        free_set.insert_unmapped(block)


def adopt_range(allocator: Allocator, layout: SegmentLayout, free_set: FreeSet) -> Block:
    """Take over a mapped range of an expandable segment; return its one stretch, in no set yet.

    A snapshot lists mapped ranges, not the reserved addresses. Ranges of the same pool and stream are taken as parts of
    one segment that begins at the lowest, as long as they lie within one reservation of it.
    """
    size = reserve_bytes(allocator, page_bytes(allocator, small=free_set.small))
    index = bisect_right(free_set.unmapped_addresses, layout.address) - 1
    hole = free_set.unmapped[free_set.unmapped_addresses[index]] if index >= 0 else None
    if hole is None or layout.address + layout.size_bytes > hole.address + hole.size:
        hole = Block(layout.address, max(size, layout.size_bytes), free_set, UNMAPPED, True)
        allocator.segments[layout.address] = hole
        insort(free_set.bases, layout.address)
        free_set.insert_unmapped(hole)
    return _carve(free_set, hole, layout)


def _carve(free_set: FreeSet, hole: Block, layout: SegmentLayout) -> Block:
    """Cut the range out of the unmapped stretch around it."""
    free_set.remove_unmapped(hole)
    block = hole
    if layout.address > hole.address:
        block = Block(layout.address, hole.address + hole.size - layout.address, free_set, FREE, True)
        block.insert_after(hole)
        hole.size = layout.address - hole.address
        free_set.insert_unmapped(hole)
    if block.size > layout.size_bytes:
        rest = Block(block.address + layout.size_bytes, block.size - layout.size_bytes, free_set, UNMAPPED, True)
        rest.insert_after(block)
        block.size = layout.size_bytes
        free_set.insert_unmapped(rest)
    block.state = FREE
    return block
