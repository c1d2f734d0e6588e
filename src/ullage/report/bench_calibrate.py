"""A calibration profile as text: what was measured with its spread, and the steps beside the closed form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ullage.i18n import _
from ullage.units import format_bytes


def print_profile(profile: Mapping[str, Any], path: Path, console: Console | None = None) -> None:
    """Print a profile on stdout."""
    out = console or Console(highlight=False)
    software = profile["software"]
    said = ", ".join(f"{name} {software[name]}" for name in ("driver", "cuda", "torch", "nccl") if software.get(name))
    out.print(f"✔ {profile['gpu']['reported']} ({said})", markup=False, style="bold green", soft_wrap=True)
    out.print("  " + _("written to {path}").format(path=path), markup=False, soft_wrap=True)
    out.print()
    table = _table((_("figure"), _("median"), _("least"), _("most"), _("samples")))
    for name, figure in profile["figures"].items():
        values = [amount(figure[key], figure["unit"]) for key in ("value", "low", "high")]
        table.add_row(name, *values, str(figure["num_samples"]))
    out.print(table)
    if profile["steps"]:
        out.print()
        out.print(_steps(profile["steps"]))
    died = [f"{step['case']}: {step['died']}" for step in profile["steps"] if step["died"]]
    for note in (*died, *profile["notes"]):
        out.print(f"! {note}", markup=False, style="yellow", soft_wrap=True)


def amount(value: float, unit: str) -> str:
    """Return an amount with its unit."""
    if unit == "bytes":
        return format_bytes(value)
    return f"{value / 1e12:,.2f} T{'B/s' if unit == 'bytes/s' else 'FLOP/s'}"


def _steps(steps: list[dict[str, Any]]) -> Table:
    table = _table((_("step"), _("allocated"), _("fit says"), _("reserved"), _("fit says")))
    for step in steps:
        if step["died"]:
            continue
        allocated, reserved = step["max_allocated_bytes"], step["max_reserved_bytes"]
        foretold = step["closed_form"]
        table.add_row(
            escape(step["case"]),
            format_bytes(allocated),
            _error(foretold.get("max_allocated"), allocated),
            format_bytes(reserved),
            _error(foretold.get("max_reserved"), reserved),
        )
    return table


def _error(foretold: float | None, measured: float) -> str:
    return "–" if foretold is None or not measured else f"{100 * (foretold / measured - 1):+.1f} %"


def _table(titles: tuple[str, ...]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for at, title in enumerate(titles):
        table.add_column(title, justify="left" if at == 0 else "right", no_wrap=at == 0)
    return table
