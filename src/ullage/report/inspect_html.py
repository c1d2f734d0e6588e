"""An inspection as one page: the verdict and its figures first, then curves, tables and the map of pieces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ullage.i18n import _
from ullage.observe.inspection import Inspection
from ullage.observe.measured import Listing
from ullage.report.html.page import Fact, Section, Table, write_page
from ullage.report.inspect_figures import curves, map_figure, terms_figure, timeline_figure
from ullage.report.measured import format_cell
from ullage.units import format_bytes

if TYPE_CHECKING:
    from ullage.observe.snapshot_answer import Answer

#: Tables that are long and rarely asked for.
_FOLDED = ("stacks", "modules")
MAX_ROWS = 100
MAX_CELL = 400


def write_inspection(found: Inspection, path: str | Path, source: str) -> None:
    """Write an inspection of ``source`` as a page.

    Raises:
        MissingExtraError: plotly or jinja2 is not installed.
        InputError: the file cannot be written.
    """
    write_page(
        path,
        title=found.verdict,
        subtitle=_subtitle(found, source),
        status=_status(found),
        facts=_facts(found),
        notes=found.notes,
        sections=_sections(found),
    )


def _status(found: Inspection) -> str:
    if found.cause == "none":
        return "good"
    return "warn" if found.confidence == "unsure" else "bad"


def _subtitle(found: Inspection, source: str) -> str:
    sure = {"certain": _("certain"), "likely": _("likely"), "unsure": _("unsure")}[found.confidence]
    why = f"{found.why} ({sure})" if found.why else ""
    return " · ".join(part for part in (why, source if source != "-" else "") if part)


def _facts(found: Inspection) -> list[Fact]:
    sizes = dict(found.sizes)
    answer: Answer | None = found.detail
    facts = []
    labels = (
        ("peak_allocated", _("peak allocated")), ("peak_reserved", _("peak reserved")), ("requested", _("refused")),
        ("capacity", _("the card has")), ("leak_per_step", _("stays per step")), ("pinned", _("in pieces at the end")),
        ("weights", _("weights")), ("kv_cache", _("KV cache")),
    )  # fmt: skip
    for name, label in labels:
        if name in sizes:
            facts.append(Fact(label, format_bytes(sizes[name]), _remark(name, answer)))
    if answer is not None and found.terms:
        largest = max(found.terms, key=lambda term: term.bytes)
        facts.append(Fact(_("largest part"), _words(largest.name), format_bytes(largest.bytes)))
    return facts[:6]


def _remark(name: str, answer: Answer | None) -> str:
    if answer is None:
        return ""
    if name == "peak_allocated":
        return answer.phase(answer.lives.peak_at)
    if name == "leak_per_step":
        return _("over {steps} steps").format(steps=answer.leak.num_steps)
    if name == "pinned" and answer.final.reserved_bytes:
        share = 100 * answer.final.pinned_bytes / answer.final.reserved_bytes
        return _("{share:.1f} % of what is reserved").format(share=share)
    return ""


def _sections(found: Inspection) -> list[Section]:
    sections = [_advice(found)] if found.advice else []
    if found.terms:
        sections.append(_terms(found))
    answer: Answer | None = found.detail
    if answer is not None and answer.timeline.events:
        sections.append(_timeline(answer))
    elif answer is None:
        sections += [_curve_section(heading, figure) for heading, figure in curves(found.series)]
    for listing in found.listings:
        sections.append(_listing(listing))
        if listing.name == "pins" and answer is not None and answer.map:
            sections.append(_map(answer))
    if found.metrics:
        sections.append(_metrics(found))
    return sections


def _advice(found: Inspection) -> Section:
    rows = [
        (number, piece.change, piece.flags, format_bytes(piece.gain_bytes) if piece.gain_bytes else "–", piece.cost)
        for number, piece in enumerate(found.advice, 1)
    ]
    columns = ("", _("change"), _("how"), _("gains up to"), _("cost"))
    return Section(_("What to change, cheapest first"), table=Table(columns, rows))


def _terms(found: Inspection) -> Section:
    total = found.total_bytes or sum(term.bytes for term in found.terms)
    rows: list[Sequence[str]] = [
        (
            _words(term.name),
            format_bytes(term.bytes),
            f"{100 * term.bytes / total:.1f} %" if total else "",
            term.formula,
        )
        for term in found.terms
    ]
    rows.append((found.total_name or _("together"), format_bytes(total), "100.0 %", ""))
    answer: Answer | None = found.detail
    words = ""
    if answer is not None:
        words = (
            _("When the request was refused.")
            if answer.refusal is not None
            else _("At the peak of what was allocated.")
        )
    return Section(
        _("Where the memory was"),
        words,
        table=Table((_("part"), _("size"), _("share"), _("how sure, or how it is known")), rows),
        figure=terms_figure(found.terms),
        alt=_("Bars: one for each part, by size"),
    )


def _timeline(answer: Answer) -> Section:
    return Section(
        _("Over time"),
        _(
            "Each column shows the fullest moment of its stretch, so no peak is lost. The dotted line is what was "
            "reserved; dashed lines end the steps."
        ),
        figure=timeline_figure(answer),
        alt=_("Stacked areas: allocated memory by category over the recording, and the reserved memory as a line"),
    )


def _curve_section(heading: str, figure: dict[str, object]) -> Section:
    return Section(_("Over time: {what}").format(what=heading), figure=figure, alt=_("Curves over time"))


def _listing(listing: Listing) -> Section:
    rows = [
        [format_cell(column, listing.of(row, column))[:MAX_CELL] for column in listing.columns]
        for row in listing.rows[:MAX_ROWS]
    ]
    columns = [_heading(column) for column in listing.columns]
    return Section(listing.title, table=Table(columns, rows), folded=listing.name in _FOLDED)


def _map(answer: Answer) -> Section:
    return Section(
        _("Map of the pieces"),
        _(
            "One row for each of the segments with most free memory, from its beginning to its end: dark is in use, "
            "light is free. A light row with a dark spot is a segment that one small block keeps."
        ),
        figure=map_figure(answer),
        alt=_("Heat map: how much of each part of each segment is in use at the end"),
    )


def _metrics(found: Inspection) -> Section:
    rows = [(_heading(name), format_cell(name, value)) for name, value in found.metrics]
    return Section(_("Figures"), table=Table((_("figure"), _("value")), rows), folded=True)


def _heading(name: str) -> str:
    for unit in ("_bytes", "_us", "_share", "_flops", "_per_s"):
        name = name.removesuffix(unit)
    return _words(name)


def _words(name: str) -> str:
    return name.replace("_", " ")
