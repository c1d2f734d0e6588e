"""Two files of a kind compared: term by term, size by size, and what grew most. A change is the first minus the second.

``ullage inspect NOW --against BEFORE``: a term or row that only one of them has is a change from or to 0; a size or
metric that only one of them has is left out.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping

from ullage.errors import InputError
from ullage.i18n import _
from ullage.observe.formats import inspect_source
from ullage.observe.inspection import Inspection
from ullage.observe.measured import MAX_ROWS, Cell, Listing, Series
from ullage.units import format_bytes

#: Kinds that are texts: a log that ended in a death is compared with one that did not.
_LOGS = ("death", "engine_log", "training_log")
#: What decides which of two files needs more, the first that both have.
_LEADING = (
    "peak_allocated", "allocated", "in_use", "peak_driver", "peak_used", "peak_reserved", "reserved", "weights",
)  # fmt: skip
#: The column of a table that is compared, the first that it has.
_COLUMNS = ("alive_at_peak_bytes", "max_allocated_bytes", "max_reserved_bytes", "peak_bytes", "used_bytes")
_SKIPPED = ("events",)


def compare_files(now: str, before: str, device: int | None = None) -> Inspection:
    """Inspect two files and compare them.

    Raises:
        InputError: one cannot be read, or they are of different kinds.
    """
    nothing = io.BytesIO()
    first, second = (inspect_source(name, nothing, device) for name in (now, before))
    return compare(first, second)


def compare(now: Inspection, before: Inspection) -> Inspection:
    """Return what changed from ``before`` to ``now``.

    Raises:
        InputError: they are of different kinds.
    """
    if now.kind != before.kind and not {now.kind, before.kind} <= set(_LOGS):
        raise InputError(
            _("a {first} cannot be compared with a {second}").format(first=now.kind, second=before.kind),
            remedy=_("give two files of the same kind"),
        )
    terms = _changes({each.name: each.bytes for each in now.terms}, {each.name: each.bytes for each in before.terms})
    sizes = _changes(*_shared(dict(now.sizes), dict(before.sizes)))
    listings = [
        Listing(name="terms", title=_("Terms"), columns=_columns("term", "bytes"), rows=terms),
        Listing(name="sizes", title=_("Sizes"), columns=_columns("size", "bytes"), rows=sizes),
        _metrics(now, before),
        *_tables(now, before),
    ]
    return Inspection(
        kind="comparison",
        verdict=_verdict(now, before, terms),
        cause="none",
        confidence="likely" if now.partial or before.partial else "certain",
        framework=now.framework,
        sizes=tuple((f"change_{name}", int(change)) for name, *_both, change in _whole(sizes)),
        partial=now.partial or before.partial,
        notes=_notes(now, before),
        series=(*_named(now.series, "now"), *_named(before.series, "before")),
        listings=tuple(each for each in listings if each.rows),
    )


def _columns(first: str, unit: str) -> tuple[str, ...]:
    return (first, f"now_{unit}", f"before_{unit}", f"change_{unit}")


def _changes(now: Mapping[str, float], before: Mapping[str, float]) -> tuple[tuple[Cell, ...], ...]:
    """Return (name, now, before, change) of each name, the greatest change first."""
    rows = [(name, now.get(name, 0), before.get(name, 0)) for name in dict.fromkeys((*now, *before))]
    found = [(name, first, second, first - second) for name, first, second in rows]
    return tuple(sorted(found, key=lambda row: (-abs(row[3]), row[0]))[:MAX_ROWS])


def _shared(now: Mapping[str, float], before: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """Return what both have: a size that is not known in one of them is no change from 0."""
    names = [name for name in now if name in before]
    return {name: now[name] for name in names}, {name: before[name] for name in names}


def _whole(rows: Iterable[tuple[Cell, ...]]) -> Iterator[tuple[str, int, int, int]]:
    for name, *numbers in rows:
        now, before, change = (int(each) if isinstance(each, int | float) else 0 for each in numbers)
        yield str(name), now, before, change


def _verdict(now: Inspection, before: Inspection, terms: tuple[tuple[Cell, ...], ...]) -> str:
    first, second = dict(now.sizes), dict(before.sizes)
    name = next((each for each in _LEADING if each in first and each in second), "")
    if not name:
        return _("now: {now}; before: {before}").format(now=now.verdict, before=before.verdict)
    change = first[name] - second[name]
    words = {
        1: _("{name} grew by {change}, from {before} to {now}"),
        0: _("{name} is the same: {now}"),
        -1: _("{name} shrank by {change}, from {before} to {now}"),
    }[(change > 0) - (change < 0)]
    text = words.format(
        name=name.replace("_", " "),
        change=format_bytes(abs(change)),
        before=format_bytes(second[name]),
        now=format_bytes(first[name]),
    )
    top = next((row for row in _whole(terms) if row[3] * (change or 1) > 0), None)
    if top is not None and change and now.framework == before.framework:
        text += _("; most of it {term} ({change})").format(term=top[0], change=_signed(top[3]))
    return text


def _signed(size: int) -> str:
    return f"{'+' if size > 0 else '-'}{format_bytes(abs(size))}"


def _metrics(now: Inspection, before: Inspection) -> Listing:
    rows = _changes(*_shared(dict(now.metrics), dict(before.metrics)))
    return Listing(name="metrics", title=_("Metrics"), columns=("metric", "now", "before", "change"), rows=rows)


def _tables(now: Inspection, before: Inspection) -> list[Listing]:
    """Compare the tables that both have, row by row, in their leading column."""
    others = {each.name: each for each in before.listings}
    found = []
    for table in now.listings:
        other = others.get(table.name)
        column = _leading(table)
        if table.name in _SKIPPED or other is None or column is None or column not in other.columns:
            continue
        first, second = _column(table, column), _column(other, column)
        rows = tuple(row for row in _changes(first, second) if row[3]) if first and second else ()
        columns = _columns(table.columns[0], column)
        found.append(Listing(name=table.name, title=table.title, columns=columns, rows=rows))
    return found


def _leading(table: Listing) -> str | None:
    known = [each for each in _COLUMNS if each in table.columns]
    bytes_ = [each for each in table.columns[1:] if each.endswith("bytes")]
    times = [each for each in table.columns[1:] if each.endswith("_us")]
    return next(iter((*known, *bytes_, *times)), None)


def _column(table: Listing, column: str) -> dict[str, float]:
    """Return a column by the first cell of its rows; rows of the same name are summed up."""
    found: dict[str, float] = {}
    for row in table.rows:
        value = table.of(row, column)
        if isinstance(value, int | float):
            found[str(row[0])] = found.get(str(row[0]), 0) + value
    return found


def _named(series: Iterable[Series], words: str) -> Iterator[Series]:
    for each in series:
        yield Series(name=f"{words}: {each.name}", x_unit=each.x_unit, points=each.points)


def _notes(now: Inspection, before: Inspection) -> tuple[str, ...]:
    notes = []
    for words, found in ((_("now"), now), (_("before"), before)):
        if found.partial:
            notes.append(_("{which}: what was read is partial").format(which=words))
        if found.cause != "none":
            notes.append(_("{which}: {verdict}").format(which=words, verdict=found.verdict))
    return tuple(notes)
