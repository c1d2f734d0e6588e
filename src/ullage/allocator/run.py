"""Run work under settings, free of any recorded address, and say what it took."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ullage import garbage
from ullage.allocator.events import (
    WORK_ALLOC,
    WORK_EMPTY_CACHE,
    WORK_FREE,
    WORK_FREE_REQUESTED,
    SegmentLayout,
    Workload,
)
from ullage.allocator.request import Request
from ullage.allocator.settings import AllocatorSettings
from ullage.allocator.simulate import Allocator, Counters
from ullage.allocator.state import AWAITING, IN_USE, Block
from ullage.errors import InputError
from ullage.i18n import _


@dataclass(frozen=True, kw_only=True)
class Death:
    """The request for which no memory was left."""

    step: int
    requested_bytes: int
    reserved_bytes: int
    allocated_bytes: int
    limit_bytes: int


@dataclass(kw_only=True)
class Outcome:
    """What a run took.

    Attributes:
        started_afresh: the blocks that were there at the beginning were allocated anew under these settings, in the
            order of their addresses; else their recorded layout was kept.
        peak_step: the step at which the reserved memory grew last; -1 when it never did.
    """

    settings: AllocatorSettings
    started_afresh: bool
    peak_allocated_bytes: int = 0
    peak_active_bytes: int = 0
    peak_reserved_bytes: int = 0
    peak_step: int = -1
    final_allocated_bytes: int = 0
    final_requested_bytes: int = 0
    final_reserved_bytes: int = 0
    counters: Counters = field(default_factory=Counters)
    death: Death | None = None
    allocator: Allocator

    @property
    def num_segments_allocated(self) -> int:
        """Return how often the driver gave memory: segments, or mappings of expandable ones."""
        return self.counters.num_segments_allocated + self.counters.num_maps


def run_workload(
    work: Workload,
    settings: AllocatorSettings,
    *,
    capacity_bytes: int | None = None,
    total_bytes: int | None = None,
    afresh: bool = False,
    stop_after: int | None = None,
) -> Outcome:
    """Run work to its end, to the first request that no memory is left for, or to a step.

    Args:
        work: what to do.
        settings: of the allocator.
        capacity_bytes: what the driver can give; no limit when not given.
        total_bytes: the device's memory, for fractions; ``capacity_bytes`` when not given.
        afresh: allocate the blocks of the beginning anew instead of keeping their layout.
        stop_after: do no more steps than this.
    """
    check_backend(settings)
    allocator = Allocator(settings, capacity_bytes=capacity_bytes, total_bytes=total_bytes)
    runner = Runner(allocator, work)
    with garbage.paused():
        death = runner.start(afresh=afresh) or runner.run(stop_after)
    return runner.outcome(afresh=afresh, death=death)


def check_backend(settings: AllocatorSettings) -> None:
    """Refuse an allocator that is not PyTorch's own."""
    if settings.backend != "native":
        raise InputError(_("only the native allocator is simulated, not {backend}").format(backend=settings.backend))


class Runner:
    """Keeps which block belongs to which allocation."""

    def __init__(self, allocator: Allocator, work: Workload) -> None:
        self.allocator, self.work = allocator, work
        self.live: list[Block | None] = []
        self.peak_step = -1
        self._steps: Iterator[int] = iter(work.codes)
        self.requests = [allocator.request(size, work.places[place]) for size, place in work.requests]
        allocator.on_growth = self._note_growth

    def _note_growth(self) -> None:
        """Note at which step the reserved memory reached a new height: the iterator knows how much is left of it."""
        self.peak_step = len(self.work.codes) - self._steps.__length_hint__() - 1  # type: ignore[attr-defined]

    def start(self, *, afresh: bool) -> Death | None:
        """Bring about what was there before the first step."""
        allocator, work = self.allocator, self.work
        self.live = [None] * work.num_initial
        if not afresh:
            for owner, block in allocator.adopt(work.initial, work.places).items():
                self.live[owner] = block
            return None
        for segment in work.initial:
            death = self._allocate_anew(segment)
            if death is not None:
                return death
        self.peak_step = -1
        return None

    def _allocate_anew(self, segment: SegmentLayout) -> Death | None:
        for used in segment.blocks:
            request = self.allocator.request(used.requested_bytes, self.work.places[segment.place])
            block = self.allocator.malloc(request)
            if block is None:
                return self.death(-1, request)
            self.live[used.owner] = block
            if used.awaiting:
                self.allocator.request_free(block)
        return None

    def run(self, stop_after: int | None) -> Death | None:
        """Do the steps."""
        work, allocator, live, requests = self.work, self.allocator, self.live, self.requests
        malloc, free, append = allocator.malloc, allocator.free, self.live.append
        steps = self._steps = iter(work.codes if stop_after is None else work.codes[:stop_after])
        for code, value in zip(steps, work.values, strict=False):
            if code == WORK_ALLOC:
                new = malloc(requests[value])
                if new is None:
                    return self.death(len(live), requests[value])
                append(new)
            elif code == WORK_FREE:
                block = live[value]
                if block is None or block.state != IN_USE:
                    self._refuse(value)
                free(block)  # type: ignore[arg-type]
                live[value] = None
            elif code == WORK_EMPTY_CACHE:
                allocator.empty_cache()
            else:
                self._delayed_free(code, value)
        return None

    def free(self, code: int, value: int) -> None:
        """Do one step that frees."""
        block = self.live[value]
        if code != WORK_FREE:
            self._delayed_free(code, value)
        elif block is None or block.state != IN_USE:
            self._refuse(value)
        else:
            self.allocator.free(block)
            self.live[value] = None

    def outcome(self, *, afresh: bool, death: Death | None) -> Outcome:
        """Return what it took up to here."""
        allocator = self.allocator
        return Outcome(
            settings=allocator.settings,
            started_afresh=afresh,
            peak_allocated_bytes=allocator.peak_allocated,
            peak_active_bytes=allocator.peak_active,
            peak_reserved_bytes=allocator.peak_reserved,
            peak_step=self.peak_step,
            final_allocated_bytes=allocator.allocated,
            final_requested_bytes=allocator.requested,
            final_reserved_bytes=allocator.reserved,
            counters=allocator.counters,
            death=death,
            allocator=allocator,
        )

    def _delayed_free(self, code: int, value: int) -> None:
        block = self.live[value]
        if code == WORK_FREE_REQUESTED:
            if block is None or block.state != IN_USE:
                self._refuse(value)
            else:
                block.owner = value
                self.allocator.request_free(block)
            return
        if block is not None and block.state == AWAITING and block.owner == value:  # else a synchronisation was quicker
            self.allocator.complete_free(block)
        self.live[value] = None

    def _refuse(self, value: int) -> None:
        raise InputError(_("allocation {number} is freed twice").format(number=value))

    def death(self, step: int, request: Request) -> Death:
        """Return that memory had run out."""
        allocator = self.allocator
        limits = [limit for limit in (allocator.capacity, allocator.cap) if limit is not None]
        return Death(
            step=step,
            requested_bytes=request.requested,
            reserved_bytes=allocator.reserved,
            allocated_bytes=allocator.allocated,
            limit_bytes=min(limits) if limits else 0,
        )
