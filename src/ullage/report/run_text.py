"""A run's report as text, on stderr: stdout belongs to the command."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ullage.i18n import _
from ullage.units import format_bytes

if TYPE_CHECKING:
    from ullage.guard.run.report import RunReport


def report_lines(report: RunReport) -> list[str]:
    """Return the report: a line per attempt, what was changed after it, and the end."""
    found = []
    for attempt in report.attempts:
        knobs = ", ".join(f"{name} {value}" for name, value in attempt.knobs)
        found.append(
            _("attempt {number}: exit code {code} after {seconds:.1f} s{plan}: {why}").format(
                number=attempt.number,
                code=attempt.exit_code,
                seconds=attempt.seconds,
                plan=f" [{knobs}]" if knobs else "",
                why=attempt.sentence,
            )
        )
        peaks = [
            _("{device} {used} of {total}").format(device=name, used=format_bytes(used), total=format_bytes(total))
            for name, used, total in attempt.peaks
        ]
        if peaks:
            found.append("  " + _("highest use seen: {peaks}").format(peaks="; ".join(peaks)))
        found += [f"  → {change}" for change in attempt.changes]
    found.append(
        _("{verdict} (exit code {code}): {sentence}").format(
            verdict=_verdicts()[report.verdict], code=report.exit_code, sentence=report.sentence
        )
    )
    if report.need is not None:
        found += [f"  {change}  {flags}" for change, flags in report.need.advice[:3]]
    return found


def _verdicts() -> dict[str, str]:
    return {
        "succeeded": _("succeeded"),
        "cannot_fit": _("does not fit"),
        "stopped": _("stopped"),
        "interrupted": _("interrupted"),
        "not_started": _("not started"),
    }
