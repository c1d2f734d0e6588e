"""A device of a snapshot from all sides: peak, attribution, leaks, fragmentation, the request that was refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ullage.allocator.events import SEGMENT_ALLOC, SEGMENT_FREE, SegmentLayout
from ullage.allocator.metrics import Fragmentation, Pin, fragmentation, free_gaps, pins
from ullage.allocator.recorded import recorded_settings
from ullage.allocator.settings import AllocatorSettings
from ullage.i18n import _
from ullage.observe.attribution import Attribution, attribute
from ullage.observe.attribution_lives import Lives, lives_of
from ullage.observe.attribution_stacks import BACKWARD, FORWARD, OPTIMIZER
from ullage.observe.attribution_views import Share, Timeline, shares, timeline, with_times
from ullage.observe.counterfactual import Refusal, refusal_of
from ullage.observe.leaks import Leak, find_leak
from ullage.observe.snapshot import DeviceMemory, Snapshot

#: Segments and cells of each in the map of fragmentation.
MAP_ROWS, MAP_CELLS = 60, 120
MAX_SHARES = 30

Notify = Callable[[str], None]


def _nobody(_stage: str) -> None:
    """Tell nobody."""


@dataclass(kw_only=True)
class Answer:
    """What is known of one device.

    Attributes:
        moment: the event that the attribution is of: the refused request if there is one, else the peak; -1: before
            the first.
        sums: category -> bytes that are certain, likely, unsure, at that moment.
        modules, lines, holders: who held it then, by module, line of the user's code and stack.
        retries: times at which segments were given back right before one was taken: retries, or empty_cache calls.
        map: the segments with most free memory: (name, share in use of each cell).
    """

    device: int
    memory: DeviceMemory
    settings: AllocatorSettings
    lives: Lives
    found: Attribution
    moment: int
    sums: dict[str, list[int]]
    modules: list[Share]
    lines: list[Share]
    holders: list[Share]
    final: Fragmentation
    pinned_by: list[Pin]
    leak: Leak
    refusal: Refusal | None
    timeline: Timeline
    retries: int = 0
    map: list[tuple[str, list[float]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def recorded(self) -> bool:
        """Tell whether there is a history at all."""
        return self.lives.num_events > len(self.memory.ooms)

    def phase(self, event: int) -> str:
        """Return the phase at an event in words, empty when it is not known."""
        words = {
            FORWARD: _("the forward pass"), BACKWARD: _("the backward pass"), OPTIMIZER: _("the optimizer's step"),
        }  # fmt: skip
        return words.get(self.found.phase_at(event), "") if event >= 0 else ""

    def step(self, event: int) -> int:
        """Return the number of the step at an event, from 1; 0 when steps are not known."""
        ends = self.leak.boundaries
        return min(len(ends), 1 + sum(end <= event for end in ends))

    def place(self, stack: int) -> str:
        """Return the line that a stack asked on, for people."""
        return self.found.reader.line(stack) or self.unnamed(stack)

    def unnamed(self, stack: int) -> str:
        """Return what a stack without Python lines is called."""
        if stack:
            return "C++"
        return _("no stack: autograd's threads, or older than the recording")


def answer(snapshot: Snapshot, device: int, notify: Notify = _nobody) -> Answer:
    """Look at one device from all sides."""
    memory = snapshot.devices[device]
    everything = [segment for one in snapshot.devices.values() for segment in one.segments]
    settings, notes = recorded_settings(snapshot.settings, memory.segments, everything)
    notify(_("following each block"))
    lives = lives_of(memory, settings)
    notify(_("telling what each was for"))
    found = attribute(memory, lives)
    notify(_("trying other allocator settings"))
    refusal = refusal_of(memory, lives, settings)
    moment = refusal.event if refusal is not None and memory.recording else lives.peak_at
    alive = lives.alive_at(moment)
    notify(_("drawing"))
    reader = found.reader
    return Answer(
        device=device,
        memory=memory,
        settings=settings,
        lives=lives,
        found=found,
        moment=moment,
        sums=found.sums_of(alive),
        modules=shares(found, alive, lambda stack: reader.module(stack))[:MAX_SHARES],
        lines=shares(found, alive, lambda stack: reader.line(stack))[:MAX_SHARES],
        holders=shares(found, alive, str)[:MAX_SHARES],
        final=fragmentation(memory.segments, settings.large_segment_size_bytes),
        pinned_by=pins(memory.segments),
        leak=find_leak(found),
        refusal=refusal,
        timeline=with_times(timeline(found), memory.recording.times_us),
        retries=_retries(memory),
        map=_map(memory.segments),
        notes=notes,
    )


def _retries(memory: DeviceMemory) -> int:
    kinds = memory.recording.kinds
    return kinds.count(bytes((SEGMENT_FREE, SEGMENT_ALLOC)))


def _map(segments: list[SegmentLayout]) -> list[tuple[str, list[float]]]:
    """Return the segments with most free memory, cut into cells, each with the share that is in use."""

    def free(segment: SegmentLayout) -> int:
        return sum(size for _address, size in free_gaps(segment))

    with_space = sorted(((free(one), one) for one in segments), key=lambda pair: (-pair[0], pair[1].address))
    return [(f"{one.address:#x}", _cells(one)) for size, one in with_space[:MAP_ROWS] if size]


def _cells(segment: SegmentLayout) -> list[float]:
    width = segment.size_bytes / MAP_CELLS
    cells = [0.0] * MAP_CELLS
    for block in segment.blocks:
        start = (block.address - segment.address) / width
        end = start + block.size_bytes / width
        first, last = int(start), min(int(end), MAP_CELLS - 1)
        if first == last:
            cells[first] += end - start
            continue
        cells[first] += first + 1 - start
        for cell in range(first + 1, last):
            cells[cell] = 1.0
        cells[last] += end - last
    return [round(min(1.0, cell), 3) for cell in cells]
