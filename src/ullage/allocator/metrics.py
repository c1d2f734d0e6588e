"""What the reserved memory is used for, and what keeps the rest from being given back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ullage.allocator.constants import DEFAULT_LARGE_SEGMENT_BYTES, SMALL_SEGMENT_BYTES
from ullage.allocator.events import BlockLayout, Places, SegmentLayout
from ullage.allocator.simulate import Allocator
from ullage.allocator.stacks import Stack
from ullage.allocator.state import AWAITING, FREE, Block
from ullage.units import cdiv


@dataclass(frozen=True, kw_only=True)
class Fragmentation:
    """Where the reserved bytes are at one moment.

    Attributes:
        in_use_bytes: blocks in use, rounded as the allocator rounds.
        requested_bytes: what was asked for in them.
        releasable_bytes: free, and given back by ``empty_cache``: whole segments, whole pages of expandable ones.
        pinned_bytes: free, but in a segment or page that some block keeps.
    """

    reserved_bytes: int
    in_use_bytes: int
    requested_bytes: int
    releasable_bytes: int
    pinned_bytes: int

    @property
    def internal(self) -> float:
        """Return the share of the blocks in use that nobody asked for.

        Formula: 1 - requested / in use.
        Source: pytorch pull request 88575 (the statistic requested_bytes was added for it).
        Known error: none.
        """
        return 1 - self.requested_bytes / self.in_use_bytes if self.in_use_bytes else 0.0


def utilisation(peak_allocated_bytes: int, peak_reserved_bytes: int) -> float:
    """Return how much of the reserved memory was in use, at most.

    Formula: peak allocated / peak reserved; 1 - it is the fragmentation rate.
    Source: GMLake (arXiv:2401.08156), utilization ratio; the peaks need not be at the same moment.
    Known error: none.
    """
    return peak_allocated_bytes / peak_reserved_bytes if peak_reserved_bytes else 1.0


@dataclass(frozen=True, kw_only=True)
class Pin:
    """A segment that cannot be given back, and the block that is least reason to keep it.

    Attributes:
        pinned_bytes: free bytes in the segment.
        num_blocks: blocks in use in it; with one, freeing or moving that one gives all of it back.
        block: the smallest of them.
    """

    address: int
    size_bytes: int
    pinned_bytes: int
    num_blocks: int
    block: BlockLayout


def free_gaps(segment: SegmentLayout) -> Iterator[tuple[int, int]]:
    """Yield (address, bytes) of what is free in a segment."""
    at = segment.address
    for block in segment.blocks:
        if block.address > at:
            yield at, block.address - at
        at = block.address + block.size_bytes
    end = segment.address + segment.size_bytes
    if end > at:
        yield at, end - at


def releasable_in(segment: SegmentLayout, large_segment_bytes: int = DEFAULT_LARGE_SEGMENT_BYTES) -> int:
    """Return what ``empty_cache`` would give back of a segment."""
    if not segment.expandable:
        return 0 if segment.blocks else segment.size_bytes
    page = SMALL_SEGMENT_BYTES if segment.small else large_segment_bytes
    total = 0
    for address, size in free_gaps(segment):
        start = cdiv(address - segment.address, page)
        end = (address - segment.address + size) // page
        total += max(0, end - start) * page
    return total


def fragmentation(segments: Iterable[SegmentLayout], settings_large_bytes: int | None = None) -> Fragmentation:
    """Add up a layout."""
    large = settings_large_bytes or DEFAULT_LARGE_SEGMENT_BYTES
    reserved = in_use = requested = releasable = 0
    for segment in segments:
        reserved += segment.size_bytes
        in_use += sum(block.size_bytes for block in segment.blocks)
        requested += sum(block.requested_bytes for block in segment.blocks)
        releasable += releasable_in(segment, large)
    return Fragmentation(
        reserved_bytes=reserved,
        in_use_bytes=in_use,
        requested_bytes=requested,
        releasable_bytes=releasable,
        pinned_bytes=reserved - in_use - releasable,
    )


def pins(segments: Iterable[SegmentLayout], *, limit: int = 10) -> list[Pin]:
    """Return the segments with most pinned bytes, and the smallest block that pins each."""
    found = []
    for segment in segments:
        pinned = sum(size for _address, size in free_gaps(segment)) - releasable_in(segment)
        if pinned and segment.blocks:
            found.append(
                Pin(
                    address=segment.address,
                    size_bytes=segment.size_bytes,
                    pinned_bytes=pinned,
                    num_blocks=len(segment.blocks),
                    block=min(segment.blocks, key=lambda block: (block.size_bytes, block.address)),
                )
            )
    return sorted(found, key=lambda pin: (-pin.pinned_bytes, pin.address))[:limit]


def layout_of(allocator: Allocator, places: Places | None = None) -> list[SegmentLayout]:
    """Return the segments of a simulated allocator as a snapshot would list them; ``places`` number whose they are."""
    return [_layout(blocks, places or Places()) for blocks in allocator.mapped_ranges()]


def _layout(blocks: list[Block], places: Places) -> SegmentLayout:
    first = blocks[0]
    return SegmentLayout(
        address=first.address,
        size_bytes=sum(block.size for block in blocks),
        place=places.index(first.free_set.stream, first.free_set.pool.pool_id),
        small=first.free_set.small,
        expandable=first.expandable,
        blocks=[
            BlockLayout(
                address=block.address,
                size_bytes=block.size,
                requested_bytes=block.requested,
                awaiting=block.state == AWAITING,
            )
            for block in blocks
            if block.state != FREE
        ],
    )


def stack_of(pin: Pin, stacks: Mapping[int, Stack]) -> Stack | None:
    """Return the recorded stack of the block that pins."""
    return stacks.get(pin.block.address)
