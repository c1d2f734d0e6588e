"""Run work through the allocator and keep what PyTorch would have recorded of it: events, segments, stacks.

What comes out is what :mod:`ullage.observe.snapshot` reads from a file, so that a trace on meta tensors and a run on a
GPU are looked at with the same tools; :mod:`ullage.observe.write_snapshot` writes it for PyTorch's own viewers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ullage import garbage
from ullage.allocator.events import (
    ALLOC,
    FREE_COMPLETED,
    FREE_REQUESTED,
    OOM,
    WORK_ALLOC,
    WORK_EMPTY_CACHE,
    WORK_FREE,
    WORK_FREE_REQUESTED,
    Places,
    Recording,
    SegmentLayout,
    Workload,
)
from ullage.allocator.metrics import layout_of
from ullage.allocator.request import Request
from ullage.allocator.run import Outcome, Runner, check_backend
from ullage.allocator.settings import AllocatorSettings
from ullage.allocator.simulate import Allocator
from ullage.allocator.stacks import NO_STACK
from ullage.allocator.state import AWAITING, FREE, IN_USE, Block, FreeSet


@dataclass(kw_only=True)
class Recorded:
    """A run as one device would have recorded it.

    Attributes:
        outcome: peaks, counters and the death, as of :func:`ullage.allocator.run.run_workload`.
        recording: the events with the simulator's addresses, and the stacks and times of the work.
        segments: what is there at the end.
        free_blocks: (segment address, block address, bytes) of what is free in them.
        block_stacks: block address -> number of the stack that allocated it.
        segment_stacks: segment address -> number of the stack for which it was taken.
    """

    outcome: Outcome
    recording: Recording
    segments: list[SegmentLayout]
    free_blocks: list[tuple[int, int, int]]
    block_stacks: dict[int, int]
    segment_stacks: dict[int, int]


def record_workload(
    work: Workload,
    settings: AllocatorSettings,
    *,
    capacity_bytes: int | None = None,
    total_bytes: int | None = None,
) -> Recorded:
    """Run work to its end, or to the first request that no memory is left for, and keep every event.

    Args:
        work: what to do; ``stacks`` and ``times_us`` of its steps go into the events.
        settings: of the allocator.
        capacity_bytes: what the driver can give; no limit when not given.
        total_bytes: the device's memory, for fractions; ``capacity_bytes`` when not given.
    """
    check_backend(settings)
    allocator = _Watched(settings, capacity_bytes=capacity_bytes, total_bytes=total_bytes)
    run = _RecordingRun(allocator, work)
    outcome = run.to_the_end()
    return Recorded(
        outcome=outcome,
        recording=run.recording,
        segments=layout_of(allocator, run.recording.known_places),
        free_blocks=[
            (blocks[0].address, block.address, block.size)
            for blocks in allocator.mapped_ranges()
            for block in blocks
            if block.state == FREE
        ],
        block_stacks=run.block_stacks,
        segment_stacks=run.segment_stacks,
    )


def export_snapshot(
    path: Path,
    work: Workload,
    settings: AllocatorSettings,
    *,
    capacity_bytes: int | None = None,
    total_bytes: int | None = None,
    device: int = 0,
) -> Outcome:
    """Run work and write it as a memory snapshot that ``torch.cuda._memory_viz`` and its viewer open.

    Give the steps of the work stacks and times by ``WorkloadBuilder(annotated=True)``. The other arguments are those of
    :func:`record_workload`.
    """
    from ullage.observe.write_snapshot import write_snapshot

    recorded = record_workload(work, settings, capacity_bytes=capacity_bytes, total_bytes=total_bytes)
    write_snapshot(path, {device: recorded})
    return recorded.outcome


class _Watched(Allocator):
    """An allocator that says when a delayed free is done, by an event or by a synchronisation."""

    run: _RecordingRun

    def complete_free(self, block: Block) -> None:
        """Free such a block, and say so."""
        if self.waiting.get(block.address) is block and block.state == AWAITING:
            self.run.note(FREE_COMPLETED, block.address, block.requested, block.free_set)
            self.run.block_stacks.pop(block.address, None)
        super().complete_free(block)


class _RecordingRun:
    """The steps of a run, one after the other, and the events they cause."""

    def __init__(self, allocator: _Watched, work: Workload) -> None:
        self.allocator, self.work = allocator, work
        allocator.run, allocator.on_driver = self, self._note_driver
        self.recording = Recording(known_places=Places(), known_stacks=work.known_stacks)
        self.block_stacks: dict[int, int] = {}
        self.segment_stacks: dict[int, int] = {}
        self._stack, self._time_us = NO_STACK, 0
        self.runner = Runner(allocator, work)
        self._placed: dict[int, int] = {}  # of each set of free blocks the number of its place

    def to_the_end(self) -> Outcome:
        """Do the steps."""
        with garbage.paused():
            return self._to_the_end()

    def _to_the_end(self) -> Outcome:
        runner, work = self.runner, self.work
        runner.start(afresh=False)
        stacks, times = work.stacks, work.times_us
        for at, (code, value) in enumerate(zip(work.codes, work.values, strict=True)):
            if stacks:
                self._stack, self._time_us = stacks[at], times[at]
            if not self._step(code, value):
                request = runner.requests[value]
                death = runner.death(len(runner.live), request)
                self._note_death(request)
                return runner.outcome(afresh=False, death=death)
        return runner.outcome(afresh=False, death=None)

    def _step(self, code: int, value: int) -> bool:
        runner, live = self.runner, self.runner.live
        if code == WORK_ALLOC:
            block = self.allocator.malloc(runner.requests[value])
            if block is None:
                return False
            live.append(block)
            self.block_stacks[block.address] = self._stack
            self.note(ALLOC, block.address, block.requested, block.free_set)
            return True
        if code == WORK_EMPTY_CACHE:
            self.allocator.empty_cache()
            return True
        known = live[value] if value < len(live) else None
        if code in (WORK_FREE, WORK_FREE_REQUESTED) and known is not None and known.state == IN_USE:
            self.note(FREE_REQUESTED, known.address, known.requested, known.free_set)
            if code == WORK_FREE:
                self.note(FREE_COMPLETED, known.address, known.requested, known.free_set)
                self.block_stacks.pop(known.address, None)
        runner.free(code, value)
        return True

    def note(self, kind: int, address: int, size: int, free_set: FreeSet) -> None:
        """Keep one event."""
        place = self._placed.get(id(free_set))
        if place is None:
            place = self.recording.known_places.index(free_set.stream, free_set.pool.pool_id)
            self._placed[id(free_set)] = place
        self.recording.append(kind, address, size, place, self._stack, self._time_us)

    def _note_driver(self, kind: int, address: int, size: int, free_set: FreeSet) -> None:
        self.segment_stacks.setdefault(address, self._stack)
        self.note(kind, address, size, free_set)

    def _note_death(self, request: Request) -> None:
        """Keep the refused request: what the driver had left, and the rounded bytes."""
        allocator = self.allocator
        left = 0 if allocator.capacity is None else allocator.capacity - allocator.reserved
        self.note(OOM, left, request.rounded, request.free_set)
