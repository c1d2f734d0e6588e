"""Rows → groups: count, median, P90 and worst error, coverage and wrong verdicts; and the JSON that carries them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ullage.frozen import Frozen
from ullage.records.compare import Comparison, Verdict
from ullage.records.validate import ValidationReport

SCHEMA_VERSION = 1
ALL = "all"


class Summary(Frozen):
    """One group of judged figures.

    Attributes:
        scope: ``group`` (a source of records), ``engine``, or ``all``.
        name, quantity: which; quantity ``all`` for every quantity together.
        count: judged figures; ``num_skipped`` those that were not, ``num_failed`` of them for want of a prediction.
        median_abs_error, p90_abs_error, worst_abs_error: relative, over the figures; None when there are none.
        coverage: share of figures inside the printed range.
        num_verdicts: predicted starts, over the records of the group that have a figure here: ``wrong_verdicts`` of
            them promised what did not come; ``tight_verdicts`` promised neither, because the range holds both.
    """

    scope: str
    name: str
    quantity: str
    count: int
    num_skipped: int
    num_failed: int
    num_groups: int
    median_abs_error: float | None
    p90_abs_error: float | None
    worst_abs_error: float | None
    coverage: float | None
    num_verdicts: int
    wrong_verdicts: int
    tight_verdicts: int


def summarise(report: ValidationReport) -> list[Summary]:
    """Return the summaries: per source and quantity, per engine, per engine and quantity, and of all."""
    rows, verdicts = report.comparisons, report.verdicts
    found = _by(rows, verdicts, "group", lambda row: (row.group, row.quantity))
    engines = _by(rows, verdicts, "engine", lambda row: (row.engine, ALL))
    engines += _by(rows, verdicts, "engine", lambda row: (row.engine, row.quantity))
    found += sorted(engines, key=lambda one: (one.name, one.quantity != ALL, one.quantity))
    found += _by(rows, verdicts, "all", lambda row: (ALL, ALL))
    found += _by(rows, verdicts, "all", lambda row: (ALL, row.quantity))
    return found


def quantile(values: Sequence[float], share: float) -> float | None:
    """Return the quantile by linear interpolation between order statistics; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _by(
    rows: Iterable[Comparison],
    verdicts: Iterable[Verdict],
    scope: str,
    key: Callable[[Comparison], tuple[str, str]],
) -> list[Summary]:
    buckets: dict[tuple[str, str], list[Comparison]] = {}
    for row in rows:
        buckets.setdefault(key(row), []).append(row)
    by_record = {verdict.record_id: verdict for verdict in verdicts if verdict.predicted is not None}
    return [_summary(scope, name, quantity, bucket, by_record) for (name, quantity), bucket in sorted(buckets.items())]


def _summary(scope: str, name: str, quantity: str, rows: Sequence[Comparison], verdicts: dict[str, Verdict]) -> Summary:
    errors = [abs(row.error) for row in rows if row.error is not None]
    inside = [row.inside for row in rows if row.inside is not None]
    mine = [verdicts[record_id] for record_id in {row.record_id for row in rows} if record_id in verdicts]
    return Summary(
        scope=scope,
        name=name,
        quantity=quantity,
        count=len(inside),
        num_skipped=sum(row.skipped is not None for row in rows),
        num_failed=sum(row.failed for row in rows),
        num_groups=len({row.group for row in rows if row.skipped is None}),
        median_abs_error=quantile(errors, 0.5),
        p90_abs_error=quantile(errors, 0.9),
        worst_abs_error=max(errors, default=None),
        coverage=sum(inside) / len(inside) if inside else None,
        num_verdicts=len(mine),
        wrong_verdicts=sum(verdict.wrong for verdict in mine),
        tight_verdicts=sum(verdict.tight for verdict in mine),
    )


def to_json(report: ValidationReport) -> dict[str, Any]:
    """Return the report as the JSON object that ``ullage validate --json`` prints."""
    return {
        "schema_version": SCHEMA_VERSION,
        "num_records": report.num_records,
        "groups": [_summary_json(summary) for summary in summarise(report)],
        "records": [_row_json(row) for row in report.comparisons],
        "verdicts": [_verdict_json(verdict) for verdict in report.verdicts],
        "warnings": [*report.warnings, *report.internal_errors],
    }


def _summary_json(summary: Summary) -> dict[str, Any]:
    return {
        "group": summary.name if summary.scope == "group" else f"{summary.scope}:{summary.name}",
        "quantity": summary.quantity,
        "scope": summary.scope,
        "count": summary.count,
        "num_skipped": summary.num_skipped,
        "num_failed": summary.num_failed,
        "num_groups": summary.num_groups,
        "median_abs_error": summary.median_abs_error,
        "p90_abs_error": summary.p90_abs_error,
        "worst_abs_error": summary.worst_abs_error,
        "coverage": summary.coverage,
        "num_verdicts": summary.num_verdicts,
        "wrong_verdicts": summary.wrong_verdicts,
        "tight_verdicts": summary.tight_verdicts,
    }


def _row_json(row: Comparison) -> dict[str, Any]:
    return {
        "id": row.record_id,
        "group": row.group,
        "engine": row.engine,
        "quantity": row.quantity,
        "rank": row.rank,
        "unit": "bytes" if row.is_bytes else "count",
        "measured": _plain(row.measured, row.is_bytes),
        "predicted": _plain(row.predicted, row.is_bytes),
        "low": math.floor(row.low) if row.low is not None and row.is_bytes else row.low,
        "high": math.ceil(row.high) if row.high is not None and row.is_bytes else row.high,
        "error": row.error,
        "inside": row.inside,
        "skipped": row.skipped,
        "failed": row.failed,
    }


def _verdict_json(verdict: Verdict) -> dict[str, Any]:
    return {
        "id": verdict.record_id,
        "group": verdict.group,
        "engine": verdict.engine,
        "measured": verdict.measured,
        "predicted": verdict.predicted,
        "tight": verdict.tight,
        "wrong": verdict.wrong,
        "reason": verdict.reason,
        "skipped": verdict.skipped,
    }


def _plain(value: float | None, is_bytes: bool) -> float | int | None:
    return round(value) if value is not None and is_bytes else value
