"""Memory lines of training logs: by rank and step, glued, coloured, restarted, and with a death at their end."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from ullage.errors import InputError
from ullage.observe.formats import inspect_source
from ullage.observe.inspection import Inspection
from ullage.report.inspect_json import inspect_json
from ullage.units import GiB, MiB

SCHEMA = json.loads((Path(__file__).parents[2] / "src/ullage/schema/inspect.json").read_text(encoding="utf-8"))
DEATH = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.19 GiB "
    "of which 1.00 GiB is free. Including non-PyTorch memory, this process has 78.00 GiB memory in use. Of the "
    "allocated memory 70.00 GiB is allocated by PyTorch, and 6.00 GiB is reserved by PyTorch but unallocated."
)


def inspected(text: str) -> Inspection:
    found = inspect_source("-", io.BytesIO(text.encode()))
    jsonschema.validate(inspect_json(found), SCHEMA)
    return found


def ranks(found: Inspection) -> dict[str, dict[str, Any]]:
    table = next(each for each in found.listings if each.name == "ranks")
    return {str(row[0]): dict(zip(table.columns, row, strict=True)) for row in table.rows}


def megatron(rank: int, step: int, *amounts: float) -> str:
    names = ("allocated", "max allocated", "reserved", "max reserved", "total device memory used")
    parts = " | ".join(f"{name}: {amount}" for name, amount in zip(names, amounts, strict=False))
    return f"[Rank {rank}] (after {step} iterations) memory (MB) | {parts}"


def titan(step: int, gib: float, prefix: str = "[rank0]:") -> str:
    share = gib / 79.19 * 100
    return (
        f"{prefix}[titan] 2025-06-16 22:30:50,322 - root - INFO - \x1b[31mstep: {step:2}  \x1b[32mloss:  6.1384  "
        f"\x1b[38;2;180;60;0mmemory: {gib:5.2f}GiB({share:.2f}%)  \x1b[34mtps: 5,856  \x1b[35mmfu: 34.29%\x1b[39m"
    )


def seen(label: str, *gib: float) -> str:
    head = "[2022-02-21 23:37:48,850] [INFO] [utils.py:8{}:see_memory_usage] "
    amounts = "         ".join(
        f"{name} {value} GB" for name, value in zip(("MA", "Max_MA", "CA", "Max_CA"), gib, strict=True)
    )
    return f"{head.format(22)}{label}\n{head.format(27)}{amounts} \n"


def test_megatron_lines_of_ranks_that_write_through_each_other() -> None:
    text = (
        " [2025-08-01 09:31:44] iteration        1/    5000 | consumed samples:          128 |\n"
        + megatron(4, 1, 18598.7529296875, 20931.01220703125, 21534.0, 21534.0)
        + megatron(0, 1, 20034.7529296875, 30227.64599609375, 31086.0, 31086.0)
        + "\r\n\r\n"
        + megatron(2, 1, 18598.75, 25079.27, 25890.0, 25890.0, 27000.5)
    )
    found = inspected(text)
    assert found.kind == "training_log"
    assert found.rank == "0"
    rows = ranks(found)
    assert rows.keys() == {"0", "2", "4"}
    assert rows["0"]["max_allocated_bytes"] == int(30227.64599609375 * MiB)
    assert rows["4"]["max_reserved_bytes"] == 21534 * MiB
    assert rows["2"]["device_used_bytes"] == int(27000.5 * MiB)
    assert dict(found.sizes)["peak_reserved"] == 31086 * MiB
    assert sum(term.bytes for term in found.terms) == found.total_bytes == 31086 * MiB
    assert dict(found.metrics)["fragmentation_rate"] == pytest.approx((31086 - 30227.64599609375) / 31086)
    assert any("--log-memory-interval" in note for note in found.notes)


def test_growth_of_one_rank_among_others() -> None:
    lines = []
    for step in range(1, 21):
        lines += [titan(step, 40.0, "[rank0]:"), titan(step, 40 + 0.5 * step, "[rank1]:")]
    found = inspected("\n".join(lines))
    assert found.cause == "leak"
    assert found.rank == "1"
    assert "512.0 MiB per step" in found.verdict
    assert ranks(found)["1"]["max_reserved_bytes"] == 50 * GiB
    assert dict(found.sizes)["capacity"] == pytest.approx(79.19 * GiB, rel=1e-3)


def test_peaks_that_only_settle_are_no_leak() -> None:
    levels = [30.0, 38.0, 39.5, 40.0] + [40.0] * 30
    assert inspected("\n".join(titan(step, level) for step, level in enumerate(levels, 1))).cause == "none"
    wild = [40.0 + (step * 7 % 5) for step in range(40)]
    assert inspected("\n".join(titan(step, level) for step, level in enumerate(wild, 1))).cause == "none"
    rising = [megatron(0, step, 100.0, 100.0 + step, 200.0, 200.0 + step) for step in range(30)]
    assert inspected("\n".join(rising)).cause == "none"  # peaks of the whole run only ever rise


def test_a_floor_that_rises_under_noise_is_a_leak() -> None:
    wild = [40.0 + (step * 7 % 5) * 0.1 + 0.2 * step for step in range(40)]
    assert inspected("\n".join(titan(step, level) for step, level in enumerate(wild, 1))).cause == "leak"


def test_ranks_that_are_not_named_count_by_their_largest() -> None:
    text = "\n".join(titan(step, 40 + rank, "") for step in range(1, 9) for rank in (0, 2, 1))
    found = inspected(text)
    assert found.series[0].points == tuple((float(step), 42 * GiB) for step in range(1, 9))
    assert any("which rank" in note for note in found.notes)


def test_retries_and_refusals() -> None:
    capacity = "[titan] INFO - CUDA capacity: NVIDIA H100 80GB HBM3 with 79.19GiB memory\n"
    text = capacity + titan(1, 78.0) + "\n[rank0]:[titan] - root - WARNING - 6 CUDA memory allocation retries.\n"
    found = inspected(text)
    assert (found.cause, found.confidence) == ("capacity", "unsure")
    assert "edge of the card" in found.verdict
    assert any("6 allocations" in note for note in found.notes)
    assert dict(found.sizes)["capacity"] == round(79.19 * GiB)
    found = inspected(text + "[rank0]:[titan] - root - WARNING - 2 CUDA OOM errors thrown.\n")
    assert "2 allocations were refused" in found.verdict
    assert ranks(found)["0"]["ooms"] == 2


def test_a_restart_begins_the_curve_anew() -> None:
    first = [titan(step, 40 + 0.5 * step) for step in range(1, 21)]
    second = [titan(step, 45.0) for step in range(10, 31)]
    found = inspected("\n".join(first + second))
    assert found.cause == "none"
    assert ranks(found)["0"]["max_reserved_bytes"] == 50 * GiB
    assert any("1 times" in note for note in found.notes)


def test_deepspeed_lines_with_their_moments() -> None:
    text = seen("before forward 1", 4.89, 4.89, 6.68, 7) + seen("before backward 1", 5.19, 5.31, 6.68, 7)
    found = inspected(text)
    assert dict(found.sizes) == {"peak_allocated": int(5.31 * GiB), "peak_reserved": int(6.68 * GiB)}
    assert {series.name for series in found.series} >= {
        "before forward # allocated_bytes", "before backward # allocated_bytes",
    }  # fmt: skip
    peak = inspected(seen("x", 1.0, 9.5, 2.0, 12))
    assert dict(peak.sizes)["peak_reserved"] == 12 * GiB


def test_a_leak_at_the_same_moment_of_each_step() -> None:
    parts = []
    for step in range(12):
        parts.append(seen(f"before forward {step}", 4 + 0.25 * step, 5.0, 20.0, 20))
        parts.append(seen(f"before backward {step}", 9 + 0.25 * step, 10.0, 20.0, 20))
    found = inspected("".join(parts))
    assert found.cause == "leak"
    assert "256.0 MiB per step" in found.verdict


def test_deepspeed_timer_lines() -> None:
    line = "[INFO] [timer.py] epoch=0/micro_step={0}/global_step={0}, MemAllocated=17.94GB, MaxMemAllocated=54.06GB\n"
    found = inspected("".join(line.format(step) for step in (10, 20)))
    assert dict(found.sizes)["peak_allocated"] == int(54.06 * GiB)
    assert ranks(found)["?"]["last_step"] == 20


def test_the_trainers_tracker_in_print_and_in_json() -> None:
    printed = (
        "***** train metrics *****\n  before_init_mem_gpu        =      100MB\n"
        "  init_mem_gpu_alloc_delta   =      230MB\n"
        "  train_mem_gpu_alloc_delta  =      693MB\n  train_mem_gpu_peaked_delta =     1661MB\n"
    )
    assert dict(inspected(printed).sizes) == {
        "peak_allocated": (100 + 230 + 693 + 1661) * MiB, "left_at_end": (100 + 230 + 693) * MiB,
    }  # fmt: skip
    names = (
        "before_init_mem_gpu",
        "init_mem_gpu_alloc_delta",
        "train_mem_gpu_alloc_delta",
        "train_mem_gpu_peaked_delta",
    )
    values = dict(zip(names, (100, 230, 693, 1661), strict=True))
    assert dict(inspected(json.dumps(values, indent=2)).sizes)["peak_allocated"] == 2684


def test_a_death_comes_first_and_keeps_the_figures() -> None:
    found = inspected("\n".join([titan(step, 40 + step) for step in range(1, 20)] + ["[rank0]: " + DEATH]))
    assert found.kind == "death"
    assert found.cause != "none"
    assert ranks(found)["0"]["max_reserved_bytes"] == 59 * GiB
    assert found.series


def test_a_log_that_is_cut_in_its_packing(tmp_path: Path) -> None:
    text = "\n".join(titan(step, 40 + step % 7) for step in range(1, 4000))
    packed = gzip.compress(text.encode())
    (tmp_path / "log").write_bytes(packed[: len(packed) // 2])
    found = inspect_source(str(tmp_path / "log"), io.BytesIO())
    assert found.partial
    assert "partial answer" in found.notes[0]
    assert dict(found.sizes)["peak_reserved"] == 46 * GiB


def test_a_line_that_is_cut() -> None:
    found = inspected(megatron(0, 1, 10.0, 20.0, 30.0, 30.0)[:80])
    assert ranks(found)["0"]["max_allocated_bytes"] in (2 * MiB, 20 * MiB, None)


@pytest.mark.parametrize(
    "text", ["memory (MB)", "step: 1 memory: 1GiB", "MA 1 GB Max_MA", "GiB(", "see_memory_usage] x"]
)
def test_words_without_figures(text: str) -> None:
    with pytest.raises(InputError):
        inspected(text)


def test_memory_does_not_grow_with_the_log() -> None:
    import tracemalloc

    def peak_of(num_steps: int) -> int:
        content = "\n".join(titan(step, 40.0) for step in range(num_steps)).encode()
        tracemalloc.start()
        assert inspect_source("-", io.BytesIO(content)).kind == "training_log"
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak_of(10)
    assert peak_of(12_000) < 1.2 * peak_of(6_000)
