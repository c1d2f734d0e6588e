"""Known cures, published: what helped is among the first pieces of advice, and its gain is foretold."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from conftest import need_shared

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import make_advice as known  # noqa: E402


@pytest.fixture(scope="module")
def found() -> list[known.Case]:
    return known.cases(need_shared("truth", "training.jsonl").parents[1])


def test_there_are_cases_of_every_kind(found: list[known.Case]) -> None:
    kinds = {case.kind for case in found}
    assert kinds >= {
        "micro_batch", "base_quantization", "seq_len", "loss", "sp", "pp", "tp", "compile",
        "memory_fraction", "more_gpus", "max_model_len", "message",
    }  # fmt: skip
    assert sum(case.kind == "message" for case in found) == len(known.MESSAGES)


def test_the_cure_is_among_the_first_three_or_it_is_written_down_why_not(found: list[known.Case]) -> None:
    missed = {(case.failed, what) for case in found for what in case.missed}
    assert missed == set(known.NOT_MET)
    told = [case for case in found if case.told]
    assert len(told) >= 10
    assert len(told) >= 0.85 * len(found)


def test_measured_gains_are_foretold(found: list[known.Case]) -> None:
    measured = [case for case in found if case.error is not None]
    near = [case for case in measured if abs(case.error or 0) <= known.WITHIN]
    assert len(near) >= 10
    assert len(near) >= 0.9 * len(measured)


def test_the_page_says_what_is_computed(found: list[known.Case]) -> None:
    page = (ROOT / "docs" / "advice.md").read_text(encoding="utf-8")
    assert known.counts(found) in page
    told = re.findall(r"^\| \[.*\|$", page, re.MULTILINE)
    assert told == known.rows([case for case in found if case.kind != "message"]) + known.rows(
        [case for case in found if case.kind == "message"]
    )
