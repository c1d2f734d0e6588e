"""An inspection as text for people: the verdict first, then where the memory was, then what to change; one screen."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.padding import Padding

from ullage.i18n import _
from ullage.ledger import Term
from ullage.observe.inspection import Inspection
from ullage.report.inspect_snapshot import print_snapshot, short_path
from ullage.report.measured import print_measured
from ullage.units import format_bytes

MAX_ADVICE = 5
MAX_FIGURES = 8


def print_inspection(found: Inspection, console: Console | None = None) -> None:
    """Print an inspection on stdout."""
    out = console or Console(highlight=False)
    mark, style = ("✔", "bold green") if found.cause == "none" else ("✘", "bold red")
    out.print(f"{mark} {found.verdict}", markup=False, style=style, soft_wrap=True)
    if found.why:
        sure = {"certain": _("certain"), "likely": _("likely"), "unsure": _("unsure")}[found.confidence]
        _line(out, f"{short_path(found.why)} ({sure})")
    _line(out, _who(found), style="dim")
    whole = found.total_name or (_("reserved") if found.kind == "snapshot" else _("the card"))
    if found.detail is not None:
        print_snapshot(found, out)
    else:
        _print_terms(out, found.terms, found.total_bytes, whole=whole)
        print_measured(found, out)
    if found.cause != "none" and found.engine_terms and found.terms != found.engine_terms:
        out.print("\n" + _("At its start the engine said"), style="bold")
        _print_terms(out, found.engine_terms, 0, gap=False)
    _print_advice(out, found)
    for note in found.notes:
        out.print(f"! {note}", markup=False, style="yellow", soft_wrap=True)
    if found.next_command:
        out.print("\n" + _("Next: {command}").format(command=found.next_command), markup=False, soft_wrap=True)


def _who(found: Inspection) -> str:
    root = found.facts[0] if found.facts else None
    words = [
        _("written by {name}").format(name=found.allocator) if found.allocator not in ("", found.framework) else "",
        _("words of version {versions}").format(versions=found.versions) if found.versions else "",
        _("rank {rank}").format(rank=found.rank) if found.rank else "",
        _("during {phase}").format(phase=found.phase) if found.phase else "",
        _("line {line:,}").format(line=root.line) if root is not None else "",
        _("{times} times").format(times=root.times) if root is not None and root.times > 1 else "",
    ]
    return ", ".join(word for word in words if word)


def _line(out: Console, text: str, style: str = "") -> None:
    from rich.text import Text

    if text:
        out.print(Padding(Text(text, style=style), (0, 0, 0, 2), expand=False))


def _print_terms(out: Console, terms: Sequence[Term], total: int, *, gap: bool = True, whole: str = "") -> None:
    if gap and terms:
        out.print()
    for term in terms:
        share = f"{100 * term.bytes / total:5.1f} %" if total else ""
        out.print(
            f"  {term.name:<22} {format_bytes(term.bytes):>12}  {share:>8}  {term.formula}".rstrip(), markup=False
        )
    if total and terms:
        out.print(f"  {whole:<22} {format_bytes(total):>12}", markup=False)


def _print_advice(out: Console, found: Inspection) -> None:
    if not found.advice:
        return
    out.print("\n" + _("What to change, cheapest first"), style="bold")
    for number, piece in enumerate(found.advice[:MAX_ADVICE], 1):
        gain = _("up to {size}").format(size=format_bytes(piece.gain_bytes)) if piece.gain_bytes else ""
        cost = _("cost: {cost}").format(cost=piece.cost) if piece.cost else ""
        remark = "; ".join(part for part in (gain, cost) if part)
        _line(out, f"{number}. {short_path(piece.change)}" + (f"  ({remark})" if remark else ""))
        if piece.flags:
            out.print(f"     {piece.flags}", markup=False, style="bold", soft_wrap=True)
