"""A bench as one page: the break point, the phases, the curves of memory, the tries, the steps or waves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ullage.bench.outcome import BenchResult, Phase
from ullage.i18n import _
from ullage.report.bench_text import (
    break_sentence,
    cause_word,
    machine_line,
    phase_columns,
    phase_row,
    phase_word,
    stability_lines,
)
from ullage.units import format_bytes

#: Ranks whose curves are drawn; more would hide each other.
MAX_RANKS = 8


def write_bench_page(path: Path, result: BenchResult) -> None:
    """Write the page.

    Raises:
        MissingExtraError: the packages of the page are not installed.
    """
    from ullage.report.html.page import Section, Table, write_page

    said = break_sentence(result.break_point) if result.break_point else ""
    rows = [phase_row(result.kind, phase) for phase in result.phases]
    sections = [
        Section(
            heading=_("Phases"),
            text=" ".join(f"{line}." for line in stability_lines(result)),
            table=Table(columns=[_("phase"), *phase_columns(result.kind)], rows=rows),
        )
    ]
    sections += [
        Section(heading=_("Memory: {phase}").format(phase=phase_word(phase.name)), figure=memory_figure(phase))
        for phase in result.phases
        if any(rank.curve for rank in phase.ranks)
    ]
    sections += [
        Section(heading=_("Times: {phase}").format(phase=phase_word(phase.name)), figure=times_figure(phase))
        for phase in result.phases
        if phase.name == "changing_load" and (phase.steps or phase.waves)
    ]
    if result.break_point is not None:
        tries = [
            [
                f"{one.size:,}",
                _("lives") if one.lives else cause_word(one.cause),
                f"{one.seconds:,.1f} s",
                format_bytes(one.peak_bytes) if one.peak_bytes else "–",
            ]
            for one in result.break_point.tries
        ]
        columns = [_("size"), _("outcome"), _("took"), _("peak")]
        sections.append(Section(heading=_("Search of the break point"), table=Table(columns=columns, rows=tries)))
    title = _("Bench of training") if result.kind == "train" else _("Bench of serving")
    subtitle = " – ".join(part for part in (said, machine_line(result), result.started) if part)
    write_page(path, title=title, subtitle=subtitle, sections=sections)


def memory_figure(phase: Phase) -> dict[str, Any]:
    """Return curves of used, reserved and allocated bytes over time."""
    traces = []
    for rank in phase.ranks[:MAX_RANKS]:
        for name, field in (
            (_("used"), "used_bytes"),
            (_("reserved"), "reserved_bytes"),
            (_("allocated"), "allocated_bytes"),
        ):
            values = [getattr(sample, field) for sample in rank.curve]
            if not values or values[0] is None:
                continue
            label = f"{name}, {_('rank')} {rank.rank}" if len(phase.ranks) > 1 else name
            times = [sample.t for sample in rank.curve]
            traces.append(
                {"type": "scatter", "mode": "lines", "name": label, "x": times, "y": [one / 2**20 for one in values]}
            )
    return {"data": traces, "layout": _layout(_("MiB"))}


def times_figure(phase: Phase) -> dict[str, Any]:
    """Return the time of each step, or of the first token and the gap between tokens of each wave."""
    if phase.steps:
        labels = [f"{row.label} {row.micro_batch} x {row.seq}" for row in phase.steps]
        bars = {
            "type": "bar",
            "name": _("step time"),
            "x": [row.t for row in phase.steps],
            "y": [row.seconds for row in phase.steps],
            "text": labels,
        }
        return {"data": [bars], "layout": _layout(_("seconds"))}
    lines = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": [wave["t"] for wave in phase.waves],
            "y": [wave[field] for wave in phase.waves],
            "text": [f"{wave['label']} {wave['concurrency']} x {wave['prompt_tokens']}" for wave in phase.waves],
        }
        for name, field in ((_("TTFT p95"), "ttft_p95_seconds"), (_("between tokens p50"), "inter_token_p50_seconds"))
    ]
    return {"data": lines, "layout": _layout(_("seconds"))}


def _layout(title: str) -> dict[str, Any]:
    return {
        "xaxis": {"title": {"text": _("seconds since the start of the phase")}},
        "yaxis": {"title": {"text": title}},
    }
