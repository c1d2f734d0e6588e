"""The rules of the PyTorch frameworks and the kernel counts against published measurements."""

from __future__ import annotations

import statistics
from functools import lru_cache
from pathlib import Path

import pytest
from conftest import need_shared

from ullage.records.compare import Comparison
from ullage.records.validate import validate_files


@lru_cache
def compared(path: Path) -> tuple[Comparison, ...]:
    report = validate_files([path])
    assert not [error for error in report.internal_errors if "hf_trainer" in error or "kernels" in error]
    return report.comparisons


def judged(file: str, group: str, quantity: str) -> list[Comparison]:
    rows = [
        row
        for row in compared(need_shared("truth", file))
        if row.group == group and row.quantity == quantity and not row.skipped
    ]
    assert rows, f"nothing of {group} was judged"
    return rows


#: (file, group, quantity, median error at most, share inside at least, rows at least)
TARGETS = [
    ("training.jsonl", "fms-acceleration", "max_allocated", 0.03, 0.9, 97),
    ("training.jsonl", "fms-acceleration", "allocated_after_step", 0.01, 0.9, 97),
    ("training.jsonl", "fms-acceleration", "device_used", 0.08, 0.9, 97),
    ("training.jsonl", "peft-method-comparison", "allocated_after_step", 0.02, 0.9, 7),
    ("training.jsonl", "peft-method-comparison", "max_reserved", 0.10, 0.9, 7),
    ("training.jsonl", "llamafactory-wiki", "device_used", 0.08, 0.9, 6),
    ("training.jsonl", "qwen-readme", "device_used", 0.08, 0.9, 48),
    ("training.jsonl", "litgpt-resource-tables", "max_allocated", 0.02, 0.9, 23),
    ("training.jsonl", "litgpt-config-hub", "max_allocated", 0.03, 0.6, 32),  # rows for four cards repeat one card's
    ("training.jsonl", "fsdp_qlora", "max_reserved", 0.05, 0.9, 15),
    ("training.jsonl", "torchtitan-benchmarks", "max_reserved", 0.03, 0.9, 14),
    ("training.jsonl", "ms-swift-examples", "device_used", 0.08, 0.85, 21),  # dpo and reward models among them
    ("training.jsonl", "deepspeed-chat-logs", "max_allocated", 0.05, 0.9, 2),
    ("training.jsonl", "deepspeed-chat-logs", "allocated_after_step", 0.05, 0.5, 2),
    ("training.jsonl", "deepspeed-examples", "allocated_after_step", 0.02, 0.9, 2),
    ("training.jsonl", "deepspeed-examples", "max_allocated", 0.08, 0.6, 3),
    ("kernels.jsonl", "liger-kernel-bench", "max_allocated", 0.02, 0.9, 400),
]


@pytest.mark.parametrize(("file", "group", "quantity", "median", "inside", "rows"), TARGETS)
def test_published_figures_are_met(
    file: str, group: str, quantity: str, median: float, inside: float, rows: int
) -> None:
    found = judged(file, group, quantity)
    errors = [abs(row.error) for row in found if row.error is not None]
    assert len(found) >= rows
    assert statistics.median(errors) <= median
    assert sum(bool(row.inside) for row in found) >= inside * len(found)
