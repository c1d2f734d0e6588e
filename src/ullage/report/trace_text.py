"""A trace as text: the peak first, then what it is made of, then the phases."""

from __future__ import annotations

import re

from rich.console import Console
from rich.table import Table

from ullage.i18n import _
from ullage.report.trace_json import phase_peaks
from ullage.trace.result import TraceResult
from ullage.units import format_bytes

#: Lines of the table of tensors.
LARGEST = 12


def print_trace(result: TraceResult, console: Console | None = None, *, largest: int = LARGEST) -> None:
    """Print a trace on stdout."""
    out = console or Console(highlight=False)
    place = result.peak_place
    where = _("{phase} of step {step}").format(phase=place.phase, step=place.step)
    if place.module:
        where += _(", in {module}").format(module=place.module)
    out.print(
        _("peak {allocated} allocated, {reserved} reserved: {where}").format(
            allocated=format_bytes(result.peak_allocated_bytes),
            reserved=format_bytes(result.peak_reserved_bytes),
            where=where,
        ),
        style="bold",
        markup=False,
        soft_wrap=True,
    )
    out.print(_summary(result), markup=False, soft_wrap=True)
    _print_categories(result, out)
    _print_tensors(result, out, largest)
    _print_phases(result, out)
    for warning in result.warnings:
        out.print(f"! {warning}", style="yellow", markup=False, soft_wrap=True)


def _summary(result: TraceResult) -> str:
    words = _("{name}: {count:,} parameters, {events:,} events in {seconds:.1f} s").format(
        name=result.name, count=result.num_parameters, events=len(result.trace.events), seconds=result.seconds
    )
    if result.num_layers_traced:
        words += _("; {traced} of {layers} layers run, the others repeat them").format(
            traced=result.num_layers_traced, layers=result.num_layers
        )
    return words


def _print_categories(result: TraceResult, out: Console) -> None:
    total = max(1, sum(result.categories().values()))
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    table.add_column(_("at the peak"))
    table.add_column("", justify="right")
    table.add_column("", justify="right")
    for category, size in sorted(result.categories().items(), key=lambda each: -each[1]):
        table.add_row(category.replace("_", " "), format_bytes(size), f"{100 * size / total:.1f} %")
    out.print(table)


def layer_groups(result: TraceResult) -> list[tuple[str, str, str, int, int]]:
    """Return (category, what, shape, count, bytes) at the peak, layers of a stack taken together, largest first."""
    found: dict[tuple[str, str, str], list[int]] = {}
    for each in result.peak_tensors():
        what = re.sub(r"\.\d+\.", ".*.", each.owner or f"{each.module} ({each.op})")
        shape = "x".join(map(str, each.shape)) + (f" {each.dtype}" if each.dtype else "")
        sums = found.setdefault((each.category, what, shape), [0, 0])
        sums[0] += each.count
        sums[1] += each.total_bytes
    rows = [(category, what, shape, count, size) for (category, what, shape), (count, size) in found.items()]
    return sorted(rows, key=lambda row: -row[4])


def _print_tensors(result: TraceResult, out: Console, largest: int) -> None:
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    for name, justify in (("category", "left"), ("tensor", "left"), ("shape", "left"), ("x", "right"), ("", "right")):
        table.add_column(_(name) if name else "", justify="right" if justify == "right" else "left", overflow="fold")
    for category, what, shape, count, size in layer_groups(result)[:largest]:
        table.add_row(category.replace("_", " "), what, shape, str(count), format_bytes(size))
    out.print(table)


def _print_phases(result: TraceResult, out: Console) -> None:
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    table.add_column(_("step"))
    table.add_column(_("phase"))
    table.add_column(_("peak"), justify="right")
    for (step, phase), size in phase_peaks(result).items():
        table.add_row(str(step), phase, format_bytes(size))
    out.print(table)
