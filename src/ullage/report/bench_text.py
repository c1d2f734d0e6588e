"""A bench as text: the break point first, then the three phases, then what changing load does."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ullage.bench.outcome import BenchResult, Phase
from ullage.bench.search import BreakPoint
from ullage.i18n import _
from ullage.units import format_bytes


def phase_word(name: str) -> str:
    """Return the phase for people."""
    return {"idle": _("idle"), "full_load": _("full load"), "changing_load": _("changing load")}[name]


def cause_word(cause: str) -> str:
    """Return why a size died, for people."""
    words = {
        "memory": _("out of memory"),
        "killed": _("killed"),
        "timeout": _("out of time"),
        "errors": _("requests failed"),
        "latency": _("latency"),
        "throughput": _("no more throughput"),
        "cap": _("the largest that was asked for"),
    }
    return words.get(cause, cause)


def break_sentence(found: BreakPoint) -> str:
    """Return the break point in one sentence."""
    unit = _("micro-batch") if found.unit == "micro_batch" else _("requests at a time")
    if found.largest < 1:
        return _("not even the smallest lives: {cause}").format(cause=cause_word(found.limited_by))
    if found.smallest_failing is None:
        return _("{unit}: {largest:,} lives, and no more was tried").format(unit=unit, largest=found.largest)
    return _("{unit}: {largest:,} lives, {failing:,} does not ({cause})").format(
        unit=unit, largest=found.largest, failing=found.smallest_failing, cause=cause_word(found.limited_by)
    )


def print_bench(result: BenchResult, console: Console | None = None) -> None:
    """Print a bench on stdout."""
    out = console or Console(highlight=False)
    if result.break_point is not None:
        alive = result.break_point.largest >= 1
        style = "bold green" if alive else "bold red"
        out.print(f"{'✔' if alive else '✘'} {break_sentence(result.break_point)}", markup=False, style=style)
    out.print(f"  {machine_line(result)}", markup=False, style="dim", soft_wrap=True)
    out.print()
    out.print(_table([_("phase"), *phase_columns(result.kind)], [phase_row(result.kind, one) for one in result.phases]))
    lines = stability_lines(result)
    if lines:
        out.print(f"\n[bold]{_('Changing load')}[/bold]")
    for line in lines:
        out.print(f"  {line}", markup=False)
    for phase in result.phases:
        if phase.died is not None:
            line = _("{phase} ended early: {detail}").format(phase=phase_word(phase.name), detail=phase.died["detail"])
            out.print(f"! {line}", markup=False, style="yellow", soft_wrap=True)
    for warning in result.warnings:
        out.print(f"! {warning}", markup=False, style="yellow", soft_wrap=True)


def machine_line(result: BenchResult) -> str:
    """Return what it ran on."""
    machine = result.machine
    words = [str(machine[name]) for name in ("name", "url", "model") if machine.get(name)]
    if machine.get("num_ranks", 1) > 1:
        words.append(_("{count} ranks").format(count=machine["num_ranks"]))
    if machine.get("torch"):
        words.append(f"torch {machine['torch']}")
    seen = {
        "cuda": _("memory: device, allocator"),
        "rss": _("memory: resident set of the process"),
        "nvml": _("memory: devices by NVML"),
        "recording": _("memory: from a recording"),
        "none": _("memory not seen"),
    }
    return ", ".join([*words, seen[result.memory]])


def phase_columns(kind: str) -> list[str]:
    """Return the titles of the figures of a phase."""
    if kind == "train":
        return [_("steps"), _("step time"), _("tokens/s"), _("allocated"), _("reserved"), _("used"), _("retries")]
    return [_("requests"), _("errors"), _("TTFT p50"), _("p95"), _("gap"), _("tokens/s"), _("used")]


def phase_row(kind: str, phase: Phase) -> list[str]:
    """Return the figures of a phase as text."""
    figures, ranks = phase.figures, phase.ranks
    used = max((rank.peak_used_bytes for rank in ranks), default=None)
    if kind == "train":
        allocated = max((rank.peak_allocated_bytes or 0 for rank in ranks), default=0)
        reserved = max((rank.peak_reserved_bytes or 0 for rank in ranks), default=0)
        return [
            phase_word(phase.name),
            _number(figures.get("num_steps")),
            _seconds(figures.get("step_seconds_p50")),
            _number(figures.get("tokens_per_second")),
            *(format_bytes(size) if size else "–" for size in (allocated, reserved, used)),
            _number(sum(rank.num_alloc_retries for rank in ranks)) if allocated else "–",
        ]
    return [
        phase_word(phase.name),
        _number(figures.get("num_requests")),
        _number(figures.get("num_errors")),
        _seconds(figures.get("ttft_p50_seconds")),
        _seconds(figures.get("ttft_p95_seconds")),
        _seconds(figures.get("inter_token_p50_seconds")),
        _number(figures.get("output_tokens_per_second")),
        format_bytes(used) if used else "–",
    ]


def stability_lines(result: BenchResult) -> list[str]:
    """Return what changing load does, a line each."""
    found, lines = result.stability, []
    if found is None:
        return []
    if found.drift_bytes is not None:
        held = _("reserved beyond allocated") if result.memory == "cuda" else _("resident memory")
        sign = "+" if found.drift_bytes >= 0 else "-"
        size = sign + format_bytes(abs(found.drift_bytes))
        lines.append(_("{held} after the changes: {size} at the same load").format(held=held, size=size))
    if found.num_bursts:
        lines.append(
            _("after a burst as fast as before within {seconds:.3g} s").format(seconds=found.recovery_seconds)
            if found.recovery_seconds is not None
            else _("after a burst it did not get as fast as before")
        )
    return lines


def _number(value: float | int | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _seconds(value: float | int | None) -> str:
    if value is None:
        return "–"
    return f"{value * 1000:,.1f} ms" if value < 1 else f"{value:,.2f} s"


def _table(titles: list[str], rows: list[list[str]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for at, title in enumerate(titles):
        table.add_column(title, justify="left" if at == 0 else "right", no_wrap=at == 0)
    for row in rows:
        table.add_row(*map(escape, row))
    return table
