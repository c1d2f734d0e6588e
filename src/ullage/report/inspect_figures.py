"""Figures of an inspection as plain plotly dicts: aggregated before, so that a page stays small."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ullage.i18n import _
from ullage.ledger import Term
from ullage.observe.measured import Series
from ullage.units import GiB, KiB, MiB, format_bytes

if TYPE_CHECKING:
    from ullage.observe.snapshot_answer import Answer

#: Told apart with every common kind of colour blindness (Okabe and Ito 2008), and with names beside them.
COLOURS = {
    "weights": "#0072b2", "optimizer_states": "#56b4e9", "gradients": "#009e73", "activations": "#e69f00",
    "temporaries": "#d55e00", "kv_cache": "#cc79a7", "workspace": "#b8a800", "collectives": "#7a5195",
    "graph_pools": "#a0522d", "kept": "#e15759", "other": "#8c8c8c", "unknown": "#b0b0b0", "unused": "#c9ced6",
    "releasable": "#c9ced6", "pinned": "#7f8794", "awaiting_free": "#999999",
}  # fmt: skip
#: What stays lies below what comes and goes.
_FROM_BELOW = (
    "weights", "optimizer_states", "kv_cache", "workspace", "graph_pools", "kept", "other", "unknown", "collectives",
    "gradients", "activations", "temporaries",
)  # fmt: skip
MAX_LINES = 60
MAX_SERIES = 40


def scale_of(largest: int) -> tuple[int, str]:
    """Return the unit in which a largest amount reads well."""
    return next(((unit, name) for unit, name in ((GiB, "GiB"), (MiB, "MiB")) if largest >= 2 * unit), (KiB, "KiB"))


def terms_figure(terms: Sequence[Term]) -> dict[str, Any]:
    """Return bars, the first term at the top."""
    unit, name = scale_of(max((term.bytes for term in terms), default=0))
    shown = [term for term in terms if term.bytes > 0]
    return {
        "data": [
            {
                "type": "bar",
                "orientation": "h",
                "x": [round(term.bytes / unit, 4) for term in shown],
                "y": [term.name.replace("_", " ") for term in shown],
                "text": [format_bytes(term.bytes) for term in shown],
                "textposition": "auto",
                "marker": {"color": [COLOURS.get(term.name, "#0072b2") for term in shown]},
                "hovertemplate": "%{y}: %{text}<extra></extra>",
            }
        ],
        "layout": {
            "height": 90 + 32 * len(shown),
            "xaxis": {"title": {"text": name}},
            "yaxis": {"autorange": "reversed"},
            "margin": {"l": 130, "r": 20, "t": 10, "b": 45},
        },
    }


def timeline_figure(answer: Answer) -> dict[str, Any]:
    """Return allocated memory by category, stacked, with the reserved memory, the peak and the steps."""
    line = answer.timeline
    unit, name = scale_of(max(answer.lives.peak_reserved[1], answer.lives.peak_bytes))
    x = line.events
    times = [_("{seconds:.3f} s").format(seconds=each) for each in line.seconds]
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "stackgroup": "allocated",
            "name": category.replace("_", " "),
            "x": x,
            "y": [_amount(size, unit) for size in column],
            "line": {"width": 0.5, "color": COLOURS[category], "shape": "hv"},
            "hovertemplate": f"%{{y:.3f}} {name}",
        }
        for category, column in sorted(line.categories.items(), key=lambda pair: _FROM_BELOW.index(pair[0]))
    ]
    data.append(
        {
            "type": "scatter", "mode": "lines", "name": _("reserved"), "x": x,
            "y": [_amount(size, unit) for size in line.reserved],
            "line": {"width": 1.5, "dash": "dot", "color": "#8c8c8c", "shape": "hv"},
            "hovertemplate": f"%{{y:.3f}} {name}" + ("<br>%{text}" if times else ""), "text": times,
        }
    )  # fmt: skip
    return {
        "data": data,
        "layout": {
            "height": 460,
            "hovermode": "x unified",
            "xaxis": {"title": {"text": _("event")}},
            "yaxis": {"title": {"text": name}, "rangemode": "tozero"},
            "shapes": _step_lines(answer, x),
            "annotations": _peak_mark(answer, x, unit),
        },
    }


def _amount(size: int, unit: int) -> float:
    return round(size / unit, 4)


def _x_of(answer: Answer, x: list[int], event: int) -> int | None:
    """Return where an event stands: at the first column that is not before it."""
    for at, shown in enumerate(answer.timeline.events):
        if shown >= event:
            return x[at]
    return None


def _step_lines(answer: Answer, x: list[int]) -> list[dict[str, Any]]:
    ends = answer.leak.boundaries
    if len(ends) > MAX_LINES:
        return []
    places = [_x_of(answer, x, event) for event in ends]
    line = {"width": 1, "dash": "dash", "color": "#8c8c8c"}
    return [
        {"type": "line", "x0": at, "x1": at, "yref": "paper", "y0": 0, "y1": 1, "line": line, "opacity": 0.6}
        for at in places
        if at is not None
    ]


def _peak_mark(answer: Answer, x: list[int], unit: int) -> list[dict[str, Any]]:
    lives = answer.lives
    at = _x_of(answer, x, lives.peak_at) if lives.peak_at >= 0 else None
    if at is None:
        return []
    text = _("peak {size}").format(size=format_bytes(lives.peak_bytes))
    return [{"x": at, "y": _amount(lives.peak_bytes, unit), "text": text, "showarrow": True, "arrowhead": 2, "ay": -28}]


def map_figure(answer: Answer) -> dict[str, Any]:
    """Return the segments with most free memory as rows, dark where they are in use."""
    sizes = {f"{segment.address:#x}": segment.size_bytes for segment in answer.memory.segments}
    names = [f"{name} · {format_bytes(sizes[name])}" for name, _cells in answer.map]
    return {
        "data": [
            {
                "type": "heatmap",
                "z": [cells for _name, cells in answer.map],
                "y": names,
                "zmin": 0,
                "zmax": 1,
                "colorscale": [[0, "#e8edf3"], [0.001, "#bcd9ee"], [1, "#0b4f82"]],
                "colorbar": {"title": {"text": _("in use")}, "tickformat": ".0%"},
                "hovertemplate": "%{y}<br>%{z:.0%}<extra></extra>",
                "xgap": 0,
                "ygap": 1,
            }
        ],
        "layout": {
            "height": 120 + 14 * len(names),
            "yaxis": {"autorange": "reversed", "tickfont": {"size": 10}},
            "xaxis": {"showticklabels": False, "title": {"text": _("from the segment's beginning to its end")}},
            "margin": {"l": 190, "r": 20, "t": 10, "b": 40},
        },
    }


def curves(series: Sequence[Series]) -> list[tuple[str, dict[str, Any]]]:
    """Return one figure for the curves in bytes, and one for each other unit."""
    groups: dict[tuple[bool, str], list[Series]] = {}
    for each in series[:MAX_SERIES]:
        if each.points:
            groups.setdefault((each.name.endswith("_bytes"), each.x_unit), []).append(each)
    found = []
    for (in_bytes, x_unit), members in groups.items():
        heading = _("memory") if in_bytes else ", ".join(one.name.replace("_", " ") for one in members[:3])
        found.append((heading, _curves(members, x_unit, in_bytes=in_bytes)))
    return found


def _curves(members: list[Series], x_unit: str, *, in_bytes: bool) -> dict[str, Any]:
    largest = max(point[1] for each in members for point in each.points)
    unit, name = scale_of(largest) if in_bytes else (1, "")
    words = {"s": _("seconds"), "step": _("step"), "event": _("event")}
    return {
        "data": [
            {
                "type": "scatter",
                "mode": "lines",
                "name": each.name.removesuffix("_bytes").replace("_", " "),
                "x": [point[0] for point in each.points],
                "y": [round(point[1] / unit, 4) for point in each.points],
            }
            for each in members
        ],
        "layout": {
            "hovermode": "x unified",
            "xaxis": {"title": {"text": words.get(x_unit, x_unit)}},
            "yaxis": {"title": {"text": name}, "rangemode": "tozero"},
        },
    }
