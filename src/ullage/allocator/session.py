"""One device of a snapshot from beginning to end: checked, measured, and run again under other settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ullage.allocator.events import SegmentLayout, Workload
from ullage.allocator.keys import DEFAULT_VERSION
from ullage.allocator.metrics import Fragmentation, Pin, fragmentation, layout_of, pins, utilisation
from ullage.allocator.recorded import recorded_capacity, recorded_peaks, recorded_settings
from ullage.allocator.replay import Placement, Replayer, recover_beginning, to_workload
from ullage.allocator.run import Death, Outcome, run_workload
from ullage.allocator.settings import AllocatorSettings
from ullage.allocator.stacks import Stack
from ullage.allocator.what_if import Comparison, compare
from ullage.i18n import _
from ullage.units import format_bytes

if TYPE_CHECKING:
    from ullage.observe.snapshot import DeviceMemory, Snapshot


@dataclass(kw_only=True)
class Replay:
    """What is known of one device after its replay.

    Attributes:
        settings: under which the figures hold: the recorded ones, or those asked for.
        simulated: whether the figures come from a run under other settings or a capacity, not from the recording.
        num_events: entries of the recording.
        final: fragmentation at the end (of a run that died: when it died).
        at_peak: fragmentation when the reserved memory reached its peak; ``None`` where that was at the beginning.
        pinned_by: what keeps most free memory, at the end of the recording.
    """

    device: int
    settings: AllocatorSettings
    simulated: bool
    num_events: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    final_reserved_bytes: int
    num_segments_allocated: int
    num_maps: int
    placement: Placement
    final: Fragmentation
    at_peak: Fragmentation | None
    pinned_by: list[Pin]
    stacks: Mapping[int, Stack]
    death: Death | None = None
    outcome: Outcome | None = None
    comparison: Comparison | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def utilisation(self) -> float:
        """Return peak allocated over peak reserved."""
        return utilisation(self.peak_allocated_bytes, self.peak_reserved_bytes)


@dataclass(kw_only=True)
class _Checked:
    """A recording that was run forward once."""

    settings: AllocatorSettings
    work: Workload
    beginning: list[SegmentLayout]
    replayer: Replayer
    warnings: list[str]

    @property
    def exact(self) -> bool:
        """Tell whether all came out as recorded."""
        placement = self.replayer.placement
        return placement.checked == placement.equal and placement.final_segments == placement.final_equal


def choose_device(snapshot: Snapshot, device: int | None) -> tuple[int, list[str]]:
    """Return the device asked for, else the one with most events, then with most memory."""
    from ullage.errors import InputError

    known = snapshot.devices
    if device is not None:
        if device not in known:
            raise InputError(
                _("the snapshot has nothing of device {device}").format(device=device),
                remedy=_("it has devices {known}").format(known=", ".join(map(str, known)) or _("none")),
            )
        return device, []
    if not known:
        raise InputError(_("the snapshot has no segments and no events"), remedy=how_to_record())
    best = max(known, key=lambda number: (known[number].num_events, _reserved(known[number].segments), -number))
    others = [str(number) for number in known if number != best]
    note = _("device {device} of several is shown; choose another with --device {others}")
    return best, [note.format(device=best, others="|".join(others))] if others else []


def how_to_record() -> str:
    """Say how a recording with a history is made."""
    return _(
        "record one with torch.cuda.memory._record_memory_history(max_entries=1000000) before the run and "
        "torch.cuda.memory._dump_snapshot('snapshot.pickle') after it"
    )


def _reserved(segments: list[SegmentLayout]) -> int:
    return sum(segment.size_bytes for segment in segments)


def replay_device(
    snapshot: Snapshot,
    device: int,
    *,
    settings: AllocatorSettings | None = None,
    capacity_bytes: int | None = None,
    total_bytes: int | None = None,
    what_if: bool = False,
    version: tuple[int, int] = DEFAULT_VERSION,
    stage: Callable[[str], None] = lambda _stage: None,
) -> Replay:
    """Check the placement of a recording, then run it under other settings or a capacity where asked.

    Args:
        snapshot: the file.
        device: one of its devices.
        settings: other settings; the recorded ones when not given.
        capacity_bytes: what the driver can give to the allocator; no limit when not given.
        total_bytes: the device's memory, for fractions; ``capacity_bytes`` when not given.
        what_if: also try other settings and rank them.
        version: of PyTorch, for the settings to try.
        stage: called with what is done next.
    """
    memory = snapshot.devices[device]
    stage(_("checking the placements"))
    checked = _check(snapshot, memory)
    result = _as_recorded(memory, checked)
    if settings is not None or capacity_bytes is not None:
        stage(_("running it again"))
        _run_asked(result, checked, settings, capacity_bytes, total_bytes)
    if what_if:
        work = checked.work
        if capacity_bytes is None and memory.ooms:
            capacity_bytes = recorded_capacity(memory.segments, memory.recording)
            work = to_workload(memory.recording, checked.beginning, with_refused=True)
            result.warnings.append(
                _("a request was refused; other settings get the {size} that the driver had given or had left").format(
                    size=format_bytes(capacity_bytes)
                )
            )
        kept = run_workload(work, checked.settings, capacity_bytes=capacity_bytes, total_bytes=total_bytes)
        result.comparison = compare(
            work,
            checked.settings,
            kept,
            capacity_bytes=capacity_bytes,
            total_bytes=total_bytes,
            version=version,
            stage=stage,
        )
    return result


def _run_asked(
    result: Replay,
    checked: _Checked,
    settings: AllocatorSettings | None,
    capacity_bytes: int | None,
    total_bytes: int | None,
) -> None:
    """Put the figures of a run under other settings or a capacity in the place of the recorded ones."""
    recorded, work = checked.settings, checked.work
    asked = recorded
    if settings is not None:
        asked = replace(settings, padding_bytes=recorded.padding_bytes, alignment_bytes=recorded.alignment_bytes)
    afresh = settings is not None
    _use(result, run_workload(work, asked, afresh=afresh, capacity_bytes=capacity_bytes, total_bytes=total_bytes))
    if afresh and work.num_initial:
        result.warnings.append(
            _("{count} blocks are older than the recording; they are allocated anew, in the order of addresses").format(
                count=work.num_initial
            )
        )


def _check(snapshot: Snapshot, memory: DeviceMemory) -> _Checked:
    everything = [segment for one in snapshot.devices.values() for segment in one.segments]
    settings, notes = recorded_settings(snapshot.settings, memory.segments, everything)
    beginning = recover_beginning(memory.segments, memory.recording, settings)
    replayer = Replayer(memory.recording, beginning.segments, settings)
    replayer.run()
    replayer.compare_final(memory.segments)
    warnings = [*snapshot.warnings, *notes]
    if not len(memory.recording):
        warnings.append(_("the snapshot has no history of this device: {remedy}").format(remedy=how_to_record()))
    if beginning.num_inconsistent:
        warnings.append(
            _("{count} events do not fit the segments of the snapshot: it may be cut or of several runs").format(
                count=beginning.num_inconsistent
            )
        )
    return _Checked(
        settings=settings,
        work=to_workload(memory.recording, beginning.segments),
        beginning=beginning.segments,
        replayer=replayer,
        warnings=warnings,
    )


def _as_recorded(memory: DeviceMemory, checked: _Checked) -> Replay:
    """Return the figures of the recording itself; the simulator's where it followed to the end."""
    peaks = recorded_peaks(memory.segments, memory.recording, checked.settings)
    allocator, placement = checked.replayer.allocator, checked.replayer.placement
    if checked.exact:
        peaks.peak_allocated_bytes = allocator.peak_allocated
    else:
        checked.warnings.append(
            _("the simulator does not follow this recording ({why}); peaks are counted from its events").format(
                why=placement.first_difference or _("the final layout differs")
            )
        )
    return Replay(
        device=memory.device,
        settings=checked.settings,
        simulated=False,
        num_events=memory.num_events,
        peak_allocated_bytes=peaks.peak_allocated_bytes,
        peak_reserved_bytes=peaks.peak_reserved_bytes,
        final_reserved_bytes=peaks.final_reserved_bytes,
        num_segments_allocated=peaks.num_segments_allocated,
        num_maps=peaks.num_maps,
        placement=placement,
        final=fragmentation(memory.segments),
        at_peak=_at_peak(checked),
        pinned_by=pins(memory.segments),
        stacks=memory.stacks,
        warnings=checked.warnings,
    )


def _at_peak(checked: _Checked) -> Fragmentation | None:
    """Return where the memory was when it last had to grow: run again up to there."""
    if not checked.exact or not checked.work.codes:
        return None
    step = run_workload(checked.work, checked.settings).peak_step
    if step < 0:
        return None
    stopped = run_workload(checked.work, checked.settings, stop_after=step + 1)
    return fragmentation(layout_of(stopped.allocator), checked.settings.large_segment_size_bytes)


def _use(result: Replay, outcome: Outcome) -> None:
    """Put the figures of a run in the place of the recorded ones."""
    result.simulated, result.outcome, result.settings = True, outcome, outcome.settings
    result.peak_allocated_bytes = outcome.peak_allocated_bytes
    result.peak_reserved_bytes = outcome.peak_reserved_bytes
    result.final_reserved_bytes = outcome.final_reserved_bytes
    result.num_segments_allocated = outcome.counters.num_segments_allocated
    result.num_maps = outcome.counters.num_maps
    result.death = outcome.death
    result.at_peak = None
    layout = layout_of(outcome.allocator)
    result.final = fragmentation(layout, outcome.settings.large_segment_size_bytes)
    result.warnings.extend(outcome.settings.warnings)
