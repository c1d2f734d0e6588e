"""When each block of a recording was alive, how much was, and when that was most: one pass over the events.

A block that is freed without having been allocated is older than the recording; so is one of the final layout that no
event allocated. Sizes are those of the blocks: requests rounded as the allocator rounds, or what the final layout says.
Known error: a rest of at most 1 MiB that stays with a large block is only seen in blocks of the final layout.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate

from ullage.allocator.events import (
    ALLOC,
    FREE_REQUESTED,
    SEGMENT_ALLOC,
    SEGMENT_FREE,
    SEGMENT_MAP,
    SEGMENT_UNMAP,
    Recording,
)
from ullage.allocator.rounding import round_size
from ullage.allocator.settings import AllocatorSettings
from ullage.errors import InputError
from ullage.i18n import _
from ullage.observe.snapshot import DeviceMemory

NEVER = 2**32 - 1
NOBODY = 2**32 - 1


def _numbers() -> array[int]:
    return array("I")


def _bytes() -> array[int]:
    return array("Q")


@dataclass(kw_only=True)
class Lives:
    """The blocks of one device over the events of its recording; the oldest allocations first.

    Attributes:
        sizes, requested: bytes of each block, and what was asked for.
        starts: the event that allocated it; the blocks older than the recording stand first, with start 0.
        ends: the event that gave it back (of which nobody need wait), :data:`NEVER` when none did.
        stacks: number of the stack that allocated it, where it is known.
        places: number of the stream and pool.
        num_older: how many are older than the recording.
        changes: bytes that each event adds to what is allocated; ``owners``: the block it is about, or NOBODY.
        totals: allocated bytes after each event. ``start_bytes``: before the first.
        reserved: (event, reserved bytes after it) wherever that changes, from (-1, bytes at the beginning) on.
    """

    sizes: array[int] = field(default_factory=_bytes)
    requested: array[int] = field(default_factory=_bytes)
    starts: array[int] = field(default_factory=_numbers)
    ends: array[int] = field(default_factory=_numbers)
    stacks: array[int] = field(default_factory=_numbers)
    places: array[int] = field(default_factory=_numbers)
    num_older: int = 0
    changes: array[int] = field(default_factory=lambda: array("q"))
    owners: array[int] = field(default_factory=_numbers)
    totals: array[int] = field(default_factory=lambda: array("q"))
    start_bytes: int = 0
    reserved: list[tuple[int, int]] = field(default_factory=list)

    @property
    def num_events(self) -> int:
        """Events of the recording."""
        return len(self.changes)

    @property
    def peak_bytes(self) -> int:
        """The most that was allocated at a time."""
        return max(max(self.totals, default=0), self.start_bytes)

    @property
    def peak_at(self) -> int:
        """The event after which most was allocated, -1 when that was before the first."""
        return self.totals.index(self.peak_bytes) if self.peak_bytes > self.start_bytes else -1

    @property
    def peak_reserved(self) -> tuple[int, int]:
        """Return (event, bytes) of the first moment at which most was reserved."""
        return max(self.reserved, key=lambda pair: (pair[1], -pair[0]), default=(-1, 0))

    def reserved_at(self, event: int) -> int:
        """Return what was reserved after an event."""
        at = bisect_right(self.reserved, event, key=lambda pair: pair[0]) - 1
        return self.reserved[max(0, at)][1] if self.reserved else 0

    def alive_at(self, event: int) -> list[int]:
        """Return the blocks that were alive after an event (-1: before the first)."""
        older = self.num_older
        first = [each for each in range(older) if self.ends[each] > event or event < 0]
        if event < 0:
            return first
        ends = self.ends
        last = bisect_right(self.starts, event, lo=older)
        return first + [each for each in range(older, last) if ends[each] > event]


def lives_of(memory: DeviceMemory, settings: AllocatorSettings) -> Lives:
    """Follow each block of a device.

    Raises:
        InputError: its sizes add up to more than any memory.
    """
    try:
        return _lives_of(memory, settings)
    except OverflowError:
        raise InputError(_("the sizes in it add up to more than any memory")) from None


def _lives_of(memory: DeviceMemory, settings: AllocatorSettings) -> Lives:
    recording = memory.recording
    pass_ = _Pass(settings)
    pass_.run(memory)
    older = _Older(memory, pass_)
    lives = older.lives()
    number = lives.num_older
    lives.sizes.extend(pass_.sizes)
    lives.requested.extend(pass_.requested)
    lives.starts.extend(pass_.starts)
    lives.ends.extend(pass_.ends)
    lives.stacks.extend(pass_.stacks)
    lives.places.extend(pass_.places)
    lives.changes = pass_.changes
    # owners were counted without the older ones: those of the recording move up, the older ones were noted apart
    lives.owners = pass_.owners
    if number:
        lives.owners = array("I", (NOBODY if owner == NOBODY else owner + number for owner in pass_.owners))
    for event, owner in older.owners.items():
        lives.owners[event] = owner
    lives.start_bytes = sum(lives.sizes[:number])
    totals = accumulate(pass_.changes, initial=lives.start_bytes)
    next(totals)
    lives.totals = array("q", totals)
    lives.reserved = _reserved(memory)
    assert len(recording) == lives.num_events
    return lives


class _Pass:
    """The events of the recording, once, forward."""

    def __init__(self, settings: AllocatorSettings) -> None:
        self._settings = settings
        self._rounded: dict[int, int] = {}
        self.sizes, self.requested = _bytes(), _bytes()
        self.starts, self.ends, self.stacks, self.places = _numbers(), _numbers(), _numbers(), _numbers()
        self.changes: array[int] = array("q")
        self.owners = _numbers()
        self.live: dict[int, int] = {}  # address -> block
        self.freed_older: list[tuple[int, int, int, int]] = []  # (event, address, bytes asked for, place)

    def rounded(self, size: int) -> int:
        """Return the bytes of the block for a request."""
        found = self._rounded.get(size)
        if found is None:
            found = self._rounded[size] = round_size(size + self._settings.padding_bytes, self._settings.divisions)
        return found

    def run(self, memory: DeviceMemory) -> None:
        """Go through the events; what can be done for all allocations at a time is."""
        recording = memory.recording
        final = {block.address: block.size_bytes for one in memory.segments for block in one.blocks}
        num_events = len(recording)
        starts = self.starts = array("I", (at for at, kind in enumerate(recording.kinds) if kind == ALLOC))
        self.requested = array("Q", map(recording.sizes.__getitem__, starts))
        rounded = {size: self.rounded(size) for size in set(self.requested)}
        self.sizes = array("Q", map(rounded.__getitem__, self.requested))
        self.stacks = array("I", map(recording.stacks.__getitem__, starts))
        self.places = array("I", map(recording.places.__getitem__, starts))
        self.ends = array("I", [NEVER]) * len(starts)
        self.changes = array("q", bytes(8 * num_events))
        self.owners = array("I", [NOBODY]) * num_events
        self._follow(recording)
        self._sizes_at_the_end(final)

    def _follow(self, recording: Recording) -> None:
        """Find out which block each event is about."""
        live, changes, owners, sizes, ends = self.live, self.changes, self.owners, self.sizes, self.ends
        take, number = live.pop, 0
        for at, (kind, address) in enumerate(zip(recording.kinds, recording.addresses, strict=True)):
            if kind == ALLOC:
                owners[at] = live[address] = number
                changes[at] = sizes[number]
                number += 1
            elif kind == FREE_REQUESTED:
                owner = take(address, None)
                if owner is not None:
                    ends[owner] = at
                    owners[at] = owner
                    changes[at] = -sizes[owner]
                else:
                    size = recording.sizes[at]
                    self.freed_older.append((at, address, size, recording.places[at]))
                    changes[at] = -self.rounded(size)

    def _sizes_at_the_end(self, final: dict[int, int]) -> None:
        """Take the size that the final layout gives a block that is alive at the end."""
        for address, owner in self.live.items():
            known = final.get(address)
            if known is not None and known >= self.sizes[owner]:
                self.sizes[owner] = self.changes[self.starts[owner]] = known


class _Older:
    """The blocks that are older than the recording."""

    def __init__(self, memory: DeviceMemory, pass_: _Pass) -> None:
        self._memory, self._pass = memory, pass_
        self.owners: dict[int, int] = {}  # event -> block

    def lives(self) -> Lives:
        """Return them."""
        memory, found = self._memory, Lives()
        known = memory.recording.known_stacks
        for event, _address, size, place in self._pass.freed_older:
            self.owners[event] = len(found.sizes)
            self._add(found, self._pass.rounded(size), size, event, 0, place)
        for segment in memory.segments:
            for block in segment.blocks:
                if block.address not in self._pass.live and not block.awaiting:
                    stack = known.number(memory.stacks.get(block.address) or ())
                    self._add(found, block.size_bytes, block.requested_bytes, NEVER, stack, segment.place)
        found.num_older = len(found.sizes)
        return found

    def _add(self, found: Lives, size: int, requested: int, end: int, stack: int, place: int) -> None:
        found.sizes.append(size)
        found.requested.append(requested)
        found.starts.append(0)
        found.ends.append(end)
        found.stacks.append(stack)
        found.places.append(place)


def _reserved(memory: DeviceMemory) -> list[tuple[int, int]]:
    """Return how the reserved memory changed, from what is there at the end backwards."""
    recording = memory.recording
    signs = {SEGMENT_ALLOC: 1, SEGMENT_MAP: 1, SEGMENT_FREE: -1, SEGMENT_UNMAP: -1}
    events = [(at, signs[kind] * recording.sizes[at]) for at, kind in enumerate(recording.kinds) if kind in signs]
    reserved = sum(segment.size_bytes for segment in memory.segments) - sum(change for _at, change in events)
    found = [(-1, reserved)]
    for at, change in events:
        reserved += change
        found.append((at, reserved))
    return found
