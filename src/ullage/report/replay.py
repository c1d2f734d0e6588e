"""A replay as JSON and as text for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ullage.allocator.metrics import Fragmentation, Pin, stack_of
from ullage.allocator.run import Death, Outcome
from ullage.allocator.session import Replay
from ullage.allocator.what_if import Comparison
from ullage.i18n import _
from ullage.units import format_bytes

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA_VERSION = 1
MAX_STACK = 8


def replay_json(replay: Replay) -> dict[str, Any]:
    """Return a replay as plain values; sizes are bytes."""
    final, placement = replay.final, replay.placement
    return {
        "schema_version": SCHEMA_VERSION,
        "device": replay.device,
        "settings": replay.settings.text,
        "simulated": replay.simulated,
        "num_events": replay.num_events,
        "peak_allocated_bytes": replay.peak_allocated_bytes,
        "peak_reserved_bytes": replay.peak_reserved_bytes,
        "final_reserved_bytes": replay.final_reserved_bytes,
        "num_segments_allocated": replay.num_segments_allocated,
        "num_maps": replay.num_maps,
        "placement": {
            "checked": placement.checked,
            "equal": placement.equal,
            "final_segments": placement.final_segments,
            "final_equal": placement.final_equal,
            "first_difference": placement.first_difference or None,
        },
        "fragmentation": {
            "utilisation": replay.utilisation,
            "rate": 1 - replay.utilisation,
            **_fragmentation_json(final),
            "at_peak": None if replay.at_peak is None else _fragmentation_json(replay.at_peak),
        },
        "pinned_by": [_pin_json(pin, replay) for pin in replay.pinned_by],
        "death": _death_json(replay.death),
        "what_if": _what_if_json(replay.comparison),
        "what_if_capacity_bytes": None if replay.comparison is None else replay.comparison.capacity_bytes,
        "advice": _advice(replay.comparison),
        "warnings": replay.warnings,
    }


def _fragmentation_json(found: Fragmentation) -> dict[str, Any]:
    return {
        "internal": found.internal,
        "releasable_bytes": found.releasable_bytes,
        "pinned_bytes": found.pinned_bytes,
        "in_use_bytes": found.in_use_bytes,
        "requested_bytes": found.requested_bytes,
        "reserved_bytes": found.reserved_bytes,
    }


def _pin_json(pin: Pin, replay: Replay) -> dict[str, Any]:
    from ullage.observe.snapshot import python_frames

    return {
        "segment_address": pin.address,
        "segment_bytes": pin.size_bytes,
        "pinned_bytes": pin.pinned_bytes,
        "num_blocks": pin.num_blocks,
        "block_address": pin.block.address,
        "block_bytes": pin.block.size_bytes,
        "stack": python_frames(stack_of(pin, replay.stacks), limit=MAX_STACK),
    }


def _death_json(death: Death | None) -> dict[str, int] | None:
    if death is None:
        return None
    return {
        "allocation": death.step,
        "requested_bytes": death.requested_bytes,
        "reserved_bytes": death.reserved_bytes,
        "allocated_bytes": death.allocated_bytes,
        "limit_bytes": death.limit_bytes,
    }


def _what_if_json(comparison: Comparison | None) -> list[dict[str, Any]]:
    if comparison is None:
        return []
    return [_outcome_json(outcome, comparison) for outcome in (comparison.baseline, *comparison.outcomes)]


def _outcome_json(outcome: Outcome, comparison: Comparison) -> dict[str, Any]:
    return {
        "settings": outcome.settings.text,
        "peak_reserved_bytes": outcome.peak_reserved_bytes,
        "peak_allocated_bytes": outcome.peak_allocated_bytes,
        "final_reserved_bytes": outcome.final_reserved_bytes,
        "gain_bytes": comparison.gain_bytes(outcome),
        "num_segments_allocated": outcome.num_segments_allocated,
        "num_driver_calls": outcome.counters.num_driver_calls,
        "num_retries": outcome.counters.num_retries,
        "death": _death_json(outcome.death),
        "baseline": outcome is comparison.baseline,
        "worth_it": outcome in comparison.better,
    }


def _advice(comparison: Comparison | None) -> list[dict[str, Any]]:
    """Return the best change that is worth making, if there is one."""
    if comparison is None or not comparison.better:
        return []
    best = comparison.better[0]
    return [
        {
            "change": f"PYTORCH_ALLOC_CONF={best.settings.text}",
            "gain_bytes": comparison.gain_bytes(best) if comparison.baseline.death is None else 0,
            "cost": _("{calls} calls of the driver instead of {before}").format(
                calls=best.counters.num_driver_calls, before=comparison.baseline.counters.num_driver_calls
            ),
            "warnings": list(best.settings.warnings),
        }
    ]


def print_replay(replay: Replay, console: Console | None = None) -> None:
    """Print a replay on stdout."""
    from rich.console import Console

    out = console or Console(highlight=False)
    _print_head(out, replay)
    _print_sizes(out, replay)
    _print_pins(out, replay)
    if replay.comparison is not None:
        _print_what_if(out, replay.comparison)
    for sentence in replay.warnings:
        out.print(f"! {sentence}", markup=False, style="yellow")


def _print_head(out: Console, replay: Replay) -> None:
    placement = replay.placement
    if replay.death is not None:
        what = _("dies at allocation {number}: {size} asked for, {reserved} of {limit} reserved").format(
            number=replay.death.step,
            size=format_bytes(replay.death.requested_bytes),
            reserved=format_bytes(replay.death.reserved_bytes),
            limit=format_bytes(replay.death.limit_bytes),
        )
        out.print(f"✘ {what}", markup=False, style="bold red")
    else:
        peak = _("peak {reserved} reserved, {allocated} of it allocated").format(
            reserved=format_bytes(replay.peak_reserved_bytes), allocated=format_bytes(replay.peak_allocated_bytes)
        )
        out.print(f"✔ {peak}", markup=False, style="bold green")
    out.print(
        "  "
        + _("device {device}, {events} events, settings: {settings}").format(
            device=replay.device, events=f"{replay.num_events:,}", settings=replay.settings.text or _("defaults")
        ),
        markup=False,
    )
    out.print(
        "  "
        + _("checked: {equal} of {checked} placements, {final} of {segments} final segments are as recorded").format(
            equal=f"{placement.equal:,}",
            checked=f"{placement.checked:,}",
            final=f"{placement.final_equal:,}",
            segments=f"{placement.final_segments:,}",
        ),
        markup=False,
    )


def _print_sizes(out: Console, replay: Replay) -> None:
    final = replay.final
    taken = replay.num_segments_allocated + replay.num_maps
    rows = [
        (_("reserved at the end"), format_bytes(replay.final_reserved_bytes), ""),
        (
            _("in use at the end"),
            format_bytes(final.in_use_bytes),
            _("{share} lost to rounding").format(share=_percent(final.internal)),
        ),
        (_("free, releasable"), format_bytes(final.releasable_bytes), _("empty_cache() gives it back")),
        (_("free, pinned"), format_bytes(final.pinned_bytes), _("in segments that some block keeps")),
        (_("utilisation"), _percent(replay.utilisation), _("peak allocated / peak reserved")),
        (_("taken from the driver"), f"{taken:,} x", ""),
    ]
    if replay.at_peak is not None:
        unused = replay.at_peak.releasable_bytes + replay.at_peak.pinned_bytes
        rows.append((_("free when it grew last"), format_bytes(unused), _("and yet nothing fitted")))
    out.print()
    for name, value, remark in rows:
        out.print(f"  {name:<24} {value:>12}  {remark}".rstrip(), markup=False)


def _print_pins(out: Console, replay: Replay) -> None:
    from ullage.observe.snapshot import python_frames

    if not replay.pinned_by:
        return
    out.print("\n" + _("What pins most"), style="bold")
    for pin in replay.pinned_by[:5]:
        line = _("{pinned} of {segment} at {address:#x}, kept by {count} blocks, the smallest {size}").format(
            pinned=format_bytes(pin.pinned_bytes),
            segment=format_bytes(pin.size_bytes),
            address=pin.address,
            count=pin.num_blocks,
            size=format_bytes(pin.block.size_bytes),
        )
        out.print(f"  {line}", markup=False)
        for frame in python_frames(stack_of(pin, replay.stacks), limit=2):
            out.print(f"      {frame}", markup=False, style="dim", soft_wrap=True)


def _print_what_if(out: Console, comparison: Comparison) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column(_("settings"), no_wrap=True, overflow="fold")
    for heading in (_("peak reserved"), _("gain"), _("driver calls")):
        table.add_column(heading, justify="right", no_wrap=True)
    for outcome in (comparison.baseline, *comparison.outcomes):
        name = outcome.settings.text or _("defaults")
        if outcome is comparison.baseline:
            name = _("{name} (recorded)").format(name=name)
        peak = _("dies") if outcome.death else format_bytes(outcome.peak_reserved_bytes)
        gain = format_bytes(comparison.gain_bytes(outcome)) if outcome is not comparison.baseline else ""
        table.add_row(name, peak, "" if outcome.death else gain, f"{outcome.counters.num_driver_calls:,}")
    out.print("\n" + _("Under other settings"), style="bold")
    out.print(table)
    for entry in _advice(comparison):
        out.print(f"→ {entry['change']}  ({entry['cost']})", markup=False, style="bold")
    if not comparison.better:
        out.print(_("None gains enough to be worth a change."), markup=False)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
