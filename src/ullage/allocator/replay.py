"""From a recording back to its beginning, and forward again, one placement checked after the other.

The file tells how memory lay at the end, and what happened before. Undoing the events from the end gives the
beginning; from there the simulator runs forward and says, before each allocation, where it will lie. Only where the
driver puts a new segment is taken from the recording.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from dataclasses import dataclass, field

from ullage import garbage
from ullage.allocator import expandable
from ullage.allocator.constants import SMALL_BYTES, SMALL_SEGMENT_BYTES
from ullage.allocator.events import (
    ALLOC,
    FREE_COMPLETED,
    FREE_REQUESTED,
    OOM,
    SEGMENT_ALLOC,
    SEGMENT_FREE,
    SEGMENT_MAP,
    SEGMENT_UNMAP,
    BlockLayout,
    Recording,
    SegmentLayout,
    Workload,
    WorkloadBuilder,
)
from ullage.allocator.release import release_block
from ullage.allocator.request import Request
from ullage.allocator.rounding import round_size
from ullage.allocator.settings import AllocatorSettings
from ullage.allocator.simulate import Allocator
from ullage.allocator.state import FREE, IN_USE, Block, FreeSet
from ullage.i18n import _

#: Events of ``empty_cache``, one for each segment or run of pages.
GIVEN_BACK = (SEGMENT_FREE, SEGMENT_UNMAP)


#: Where a segment lies that the recording does not have: beyond all that a process can reach.
NOWHERE = 2**63
#: Free blocks to look through, in all, for memory that the recording gives back or uses against the simulator.
MAX_LOOKED_AT = 20_000_000


@dataclass(kw_only=True)
class Placement:
    """How many allocations were placed, how many where they really were, and where the first was not."""

    checked: int = 0
    equal: int = 0
    final_segments: int = 0
    final_equal: int = 0
    first_difference: str = ""


@dataclass(kw_only=True)
class Beginning:
    """What was there when the recording began, and what in the recording does not fit together."""

    segments: list[SegmentLayout]
    num_inconsistent: int = 0


class _MappedRanges:
    """The mapped ranges of expandable segments, by address, while map events are undone."""

    def __init__(self, final: list[SegmentLayout]) -> None:
        self._ranges = {one.address: one for one in final if one.expandable}
        self._bases = sorted(self._ranges)

    def layouts(self) -> list[SegmentLayout]:
        """Return what is mapped, in order."""
        return [self._ranges[base] for base in self._bases]

    def _remove(self, base: int) -> SegmentLayout:
        del self._bases[bisect_left(self._bases, base)]
        return self._ranges.pop(base)

    def _insert(self, base: int, size: int, place: int, small: bool) -> None:
        if base not in self._ranges:
            insort(self._bases, base)
        self._ranges[base] = SegmentLayout(address=base, size_bytes=size, place=place, small=small, expandable=True)

    def unmap(self, address: int, size: int) -> bool:
        """Take a range out; tell whether it was mapped."""
        index = bisect_right(self._bases, address) - 1
        if index < 0:
            return False
        base = self._bases[index]
        end = base + self._ranges[base].size_bytes
        if address + size > end:
            return False
        whole = self._remove(base)
        for start, stop in ((base, address), (address + size, end)):
            if stop > start:
                self._insert(start, stop - start, whole.place, whole.small)
        return True

    def map(self, address: int, size: int, place: int) -> None:
        """Add a range, as part of those of the same place that it touches."""
        small = size == SMALL_SEGMENT_BYTES  # a page of the small pool; what touches it knows better
        index = bisect_left(self._bases, address)
        for base in self._bases[max(0, index - 1) : index + 1]:
            other = self._ranges[base]
            touches = base + other.size_bytes == address or base == address + size
            if touches and other.place == place:
                self._remove(base)
                address, size, small = min(address, base), size + other.size_bytes, other.small
        self._insert(address, size, place, small)


@dataclass(kw_only=True)
class _Undo:
    segments: dict[int, SegmentLayout]
    mapped: _MappedRanges
    blocks: dict[int, BlockLayout] = field(default_factory=dict)
    guessed: set[int] = field(default_factory=set)
    num_inconsistent: int = 0


def recover_beginning(final: list[SegmentLayout], recording: Recording, settings: AllocatorSettings) -> Beginning:
    """Undo the recording from the final layout.

    A block that was freed within the recording is known by what was asked for; its size is that rounded up, and in the
    large pool a rest of at most 1 MiB behind it is its own, because such a rest is never split off.
    """
    undo = _Undo(segments={one.address: one for one in final if not one.expandable}, mapped=_MappedRanges(final))
    for segment in final:
        undo.blocks.update((block.address, block) for block in segment.blocks)
    for at in range(len(recording) - 1, -1, -1):
        _undo_event(
            undo, recording.kinds[at], recording.addresses[at], recording.sizes[at], recording.places[at], settings
        )
    segments = [
        SegmentLayout(
            address=one.address, size_bytes=one.size_bytes, place=one.place, small=one.small, expandable=one.expandable
        )
        for one in sorted([*undo.segments.values(), *undo.mapped.layouts()], key=lambda one: one.address)
        if one.size_bytes
    ]
    lost = _distribute(segments, undo.blocks)
    for segment in segments:
        _give_tails(segment, undo.guessed, settings)
    return Beginning(segments=segments, num_inconsistent=undo.num_inconsistent + lost)


def _undo_event(undo: _Undo, kind: int, address: int, size: int, place: int, settings: AllocatorSettings) -> None:
    blocks = undo.blocks
    if kind == ALLOC:
        undo.num_inconsistent += blocks.pop(address, None) is None
        undo.guessed.discard(address)
    elif kind == FREE_COMPLETED:
        undo.num_inconsistent += address in blocks
        rounded = round_size(size + settings.padding_bytes, settings.divisions)
        blocks[address] = BlockLayout(address=address, size_bytes=rounded, requested_bytes=size, awaiting=True)
        undo.guessed.add(address)
    elif kind == FREE_REQUESTED:
        found = blocks.get(address)
        if found is None:
            undo.num_inconsistent += 1
        else:
            blocks[address] = BlockLayout(
                address=address, size_bytes=found.size_bytes, requested_bytes=found.requested_bytes
            )
    elif kind == SEGMENT_ALLOC:
        undo.num_inconsistent += undo.segments.pop(address, None) is None
    elif kind == SEGMENT_FREE:
        undo.num_inconsistent += address in undo.segments
        undo.segments[address] = SegmentLayout(
            address=address, size_bytes=size, place=place, small=size == SMALL_SEGMENT_BYTES
        )
    elif kind == SEGMENT_MAP:
        undo.num_inconsistent += not undo.mapped.unmap(address, size)
    elif kind == SEGMENT_UNMAP:
        undo.mapped.map(address, size, place)


def _distribute(segments: list[SegmentLayout], blocks: dict[int, BlockLayout]) -> int:
    """Put each block into its segment, by address; return how many lie in none."""
    lost, at, end = 0, 0, 0
    for address in sorted(blocks):
        while at < len(segments) and address >= segments[at].address + segments[at].size_bytes:
            at += 1
        block = blocks[address]
        segment = segments[at] if at < len(segments) else None
        inside = segment is not None and address >= max(end, segment.address)
        if segment is None or not inside or address + block.size_bytes > segment.address + segment.size_bytes:
            lost += 1
            continue
        segment.blocks.append(block)
        end = address + block.size_bytes
    return lost


def _give_tails(segment: SegmentLayout, guessed: set[int], settings: AllocatorSettings) -> None:
    """Lengthen the blocks of guessed size by the rest behind them that cannot be a block of its own."""
    if segment.small or segment.expandable:
        return
    ends = [block.address for block in segment.blocks[1:]] + [segment.address + segment.size_bytes]
    unsplit = segment.size_bytes >= settings.max_split_size_bytes
    for block, end in zip(segment.blocks, ends, strict=False):  # an empty segment has an end and no block
        gap = end - block.address - block.size_bytes
        if block.address in guessed and gap > 0 and (gap <= SMALL_BYTES or unsplit):
            block.size_bytes += gap


def to_workload(recording: Recording, beginning: list[SegmentLayout], *, with_refused: bool = False) -> Workload:
    """Return the recording as work without addresses.

    A run of segments given back is one call of ``empty_cache``; whether the allocator did so itself because memory had
    run out cannot be told. ``with_refused`` asks once more for what was refused, and gives it back at once.
    """
    builder = WorkloadBuilder(recording.known_places)
    builder.start_from(beginning)
    owners = {block.address: block.owner for segment in beginning for block in segment.blocks}
    requested = {block.address for segment in beginning for block in segment.blocks if block.awaiting}
    kinds, num_events = recording.kinds, len(recording)
    for at, (kind, address, size, place) in enumerate(recording):
        if kind == ALLOC:
            owners[address] = builder.allocate(size, place=place)
            requested.discard(address)
        elif kind == FREE_REQUESTED:
            immediate = at + 1 < num_events and kinds[at + 1] == FREE_COMPLETED
            if address not in owners or address in requested:
                continue
            if immediate and recording.addresses[at + 1] == address:
                builder.free(owners.pop(address))
            else:
                requested.add(address)
                builder.request_free(owners[address])
        elif kind == FREE_COMPLETED:
            if address in requested:
                requested.discard(address)
                builder.complete_free(owners.pop(address))
        elif kind == OOM and with_refused:
            builder.free(builder.allocate(size, place=place))
        elif kind in GIVEN_BACK and (at + 1 == num_events or kinds[at + 1] not in GIVEN_BACK):
            builder.empty_cache()
    builder.work.num_events = num_events
    return builder.work


class Replayer:
    """Runs the allocator along a recording."""

    def __init__(self, recording: Recording, beginning: list[SegmentLayout], settings: AllocatorSettings) -> None:
        self.recording = recording
        self.placement = Placement()
        self._pending: deque[tuple[int, int]] = deque()
        self.allocator = Allocator(settings, addresses=self._recorded_address)
        self.allocator.on_driver = self._check_map
        self._unlike_maps = self._num_looked_at = 0
        self._requests: dict[tuple[int, int], Request] = {}
        places = recording.known_places.places
        for number, block in enumerate(block for segment in beginning for block in segment.blocks):
            block.owner = number
        owned = self.allocator.adopt(beginning, places)
        self._live: dict[int, Block] = {block.address: block for block in owned.values()}

    def _recorded_address(self, size: int) -> int:
        if not self._pending:
            return NOWHERE
        if self.allocator.settings.expandable_segments:  # addresses are reserved here, _check_map takes what is mapped
            return self._pending[0][0]
        return self._pending.popleft()[0] if self._pending[0][1] == size else NOWHERE

    def _check_map(self, kind: int, address: int, size: int, _free_set: FreeSet) -> None:
        """Compare a mapping with the recorded one; the first of a new segment says where that lies."""
        if kind != SEGMENT_MAP:
            return
        recorded = self._pending.popleft() if self._pending else (-1, 0)
        self._unlike_maps += recorded != (address, size)

    def run(self) -> Placement:
        """Run to the end, or to where the recording and the simulator part for good."""
        with garbage.paused():
            return self._run()

    def _run(self) -> Placement:
        allocator, live = self.allocator, self._live
        for at, (kind, address, size, place) in enumerate(self.recording):
            if kind == ALLOC:
                if not self._alloc(at, address, size, place):
                    break
            elif kind == FREE_COMPLETED:
                block = live.pop(address, None)
                if block is not None:
                    allocator.complete_free(block)
            elif kind == FREE_REQUESTED:
                if address in live and live[address].state == IN_USE:
                    allocator.request_free(live[address])
            elif kind in (SEGMENT_ALLOC, SEGMENT_MAP):
                self._pending.append((address, size))
            elif kind == SEGMENT_FREE:
                self._free_segment(at, address)
            elif kind == SEGMENT_UNMAP:
                self._unmap(at, address, size)
        return self.placement

    def _alloc(self, at: int, address: int, size: int, place: int) -> bool:
        request = self._requests.get((size, place))
        if request is None:
            known = self.recording.known_places.places[place]
            request = self._requests[size, place] = self.allocator.request(size, known)
        self._unlike_maps = 0
        block = self.allocator.malloc(request)
        self.placement.checked += 1
        if block is None:  # no address space is as large as what is asked for
            self._differs(at, address, NOWHERE)
            return False
        if block.address == address and not self._pending and not self._unlike_maps:
            self.placement.equal += 1
            self._live[address] = block
            return True
        self._differs(at, address, block.address)
        return self._follow(block, address, request)

    def _differs(self, at: int, address: int, simulated: int) -> None:
        if not self.placement.first_difference:
            where = f"{simulated:#x}" if simulated < NOWHERE else _("a new segment")
            self.placement.first_difference = _("event {at}: recorded {address:#x}, simulated {where}").format(
                at=at, address=address, where=where
            )

    def _follow(self, wrong: Block, address: int, request: Request) -> bool:
        """Undo the placement and put the block where the recording has it, if memory is free there."""
        allocator = self.allocator
        allocator.free(wrong)
        if wrong.expandable or allocator.settings.expandable_segments:
            return False
        if wrong.whole and wrong.address >= NOWHERE:
            release_block(allocator, wrong)
        while self._pending:
            base, size = self._pending.popleft()
            fresh = Block(base, size, request.free_set, FREE)
            allocator.segments[base] = fresh
            allocator.take(size)
            allocator.counters.num_segments_allocated += 1
            request.free_set.insert(fresh)
        for block in request.blocks if self._num_looked_at < MAX_LOOKED_AT else ():
            self._num_looked_at += 1
            if block.address <= address and address + request.rounded <= block.address + block.size:
                self._live[address] = self._place(block, address, request)
                return True
        return False

    def _place(self, block: Block, address: int, request: Request) -> Block:
        allocator, free_set = self.allocator, request.free_set
        free_set.remove(block)
        if address > block.address:
            before, block = block, allocator._cut(block, address - block.address)
            free_set.insert(before)
        if block.size - request.rounded >= request.min_rest:
            free_set.insert(allocator._cut(block, request.rounded))
        block.state, block.requested = IN_USE, request.requested
        allocator.active += block.size
        allocator.peak_allocated = max(allocator.peak_allocated, allocator.allocated)
        return block

    def _free_segment(self, at: int, address: int) -> None:
        block = self.allocator.segments.get(address)
        if block is not None and block.whole and block.state == FREE:
            release_block(self.allocator, block)
        elif not self.placement.first_difference:
            self.placement.first_difference = _(
                "event {at}: the segment at {address:#x} was given back while in use"
            ).format(at=at, address=address)

    def _unmap(self, at: int, address: int, size: int) -> None:
        """Unmap what the recording unmapped, if the free block around it gives exactly that."""
        for pool in self.allocator.pools.values() if self._num_looked_at < MAX_LOOKED_AT else ():
            for block in pool.blocks():
                self._num_looked_at += 1
                if block.expandable and block.address <= address and address + size <= block.address + block.size:
                    expandable.unmap(self.allocator, block)
                    return
        if not self.placement.first_difference:
            self.placement.first_difference = _("event {at}: memory at {address:#x} was unmapped while in use").format(
                at=at, address=address
            )

    def compare_final(self, final: list[SegmentLayout]) -> None:
        """Count the segments whose blocks lie at the end as the snapshot has them."""
        self.placement.final_segments = len(final)
        ranges = {blocks[0].address: blocks for blocks in self.allocator.mapped_ranges()}
        for segment in final:
            recorded = [(one.address, one.size_bytes, one.requested_bytes) for one in segment.blocks]
            blocks = ranges.get(segment.address, [])
            simulated = [(one.address, one.size, one.requested) for one in blocks if one.state != FREE]
            total = sum(one.size for one in blocks)
            self.placement.final_equal += recorded == simulated and total == segment.size_bytes
