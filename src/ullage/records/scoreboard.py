"""The public scoreboard: what was measured, what was predicted, and every figure outside its range."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from ullage.i18n import _
from ullage.records.compare import Comparison
from ullage.records.summary import Summary, summarise
from ullage.records.table import percent
from ullage.records.validate import ValidationReport
from ullage.units import format_bytes


def markdown(report: ValidationReport) -> str:
    """Return the scoreboard as Markdown."""
    summaries = [one for one in summarise(report) if one.count]
    lines = [
        "# " + _("Scoreboard"),
        "",
        _(
            "Made by `ullage validate --markdown`. Errors are relative, predicted against measured; *in range* is the "
            "share of measured figures inside the range that ullage prints. A verdict on a start is wrong when it was "
            "sure and the run contradicts it; it is tight when the range holds both outcomes, so that neither was "
            "promised."
        ),
        "",
    ]
    for scope, title in (
        ("all", _("All engines")),
        ("engine", _("By engine and quantity")),
        ("group", _("By source")),
    ):
        lines += ["## " + title, "", *_table(one for one in summaries if one.scope == scope), ""]
    lines += ["## " + _("Outside the range"), "", *_outside(report), ""]
    lines += ["## " + _("Wrong verdicts"), "", *_wrong(report), ""]
    lines += ["## " + _("Not judged"), "", *_not_judged(report), ""]
    return "\n".join(lines)


def _row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _header(*cells: str) -> list[str]:
    return [_row(cells), _row("---" for cell in cells)]


def _table(summaries: Iterable[Summary]) -> Iterator[str]:
    yield from _header(
        _("group"),
        _("quantity"),
        _("count"),
        _("median"),
        "P90",
        _("worst"),
        _("in range"),
        _("wrong verdicts"),
        _("tight"),
    )
    for one in summaries:
        yield _row(
            (
                one.name,
                one.quantity,
                one.count,
                percent(one.median_abs_error),
                percent(one.p90_abs_error),
                percent(one.worst_abs_error),
                percent(one.coverage, digits=0),
                f"{one.wrong_verdicts}/{one.num_verdicts}",
                one.tight_verdicts,
            )
        )


def _outside(report: ValidationReport) -> Iterator[str]:
    rows = [row for row in report.comparisons if row.inside is False]
    if not rows:
        yield _("None.")
        return
    yield from _header(_("record"), _("quantity"), _("rank"), _("measured"), _("predicted"), _("range"), _("error"))
    for row in sorted(rows, key=lambda one: -abs(one.error or 0)):
        yield _row(
            (
                row.record_id,
                row.quantity,
                row.rank or "",
                figure(row, row.measured),
                figure(row, row.predicted),
                f"{figure(row, row.low)} – {figure(row, row.high)}",
                "" if row.error is None else f"{100 * row.error:+.1f} %",
            )
        )


def figure(row: Comparison, value: float | None) -> str:
    """Return a figure of a row for reading."""
    if value is None:
        return ""
    return format_bytes(value) if row.is_bytes else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


def _wrong(report: ValidationReport) -> Iterator[str]:
    judged = [verdict for verdict in report.verdicts if verdict.predicted is not None]
    yield _("{wrong} of {count} verdicts are wrong.").format(
        wrong=sum(verdict.wrong for verdict in judged), count=len(judged)
    )
    for verdict in judged:
        if verdict.wrong:
            yield f"- {verdict.record_id}: {verdict.came}; {verdict.reason or _('ullage says it starts')}"
    if any(verdict.tight for verdict in judged):
        yield ""
        yield _("Tight, the range holds both outcomes:")
        yield ""
        for verdict in judged:
            if verdict.tight:
                yield f"- {verdict.record_id}: {verdict.came}; {verdict.reason}"


def _not_judged(report: ValidationReport) -> Iterator[str]:
    reasons = Counter((row.failed, row.skipped) for row in report.comparisons if row.skipped)
    if not reasons:
        yield _("None.")
        return
    yield from _header(_("figures"), _("why"))
    for (_failed, why), count in sorted(reasons.items(), key=lambda item: -item[1]):
        yield _row((count, why))
