"""docs/scoreboard.md is what the command prints, and hides nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from ullage.records.scoreboard import markdown
from ullage.records.validate import SHIPPED, ValidationReport, validate_files

PAGE = Path(__file__).parents[2] / "docs" / "scoreboard.md"


@pytest.fixture(scope="module")
def report() -> ValidationReport:
    return validate_files([SHIPPED])


def test_the_page_is_up_to_date(report: ValidationReport) -> None:
    """Make it anew with: ullage validate --markdown > docs/scoreboard.md."""
    assert PAGE.read_text(encoding="utf-8") == markdown(report)


def test_every_figure_outside_its_range_is_listed(report: ValidationReport) -> None:
    listed = markdown(report).partition("## Outside the range")[2].partition("\n## ")[0]
    outside = [row for row in report.comparisons if row.inside is False]
    assert listed.count("\n| ") == (len(outside) + 2 if outside else 0)
    for row in outside:
        assert row.record_id in listed


def test_nothing_fails_inside_and_most_figures_lie_in_their_range(report: ValidationReport) -> None:
    assert not report.internal_errors
    judged = [row for row in report.comparisons if row.inside is not None]
    assert len(judged) > 200
    assert sum(bool(row.inside) for row in judged) / len(judged) >= 0.9
