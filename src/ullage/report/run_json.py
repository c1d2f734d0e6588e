"""A run's report as JSON: the keys of ``ullage schema run``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ullage.guard.run.report import Attempt, RunReport

SCHEMA_VERSION = 1


def run_json(report: RunReport) -> dict[str, Any]:
    """Return a report as plain values."""
    need = report.need
    return {
        "schema_version": SCHEMA_VERSION,
        "verdict": report.verdict,
        "exit_code": report.exit_code,
        "sentence": report.sentence,
        "attempts": [_attempt(attempt) for attempt in report.attempts],
        "need": None
        if need is None
        else {
            "verdict": need.verdict or None,
            "need_bytes": need.need_bytes if need.verdict else None,
            "total_bytes": need.total_bytes if need.verdict else None,
            "advice": [{"change": change, "flags": flags} for change, flags in need.advice],
            "why_not": need.why_not,
        },
        "warnings": list(report.warnings),
        "plan_store": report.plan_store,
    }


def _attempt(attempt: Attempt) -> dict[str, Any]:
    return {
        "number": attempt.number,
        "command": list(attempt.words),
        "plan": {"generation": attempt.generation, "knobs": dict(attempt.knobs)},
        "seconds": round(attempt.seconds, 3),
        "exit_code": attempt.exit_code,
        "worker_exit_code": attempt.worker_exit_code,
        "kind": attempt.kind,
        "sentence": attempt.sentence,
        "changes": list(attempt.changes),
        "num_swept": attempt.num_swept,
        "num_left": attempt.num_left,
        "peaks": [{"device": name, "used_bytes": used, "total_bytes": total} for name, used, total in attempt.peaks],
        "dump": attempt.dump,
    }
