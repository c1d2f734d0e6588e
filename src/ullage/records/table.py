"""The report of ``ullage validate`` as tables for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ullage.i18n import _
from ullage.records.summary import Summary, summarise
from ullage.records.validate import ValidationReport

#: Columns of a report that goes into a file or a pipe.
FILE_WIDTH = 130


def print_report(report: ValidationReport, console: Console | None = None) -> None:
    """Print a table per scope, the wrong verdicts, and what was skipped and why."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, FILE_WIDTH)
    summaries = summarise(report)
    titles = {"group": _("By source"), "engine": _("By engine"), "all": _("All")}
    for scope, title in titles.items():
        rows = [one for one in summaries if one.scope == scope and one.count]
        if rows:
            console.print(_table(title, rows))
    for verdict in report.verdicts:
        if verdict.wrong:
            console.print(
                _("wrong verdict: {record}: {came}; predicted: {reason}").format(
                    record=verdict.record_id, came=verdict.came, reason=verdict.reason or _("it starts")
                ),
                markup=False,
            )
    _print_skipped(report, console)


def _table(title: str, rows: Sequence[Summary]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for heading in (_("group"), _("quantity")):
        table.add_column(heading, no_wrap=True)
    for heading in (_("count"), _("median"), "P90", _("worst"), _("in range"), _("wrong verdicts"), _("tight")):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            row.quantity,
            str(row.count),
            percent(row.median_abs_error),
            percent(row.p90_abs_error),
            percent(row.worst_abs_error),
            percent(row.coverage, digits=0),
            f"{row.wrong_verdicts}/{row.num_verdicts}",
            str(row.tight_verdicts),
        )
    return table


def percent(share: float | None, *, digits: int = 2) -> str:
    """Return a share as a percentage, a dash for None."""
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def _print_skipped(report: ValidationReport, console: Console) -> None:
    skipped = Counter((row.failed, row.skipped) for row in report.comparisons if row.skipped)
    if not skipped:
        return
    total = len(report.comparisons)
    console.print(
        _("{judged} of {total} figures judged; not judged:").format(judged=total - sum(skipped.values()), total=total)
    )
    for (failed, why), count in sorted(skipped.items(), key=lambda item: (-item[0][0], -item[1])):
        mark = _("no prediction") if failed else _("skipped")
        console.print(f"  {count:5d}  {mark}: {why}", markup=False, highlight=False)
