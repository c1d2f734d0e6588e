"""What one change of a job does to memory: published pairs, measured against predicted differences."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import need_shared

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import make_ablations as ablations  # noqa: E402

MEDIAN = 0.10


@pytest.fixture(scope="module")
def found() -> list[ablations.Difference]:
    return ablations.differences([need_shared("truth", name) for name in ("training.jsonl", "megatron.jsonl")])


def test_there_are_pairs_of_every_kind(found: list[ablations.Difference]) -> None:
    assert len(found) > 1000
    changes = {one.change for one in found if not one.is_none}
    assert changes >= {"loss", "optimizer", "tensor parallel", "pipeline parallel", "LoRA", "micro-batch", "layout"}


def test_every_sign_is_right_but_for_those_that_are_explained(found: list[ablations.Difference]) -> None:
    wrong = {key: len(ones) for key, ones in ablations.wrong_signs(found).items()}
    assert {key: number for key, number in wrong.items() if number > ablations.WRONG.get(key, (0, ""))[0]} == {}


def test_an_explanation_that_is_no_longer_needed_goes(found: list[ablations.Difference]) -> None:
    assert set(ablations.WRONG) <= set(ablations.wrong_signs(found))


def test_the_size_of_a_difference_is_met_or_its_miss_is_written_down(found: list[ablations.Difference]) -> None:
    missed = {
        (change, quantity): median
        for change, quantity, _pairs, _number, _right, median in ablations.summary(found)
        if median is not None and median > MEDIAN
    }
    assert {key: median for key, median in missed.items() if key not in ablations.NOT_MET} == {}
    assert set(ablations.NOT_MET) <= set(missed), "a reason that is no longer needed goes"


def test_most_differences_are_met(found: list[ablations.Difference]) -> None:
    real = [one for one in found if not one.is_none and one.quantity != "device_used"]
    assert sum(one.right_sign for one in real) >= 0.98 * len(real)
    errors = sorted(abs(one.error) for one in real)
    assert errors[len(errors) // 2] <= 0.05


def test_where_nothing_was_measured_little_is_predicted(found: list[ablations.Difference]) -> None:
    """Allocated bytes alone: a device figure of a whole run hides small differences."""
    still = [one for one in found if one.is_none and one.quantity in ("max_allocated", "allocated_after_step")]
    quiet = [one for one in still if abs(one.predicted_change) < 0.03 * max(one.measured)]
    assert len(quiet) >= 0.9 * len(still) > 0


def test_the_page_says_what_is_computed(found: list[ablations.Difference]) -> None:
    page = (ROOT / "docs" / "ablations.md").read_text(encoding="utf-8")
    rows: dict[tuple[str, str], list[Any]] = {}
    for line in re.findall(r"^\| (.*) \|$", page.partition("## By change")[2].partition("\n## ")[0], re.MULTILINE):
        cells = [cell.strip() for cell in line.split(" | ")]
        if len(cells) == 6 and cells[2].isdigit():
            rows[(cells[0], cells[1])] = cells[2:]
    computed = ablations.summary(found)
    assert set(rows) == {(change, quantity) for change, quantity, *_rest in computed}
    for change, quantity, pairs, number, right, median in computed:
        told = rows[(change, quantity)]
        assert told[:3] == [str(pairs), str(number), f"{right}/{number}" if number else ""], (change, quantity)
        assert told[3] == ablations.percent(median), (change, quantity)
