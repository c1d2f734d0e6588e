"""A trace that torch.profiler records here says the same as torch.profiler's own sums."""

from __future__ import annotations

import io
import json
import warnings
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ullage.observe.formats import inspect_source
from ullage.observe.inspection import Inspection

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.reference
STEPS = 7
KEPT_BYTES = 4 * 50_000


def train(path: Path, *, leak: bool, **options: Any) -> SimpleNamespace:
    """Record real training steps on the CPU; return torch's own sums."""
    from torch.profiler import ProfilerActivity, profile, record_function, schedule

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    optimizer = torch.optim.AdamW(model.parameters())
    inputs, labels = torch.randn(32, 64), torch.randint(0, 10, (32,))
    kept, result = [], SimpleNamespace()

    def done(recorder: Any) -> None:
        recorder.export_chrome_trace(str(path))
        result.averages = recorder.key_averages()

    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True, with_flops=True,
        schedule=schedule(wait=0, warmup=1, active=STEPS, repeat=1), on_trace_ready=done, **options,
    ) as recorder:  # fmt: skip
        for _step in range(STEPS + 1):
            with record_function("forward"):
                loss = torch.nn.functional.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if leak:
                kept.append(torch.zeros(KEPT_BYTES // 4))
            recorder.step()
    return result


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    result = train(path, leak=True)
    result.events = json.loads(path.read_text())["traceEvents"]
    result.found = inspect_source(str(path), io.BytesIO())
    return result


def column(found: Inspection, table: str, name: str) -> dict[str, Any]:
    listing = next(each for each in found.listings if each.name == table)
    return {str(row[0]): listing.of(row, name) for row in listing.rows}


def test_the_peak_is_the_largest_total_that_was_recorded(recorded: SimpleNamespace) -> None:
    totals = [each["args"]["Total Allocated"] for each in recorded.events if each["name"] == "[memory]"]
    assert dict(recorded.found.sizes)["peak_allocated"] == max(totals)
    assert sum(term.bytes for term in recorded.found.terms) == max(totals)


def test_bytes_by_operator_are_those_of_key_averages(recorded: SimpleNamespace) -> None:
    theirs = {each.key: each.self_cpu_memory_usage for each in recorded.averages if each.key != "[memory]"}
    ours = column(recorded.found, "operators", "net_bytes")
    assert len(ours) > 30
    assert {name: theirs[name] for name in ours} == ours
    assert sum(size for name, size in theirs.items() if name not in ours) == 0


def test_calls_and_flops_are_those_of_key_averages(recorded: SimpleNamespace) -> None:
    counts = column(recorded.found, "operators", "count")
    assert counts == {each.key: each.count for each in recorded.averages if each.key in counts}
    flops = column(recorded.found, "operator_density", "work_flops")
    assert flops == {each.key: each.flops for each in recorded.averages if each.key in ("aten::mm", "aten::addmm")}


def test_the_leak_of_each_step_is_found(recorded: SimpleNamespace) -> None:
    found = recorded.found
    assert found.cause == "leak"
    steps = next(each for each in found.series if each.name.endswith("step_end_bytes")).points
    assert len(steps) == STEPS
    growth = [later[1] - earlier[1] for earlier, later in pairwise(steps[1:])]
    assert set(growth) == {KEPT_BYTES}
    assert "per step" in found.verdict
    assert "optimizer step" in found.why


def test_steps_that_keep_nothing_are_no_leak(tmp_path: Path) -> None:
    train(tmp_path / "trace.json", leak=False)
    assert inspect_source(str(tmp_path / "trace.json"), io.BytesIO()).cause == "none"


def test_modules_are_named_where_stacks_were_recorded(tmp_path: Path) -> None:
    from torch.profiler import ProfilerActivity, profile

    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 100_000))
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, with_stack=True, with_modules=True
    ) as recorder:
        model(torch.ones(16, 8))
    recorder.export_chrome_trace(str(tmp_path / "trace.json"))
    found = inspect_source(str(tmp_path / "trace.json"), io.BytesIO())
    assert "aten::addmm" in found.why
    assert "Linear_1" in found.why
    assert Path(__file__).name in found.why


def test_both_forms_of_a_timeline(tmp_path: Path) -> None:
    from torch.profiler import ProfilerActivity, profile

    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters())
    options = {"profile_memory": True, "record_shapes": True, "with_stack": True}
    with profile(activities=[ProfilerActivity.CPU], **options) as recorder:
        model(torch.ones(4, 64)).sum().backward()
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recorder.export_memory_timeline(str(tmp_path / "t.json"), "cpu")
        recorder.export_memory_timeline(str(tmp_path / "t.raw.json.gz"), "cpu")
    times, sums = json.loads((tmp_path / "t.json").read_text())
    summed, raw = (inspect_source(str(tmp_path / name), io.BytesIO()) for name in ("t.json", "t.raw.json.gz"))
    assert len(times) == len(sums)
    assert dict(summed.sizes)["peak_allocated"] == max(sum(row) for row in sums)
    assert dict(summed.sizes)["left_at_end"] == dict(raw.sizes)["left_at_end"] == sum(sums[-1])
    assert dict(raw.sizes)["peak_allocated"] >= dict(summed.sizes)["peak_allocated"]  # several events in a microsecond
    assert {"parameters", "gradients"} <= {term.name for term in raw.terms}
    assert {term.name: term.bytes for term in raw.terms}["parameters"] == 4 * (64 * 64 + 64)
