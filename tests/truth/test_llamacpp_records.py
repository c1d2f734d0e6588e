"""The llama.cpp family against published start-up logs: the figures that follow from rules must be met."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from conftest import need_shared

from ullage.records.summary import to_json
from ullage.records.validate import validate_files

FAMILY = ("llamacpp", "ik_llama.cpp", "ollama")


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """Every judged figure of the family's records."""
    source = need_shared("truth", "serving.jsonl")
    lines = [
        line for line in source.read_text(encoding="utf-8").splitlines() if json.loads(line)["job"]["engine"] in FAMILY
    ]
    file: Path = tmp_path_factory.mktemp("llamacpp") / "family.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [entry for entry in to_json(validate_files([file]))["records"] if entry["error"] is not None]


def errors(judged: list[dict[str, object]], quantity: str) -> list[float]:
    return [abs(float(str(entry["error"]))) for entry in judged if entry["quantity"] == quantity]


@pytest.mark.parametrize(("quantity", "bound"), [("weights", 0.015), ("kv_cache", 0.001), ("activation_peak", 0.03)])
def test_the_median_error_is_small(judged: list[dict[str, object]], quantity: str, bound: float) -> None:
    found = errors(judged, quantity)
    assert len(found) >= 10
    assert statistics.median(found) <= bound


def test_nine_in_ten_figures_lie_in_the_printed_range(judged: list[dict[str, object]]) -> None:
    inside = [
        float(str(entry["low"])) <= float(str(entry["measured"])) <= float(str(entry["high"])) for entry in judged
    ]
    assert sum(inside) / len(inside) >= 0.9
