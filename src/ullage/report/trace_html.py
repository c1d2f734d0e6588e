"""A trace as a page: memory by category over the events, and what the peak is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ullage.i18n import _
from ullage.report.html.page import Section, Table, write_page
from ullage.report.trace_json import phase_peaks
from ullage.report.trace_text import layer_groups
from ullage.trace.recorder.events import CATEGORIES, Trace
from ullage.trace.result import TraceResult
from ullage.units import GiB, format_bytes

#: Points of the timeline: of each stretch of events its fullest moment is drawn.
POINTS = 2000
ROWS = 200


def write_trace_page(path: Path, result: TraceResult) -> None:
    """Write the page."""
    place = result.peak_place
    write_page(
        path,
        title=_("Peak {allocated} allocated, {reserved} reserved").format(
            allocated=format_bytes(result.peak_allocated_bytes), reserved=format_bytes(result.peak_reserved_bytes)
        ),
        subtitle=_("{name}: {phase} of step {step}, {module}").format(
            name=result.name, phase=place.phase, step=place.step, module=place.module or _("no module")
        ),
        sections=[
            Section(
                heading=_("Memory over the events"),
                text=_("Bytes asked for, by what they are for; of each stretch of events the fullest moment."),
                figure=_figure(result),
                alt=_("allocated memory by category over the events of the step"),
            ),
            Section(heading=_("At the peak"), table=_peak_table(result)),
            Section(heading=_("Peak of each phase"), table=_phase_table(result)),
        ],
        notes=result.warnings,
    )


def _figure(result: TraceResult) -> dict[str, Any]:
    at, series = timeline(result.trace)
    return {
        "data": [
            {
                "type": "scatter",
                "mode": "lines",
                "stackgroup": "memory",
                "name": category.replace("_", " "),
                "x": at,
                "y": [round(size / GiB, 4) for size in sizes],
                "line": {"width": 0.5},
            }
            for category, sizes in series.items()
        ],
        "layout": {"xaxis": {"title": {"text": _("event")}}, "yaxis": {"title": {"text": "GiB"}}},
    }


def timeline(trace: Trace, points: int = POINTS) -> tuple[list[int], dict[str, list[int]]]:
    """Return (events, category -> bytes at them): of each stretch of events its fullest moment."""
    stride = max(1, len(trace.events) // points)
    order = {name: index for index, name in enumerate(CATEGORIES)}
    now, total = [0] * len(CATEGORIES), 0
    best, best_at, best_total = list(now), 0, -1
    at: list[int] = []
    rows: list[list[int]] = []
    for index, event in enumerate(trace.events):
        one = trace.allocations[event if event >= 0 else ~event]
        size = one.size_bytes if event >= 0 else -one.size_bytes
        now[order[one.category]] += size
        total += size
        if total > best_total:
            best, best_at, best_total = list(now), index, total
        if (index + 1) % stride == 0 or index + 1 == len(trace.events):
            at.append(best_at)
            rows.append(best)
            best_total = -1
    used = [name for name, index in order.items() if any(row[index] for row in rows)]
    return at, {name: [row[order[name]] for row in rows] for name in used}


def _peak_table(result: TraceResult) -> Table:
    groups = layer_groups(result)
    rows = [
        (category.replace("_", " "), what, shape, count, format_bytes(size))
        for category, what, shape, count, size in groups[:ROWS]
    ]
    rest = sum(group[4] for group in groups[ROWS:])
    if rest:
        rows.append(("", _("all others"), "", sum(group[3] for group in groups[ROWS:]), format_bytes(rest)))
    return Table(columns=(_("category"), _("tensor"), _("shape"), _("count"), _("bytes")), rows=rows)


def _phase_table(result: TraceResult) -> Table:
    return Table(
        columns=(_("step"), _("phase"), _("peak")),
        rows=[(step, phase, format_bytes(size)) for (step, phase), size in phase_peaks(result).items()],
    )
