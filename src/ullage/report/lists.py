"""The catalogs as text for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ullage.i18n import _
from ullage.units import GB, GiB, format_bytes

#: Columns that are always shown; where even these are wider than the terminal, its lines wrap.
LEAST_COLUMNS = 2


def _console() -> Console:
    return Console(highlight=False)


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> None:
    """Print a table that is never cut: where the terminal is narrow, columns are left out from the right."""
    out, gap = _console(), 2
    widths = [max(len(row[at]) for row in (columns, *rows)) for at in range(len(columns))]
    shown = len(columns)
    while shown > LEAST_COLUMNS and sum(widths[:shown]) + gap * (shown - 1) > out.width:
        shown -= 1
    out = Console(highlight=False, width=max(out.width, sum(widths[:shown]) + gap * shown))
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, gap, 0, 0))
    for at, name in enumerate(columns[:shown]):
        justify: Literal["left", "right"] = "right" if at in set(right) else "left"
        table.add_column(name, justify=justify, width=widths[at], no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row[:shown]))
    out.print(table)


def billions(count: int) -> str:
    """Return a parameter count for reading."""
    return f"{count / 1e9:,.2f} B" if count >= 1e9 else f"{count / 1e6:,.1f} M"


def print_models(entries: list[dict[str, Any]]) -> None:
    """Print the list of models."""
    rows = [
        (
            entry["name"],
            billions(entry["num_parameters"]),
            billions(entry["num_active_parameters"]),
            str(entry["num_layers"]),
            f"{entry['max_position_embeddings']:,}",
            (entry["quantization"] or "–")[:12],
        )
        for entry in entries
    ]
    titles = (_("model"), _("size"), _("active"), _("layers"), _("context"), _("weights"))
    _print_table(titles, rows, right=(1, 2, 3, 4))


def print_model(facts: dict[str, Any]) -> None:
    """Print the counts of one model."""
    out = _console()
    out.print(f"[bold]{facts['name']}[/bold]  ({facts['architecture']})")
    for name in ("num_parameters", "num_active_parameters", "num_mtp_parameters", "num_tower_parameters"):
        if facts[name]:
            out.print(f"  {name:<24} {facts[name]:>22,}  {billions(facts[name])}")
    for name in ("hidden_size", "vocab_size", "max_position_embeddings"):
        out.print(f"  {name:<24} {facts[name]:>22,}")
    out.print(f"  {'dtype':<24} {facts['dtype']:>22}  {facts['quantization'] or ''}")
    out.print(f"  {facts['num_layers']} {_('layers')}:")
    for kind in facts["layers"]:
        _print_hanging(out, f"    {kind['count']:>4} x ", kind["layer"])
    out.print(f"  {_('cache of one request, whole model, unsharded')}:")
    for cost in facts["kv_cache"]:
        fixed = cost["fixed_bytes_per_request"]
        slope = f"{cost['bytes_per_token']:,} {_('B per token')}"
        out.print(f"    {cost['dtype']:<14}{slope:>28}" + (f"  + {format_bytes(fixed)}" if fixed else ""), markup=False)
    for sentence in facts["assumed"]:
        _print_hanging(out, "  ", f"{_('assumed')}: {sentence}", "dim")
    _print_hanging(out, "  ", f"{_('source')}: {facts['source']}", "dim")


def _print_hanging(out: Console, head: str, text: str, style: str = "") -> None:
    """Print a text whose further lines stand under its first word."""
    for number, line in enumerate(Text(text, style=style).wrap(out, max(20, out.width - len(head)))):
        line.rstrip()
        out.print(Text(head if number == 0 else " " * len(head)) + line, soft_wrap=True)


def print_gpus(entries: list[dict[str, Any]], *, sources: bool) -> None:
    """Print the accelerators; with ``sources``, where each figure is from."""
    rows = []
    for entry in entries:
        total = entry["total"]
        bandwidth = entry.get("bandwidth", {}).get("value")
        flops = entry.get("flops", {}).get("bfloat16", {}).get("value")
        rows.append(
            (
                entry["name"],
                format_bytes(total["value"]),
                f"{total['low'] / GiB:.2f}–{total['high'] / GiB:.2f}",
                total.get("certainty", ""),
                f"{bandwidth / GB:,.0f}" if bandwidth else "–",
                f"{flops / 1e12:,.0f}" if flops else "–",
            )
        )
    titles = (_("GPU"), _("reports"), _("range"), _("certainty"), _("GB/s"), _("BF16 TFLOP/s"))
    _print_table(titles, rows, right=(1, 2, 4, 5))
    if sources:
        _print_sources(_console(), entries[0])


def _print_sources(out: Console, entry: dict[str, Any]) -> None:
    from ullage.catalog.gpus import source_text

    for name, value in entry.items():
        if isinstance(value, dict) and "source" in value:
            _print_hanging(out, f"  {name}: ", source_text(value["source"]), "dim")
        elif isinstance(value, dict) and "source_text" in value:
            _print_hanging(out, f"  {name}: ", value["source_text"], "dim")
    if entry.get("note"):
        _print_hanging(out, "  ", entry["note"], "dim")


def print_engines(engines: list[dict[str, Any]]) -> None:
    """Print the engines and their versions."""
    out = _console()
    for kind, title in (("serve", _("ullage fit serve")), ("train", _("ullage fit train"))):
        chosen = [engine for engine in engines if engine["kind"] == kind]
        if chosen:
            out.print(f"[bold]{title}[/bold]")
        for engine in chosen:
            _print_hanging(out, f"  {engine['name']:<13} ", ", ".join(engine["versions"]) or _("by its own rules"))
