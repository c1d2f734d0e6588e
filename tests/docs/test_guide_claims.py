"""Every figure of docs/guide-claims.md is recomputed by the command or expression that stands beside it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import shared_path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import guide_claims

PAGE = guide_claims.PAGE.read_text(encoding="utf-8")
ROWS = guide_claims.rows(PAGE)


@pytest.fixture(scope="module")
def names() -> Iterator[dict[str, Any]]:
    with guide_claims.laid_out(PAGE) as found:
        yield found


@pytest.mark.parametrize("row", ROWS, ids=[f"{at} {row.what[:60]}" for at, row in enumerate(ROWS)])
def test_a_figure_is_what_its_command_says(row: guide_claims.Row, names: dict[str, Any]) -> None:
    if "recording.pickle" in row.how and not shared_path("snapshots", guide_claims.RECORDING).is_file():
        pytest.skip("the recording is not beside this checkout")
    assert guide_claims.told(row, guide_claims.value_of(row, names)) == row.figure


def test_every_claim_has_its_section_and_most_a_figure() -> None:
    headings = [line for line in PAGE.splitlines() if line.startswith("## ")]
    numbers: set[int] = set()
    for heading in headings:
        first, _dash, last = heading[3:].partition(".")[0].partition("–")
        numbers |= set(range(int(first), int(last or first) + 1))
    assert numbers == set(range(1, 25))
    assert len(ROWS) > 80


def test_a_figure_that_drifts_is_seen(names: dict[str, Any]) -> None:
    row = next(row for row in ROWS if row.what == "13e9 × 16")
    assert guide_claims.told(row, guide_claims.value_of(row, names)) == "193.7 GiB"
    assert guide_claims.told(row, 13e9 * 16 + 0.1 * 2**30) != row.figure


def test_no_table_row_escapes() -> None:
    """Every row of a table that has a code span is recomputed."""
    written = [line for line in PAGE.splitlines() if line.startswith("| ") and "`" in line]
    assert len(written) == len(ROWS)
