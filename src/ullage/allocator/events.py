"""The stream that the allocator lives on, in compact arrays: what was recorded, and what of it is work to be done.

A recording names addresses; work does not: the same :class:`Workload` can be run under any settings.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

from ullage.allocator.stacks import NO_STACK, Stacks

#: Kinds of recorded events, by the names of a memory snapshot (pytorch@2.14:torch/cuda/memory.py:_snapshot).
ACTIONS = (
    "alloc", "free_requested", "free_completed", "segment_alloc", "segment_free", "segment_map", "segment_unmap", "oom",
)  # fmt: skip
ALLOC, FREE_REQUESTED, FREE_COMPLETED, SEGMENT_ALLOC, SEGMENT_FREE, SEGMENT_MAP, SEGMENT_UNMAP, OOM = range(8)

#: Kinds of work. ``FREE`` is a request to free that nothing delays.
WORK_ALLOC, WORK_FREE, WORK_FREE_REQUESTED, WORK_FREE_COMPLETED, WORK_EMPTY_CACHE = range(5)

#: The pool of all that no CUDA graph or MemPool owns.
DEFAULT_POOL = (0, 0)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a request may be served: a stream and the pool of a graph or MemPool."""

    stream: int
    pool_id: tuple[int, int] = DEFAULT_POOL


class Places:
    """Streams and pools, numbered in the order in which they are met."""

    __slots__ = ("_index", "places")

    def __init__(self) -> None:
        self.places: list[Place] = []
        self._index: dict[tuple[int, tuple[int, int]], int] = {}

    def index(self, stream: int, pool_id: tuple[int, int] = DEFAULT_POOL) -> int:
        """Return the number of a place, a new one when it is new."""
        found = self._index.get((stream, pool_id))
        if found is None:
            found = self._index[stream, pool_id] = len(self.places)
            self.places.append(Place(stream=stream, pool_id=pool_id))
        return found


@dataclass(kw_only=True)
class Recording:
    """What one device recorded, in order, 37 bytes per event.

    Attributes:
        kinds: one of ``ACTIONS`` each.
        addresses: where; of a refused request what the driver had left.
        sizes: bytes asked for, of segments their own.
        places: numbers of ``known_places``.
        stacks: numbers of ``known_stacks``: each distinct stack is kept once, for all devices of a file together.
        times_us: microseconds since the epoch, 0 where not recorded.
    """

    kinds: bytearray = field(default_factory=bytearray)
    addresses: array[int] = field(default_factory=lambda: array("Q"))
    sizes: array[int] = field(default_factory=lambda: array("Q"))
    places: array[int] = field(default_factory=lambda: array("L"))
    stacks: array[int] = field(default_factory=lambda: array("I"))
    times_us: array[int] = field(default_factory=lambda: array("Q"))
    known_places: Places = field(default_factory=Places)
    known_stacks: Stacks = field(default_factory=Stacks)

    def __len__(self) -> int:
        return len(self.kinds)

    def append(self, kind: int, address: int, size: int, place: int, stack: int = NO_STACK, time_us: int = 0) -> None:
        """Add one event."""
        self.kinds.append(kind)
        self.addresses.append(address)
        self.sizes.append(size)
        self.places.append(place)
        self.stacks.append(stack)
        self.times_us.append(time_us)

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield (kind, address, bytes, place)."""
        return zip(self.kinds, self.addresses, self.sizes, self.places, strict=True)


@dataclass(kw_only=True)
class BlockLayout:
    """One block of a segment that is in use: ``owner`` numbers the allocation, -1 where none is known."""

    address: int
    size_bytes: int
    requested_bytes: int
    awaiting: bool = False
    owner: int = -1


@dataclass(kw_only=True)
class SegmentLayout:
    """One segment (or one mapped range of an expandable one) and the blocks in use in it, by address."""

    address: int
    size_bytes: int
    place: int
    small: bool
    expandable: bool = False
    blocks: list[BlockLayout] = field(default_factory=list)


@dataclass(kw_only=True)
class Workload:
    """Requests and frees without addresses.

    Attributes:
        codes: what to do, one ``WORK_`` number per step.
        values: for an allocation the request class, for a free the number of the allocation.
        requests: request class -> (bytes asked for, place).
        initial: what was there when the recording began; its blocks own the first numbers.
        num_events: events of the recording that these steps stand for.
        stacks: the number of the stack of each step in ``known_stacks``; empty when nobody gave any.
        times_us: microseconds of each step since any moment; empty when nobody gave any.
    """

    codes: bytearray = field(default_factory=bytearray)
    values: array[int] = field(default_factory=lambda: array("L"))
    requests: list[tuple[int, int]] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    initial: list[SegmentLayout] = field(default_factory=list)
    num_initial: int = 0
    num_events: int = 0
    stacks: array[int] = field(default_factory=lambda: array("I"))
    times_us: array[int] = field(default_factory=lambda: array("Q"))
    known_stacks: Stacks = field(default_factory=Stacks)


class WorkloadBuilder:
    """Build a :class:`Workload` step by step; the way for traces that never had addresses.

    Attributes:
        stack: the number of the stack of the steps that follow, from ``known_stacks.number(frames)``.
        time_us: the time of the steps that follow.
        annotated: keep stack and time of each step, for a snapshot to be written; from before the first step on.
    """

    def __init__(self, places: Places | None = None, *, annotated: bool = False) -> None:
        self.work = Workload()
        self.annotated = annotated
        self.stack, self.time_us = NO_STACK, 0
        self._places = places or Places()
        self.work.places = self._places.places
        self._classes: dict[tuple[int, int], int] = {}
        self._num_allocations = 0

    def start_from(self, initial: list[SegmentLayout]) -> None:
        """Number the blocks that were there before the first step."""
        self.work.initial = initial
        for segment in initial:
            for block in segment.blocks:
                block.owner = self._num_allocations
                self._num_allocations += 1
        self.work.num_initial = self._num_allocations

    def allocate(self, size_bytes: int, *, place: int | None = None, stream: int = 0) -> int:
        """Ask for memory; return the number of the allocation."""
        place = self._places.index(stream) if place is None else place
        key = (size_bytes, place)
        request = self._classes.get(key)
        if request is None:
            request = self._classes[key] = len(self.work.requests)
            self.work.requests.append(key)
        self._add(WORK_ALLOC, request)
        self._num_allocations += 1
        return self._num_allocations - 1

    def free(self, owner: int) -> None:
        """Give an allocation back, at once."""
        self._add(WORK_FREE, owner)

    def request_free(self, owner: int) -> None:
        """Give an allocation back that another stream still uses."""
        self._add(WORK_FREE_REQUESTED, owner)

    def complete_free(self, owner: int) -> None:
        """Say that no stream uses it any more."""
        self._add(WORK_FREE_COMPLETED, owner)

    def empty_cache(self) -> None:
        """Give all free segments back to the driver (``torch.cuda.empty_cache``)."""
        self._add(WORK_EMPTY_CACHE, 0)

    def _add(self, code: int, value: int) -> None:
        self.work.codes.append(code)
        self.work.values.append(value)
        self.work.num_events += 1
        if self.annotated:
            self.work.stacks.append(self.stack)
            self.work.times_us.append(self.time_us)

    @property
    def known_stacks(self) -> Stacks:
        """Return the table that numbers the stacks."""
        return self.work.known_stacks
