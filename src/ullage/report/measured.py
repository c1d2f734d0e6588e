"""Curves, tables and metrics of an inspection, as JSON and as text."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape

from ullage.i18n import _
from ullage.observe.inspection import Inspection
from ullage.observe.measured import Cell, Listing
from ullage.units import format_bytes

MAX_TEXT_ROWS = 10
_WIDTH = 44


def measured_json(found: Inspection) -> dict[str, Any]:
    """Return ``metrics``, ``series`` and ``listings`` as plain values."""
    return {
        "metrics": dict(found.metrics),
        "series": [
            {"name": each.name, "x_unit": each.x_unit, "points": [list(point) for point in each.points]}
            for each in found.series
        ],
        "listings": [
            {
                "name": each.name,
                "title": each.title,
                "columns": list(each.columns),
                "rows": [list(row) for row in each.rows],
            }
            for each in found.listings
        ],
    }


def print_measured(found: Inspection, out: Console) -> None:
    """Print the metrics in one line and the first rows of each table."""
    if found.metrics:
        words = [f"{_bare(name)} {format_cell(name, value)}" for name, value in found.metrics]
        out.print("\n  " + escape(", ".join(words)), style="dim", soft_wrap=True)
    for listing in found.listings:
        if listing.rows:
            print_listing(listing, out)


def print_listing(listing: Listing, out: Console) -> None:
    """Print the first rows of one table."""
    out.print("\n" + listing.title, style="bold", markup=False)
    shown = [column for column in listing.columns if _is_shown(listing, column)]
    rows = listing.rows[:MAX_TEXT_ROWS]
    cells_of = ([format_cell(column, listing.of(row, column))[:_WIDTH] for column in shown] for row in rows)
    lines = [[_bare(column) for column in shown], *cells_of]
    widths = [max(len(line[at]) for line in lines) for at in range(len(shown))]
    for number, line in enumerate(lines):
        cells = [
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        style = "dim" if number == 0 else ""
        out.print("  " + "  ".join(cells).rstrip(), markup=False, style=style, soft_wrap=True)
    if len(listing.rows) > MAX_TEXT_ROWS:
        more = len(listing.rows) - MAX_TEXT_ROWS
        out.print("  " + _("{count} more rows with --json").format(count=more), style="dim", markup=False)


def _is_shown(listing: Listing, column: str) -> bool:
    return any(listing.of(row, column) not in (None, "") for row in listing.rows)


def _bare(name: str) -> str:
    if name.endswith("_per_s"):
        return _("speed")
    for unit in ("_bytes", "_us", "_flops"):
        name = name.removesuffix(unit)
    return name.replace("_", " ")


def format_cell(column: str, value: Cell) -> str:
    """Return a value for people, by the unit at the end of the column's name."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if column.startswith("change") and value > 0:
        return "+" + format_cell(column.removeprefix("change"), value)
    if column.endswith("_bytes"):
        return format_bytes(value)
    if column.endswith("bytes_per_s"):
        return f"{value / 1e9:,.1f} GB/s"
    if column.endswith("flops_per_s"):
        return f"{value / 1e12:,.2f} TFLOP/s"
    if column.endswith("_us"):
        return f"{value / 1e3:,.2f} ms"
    if column.endswith(("_share", "_rate", "_utilisation")):
        return f"{100 * value:.1f} %"
    if column.endswith("_flops"):
        return f"{value / 1e9:,.2f} GFLOP"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
