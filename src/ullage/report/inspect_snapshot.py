"""A snapshot as text for people: one screen, verdict first, then where the gigabytes are and who holds them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ullage.i18n import _
from ullage.observe.inspection import Inspection
from ullage.observe.measured import Listing
from ullage.report.measured import print_listing
from ullage.units import format_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from ullage.observe.snapshot_answer import Answer

BAR = 24
MAX_LINES, MAX_LEAKS, MAX_SETTINGS = 6, 3, 3
_PATH = re.compile(r"\((?:[^()]*/)([^/()]+/[^/()]+)\)")


def print_snapshot(found: Inspection, out: Console) -> None:
    """Print what stands between the verdict and the advice."""
    answer: Answer = found.detail
    _print_categories(found, answer, out)
    ledger = next((one for one in found.listings if one.name == "ledger"), None)
    if ledger is not None:
        print_listing(ledger, out)
    for listing in found.listings:
        if listing.name == "lines":
            _print_rows(out, listing, MAX_LINES, ("held_bytes", "blocks", "category", "line"))
        elif listing.name == "leaks":
            _print_rows(out, listing, MAX_LEAKS, ("per_step_bytes", "blocks", "steps", "line"))
        elif listing.name == "would_have_fitted":
            _print_rows(out, listing, MAX_SETTINGS, ("then_free_bytes", "settings"))
    _print_pieces(found, answer, out)


def _print_categories(found: Inspection, answer: Answer, out: Console) -> None:
    total = found.total_bytes
    out.print()
    for term in found.terms:
        share = term.bytes / total if total else 0
        filled = round(BAR * share)
        bar = "█" * filled + "░" * (BAR - filled)
        text = f"  {term.name:<17} {format_bytes(term.bytes):>11} {100 * share:5.1f} %  {bar}  {term.formula}"
        out.print(text, markup=False, soft_wrap=True)
    words = found.total_name or _("reserved")
    out.print(f"  {words:<17} {format_bytes(total):>11}", markup=False, style="bold")


def _print_rows(out: Console, listing: Listing, limit: int, columns: tuple[str, ...]) -> None:
    out.print("\n" + listing.title, style="bold", markup=False, soft_wrap=True)
    for row in listing.rows[:limit]:
        cells = []
        for column in columns:
            value = listing.of(row, column)
            if column.endswith("_bytes"):
                cells.append(f"{format_bytes(int(value or 0)):>11}")
            elif column in ("blocks", "steps"):
                cells.append(f"{int(value or 0):>6,} {column}")
            elif column == "category":
                cells.append(f"{value:<16}")
            else:
                cells.append(short_path(str(value)))
        out.print(" " + "  ".join(cells), markup=False, soft_wrap=True)
    more = len(listing.rows) - limit
    if more > 0:
        out.print("  " + _("{count} more with --json or --html").format(count=more), style="dim", markup=False)


def short_path(text: str) -> str:
    """Return text whose path in brackets is cut to the last folder and the file."""
    return _PATH.sub(r"(\1)", text)


def _print_pieces(found: Inspection, answer: Answer, out: Console) -> None:
    final = answer.final
    if not final.reserved_bytes:
        return
    words = _(
        "At the end {reserved} are reserved: {used} in use, {releasable} could be given back, {pinned} ({share:.1f} %) "
        "are held in pieces"
    ).format(
        reserved=format_bytes(final.reserved_bytes),
        used=format_bytes(final.in_use_bytes),
        releasable=format_bytes(final.releasable_bytes),
        pinned=format_bytes(final.pinned_bytes),
        share=100 * final.pinned_bytes / final.reserved_bytes,
    )
    out.print("\n  " + words, markup=False, soft_wrap=True)
    pins = next((one for one in found.listings if one.name == "pins"), None)
    if pins is not None:
        row = pins.rows[0]
        most = _("most: {pinned} of a segment of {segment}, kept by {blocks} blocks, the smallest of {place}").format(
            pinned=format_bytes(int(pins.of(row, "pinned_bytes") or 0)),
            segment=format_bytes(int(pins.of(row, "segment_bytes") or 0)),
            blocks=pins.of(row, "blocks"),
            place=short_path(str(pins.of(row, "kept_by"))),
        )
        out.print("  " + most, markup=False, style="dim", soft_wrap=True)
