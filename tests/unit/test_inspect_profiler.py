"""Traces and memory timelines of torch.profiler: hand-made ones, cut ones, and the published samples."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from conftest import need_shared

from ullage.cli import main
from ullage.errors import InputError
from ullage.observe.formats import inspect_source
from ullage.observe.inspection import Inspection
from ullage.observe.profiler import inspect_trace
from ullage.observe.profiler_stream import Document
from ullage.observe.profiler_timeline import inspect_timeline
from ullage.observe.roofline import gpu_named, ridge_of, work_of
from ullage.observe.unpacking import Unpacked
from ullage.report.inspect_json import inspect_json

SCHEMA = json.loads((Path(__file__).parents[2] / "src/ullage/schema/inspect.json").read_text(encoding="utf-8"))
MiB = 1 << 20
H100 = {"id": 0, "name": "NVIDIA H100 80GB HBM3", "totalGlobalMem": 85_000_000_000}


def operator(name: str, start: float, length: float, key: int = -1, cat: str = "cpu_op", **args: Any) -> dict[str, Any]:
    given = {"External id": key, **args} if key >= 0 else args
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": 1, "ts": start, "dur": length, "args": given}


def kernel(name: str, start: float, length: float, key: int, cat: str = "kernel", **args: Any) -> dict[str, Any]:
    given = {"External id": key, "device": 0, **args}
    return {"ph": "X", "cat": cat, "name": name, "pid": 0, "tid": 7, "ts": start, "dur": length, "args": given}


def memory(at: float, size: int, address: int, total: int, reserved: int, device: int = 0) -> dict[str, Any]:
    args = {
        "Total Reserved": reserved, "Total Allocated": total, "Bytes": size, "Device Id": device, "Device Type": 1,
        "Addr": address,
    }  # fmt: skip
    return {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "pid": 1, "tid": 1, "ts": at, "args": args}


def trace(*events: dict[str, Any], **heads: Any) -> bytes:
    return json.dumps({"schemaVersion": 1, **heads, "traceEvents": list(events), "traceName": "x"}).encode()


def inspected(content: bytes, **options: Any) -> Inspection:
    found = inspect_trace(io.BytesIO(content), **options)
    jsonschema.validate(inspect_json(found), SCHEMA)
    return found


def rows(found: Inspection, name: str) -> dict[str, dict[str, Any]]:
    table = next(each for each in found.listings if each.name == name)
    return {str(row[0]): dict(zip(table.columns, row, strict=True)) for row in table.rows}


STEP = (
    operator("ProfilerStep#3", 0, 1000, cat="user_annotation"),
    operator("forward", 10, 200, cat="user_annotation"),
    operator("aten::linear", 20, 100, 1),
    operator("aten::mm", 30, 50, 2, **{"Input Dims": [[1024, 512], [512, 256]], "Input type": ["c10::BFloat16"] * 2}),
    operator("nn.Module: Linear_0", 15, 150, cat="python_function"),
    operator("train.py(12): loop", 1, 990, cat="python_function"),
    operator("autograd::engine::evaluate_function: MmBackward0", 300, 200, 3),
    operator("aten::mul", 310, 20, 4),
    operator("Optimizer.step#AdamW.step", 600, 100, cat="user_annotation"),
    memory(35, 4 * MiB, 100, 14 * MiB, 20 * MiB),
    memory(315, 6 * MiB, 200, 20 * MiB, 32 * MiB),
    memory(320, -4 * MiB, 100, 16 * MiB, 32 * MiB),
    memory(610, -6 * MiB, 200, 10 * MiB, 32 * MiB),
    kernel("gemm", 40, 2.0, 2),
    kernel("mul", 320, 8.0, 4),
    kernel("Memcpy DtoD", 330, 1.0, 4, cat="gpu_memcpy", bytes=1_000_000),
)


def test_the_peak_its_moment_and_what_was_alive() -> None:
    found = inspected(trace(*reversed(STEP), deviceProperties=[H100]))
    sizes = dict(found.sizes)
    assert sizes["peak_allocated"] == 20 * MiB
    assert sizes["peak_reserved"] == sizes["reserved_at_peak"] == 32 * MiB
    assert sizes["before_recording"] == 10 * MiB
    assert sizes["capacity"] == 85_000_000_000
    assert {term.name: term.bytes for term in found.terms} == {
        "aten::mul": 6 * MiB, "aten::mm": 4 * MiB, "before_recording": 10 * MiB,
    }  # fmt: skip
    assert sum(term.bytes for term in found.terms) == found.total_bytes == 20 * MiB
    assert "backward" in found.why
    assert "evaluate_function: MmBackward0 > aten::mul" in found.why
    assert "train.py(12)" in found.why
    assert dict(found.metrics)["fragmentation_rate"] == pytest.approx((32 - 20) / 32)
    assert not found.partial


def test_phases_and_operators() -> None:
    found = inspected(trace(*STEP))
    phases = rows(found, "phases")
    assert phases["forward"]["allocated_bytes"] == 4 * MiB
    assert phases["backward"] == {
        "phase": "backward", "peak_bytes": 20 * MiB, "allocated_bytes": 6 * MiB, "freed_bytes": 4 * MiB,
        "alive_at_peak_bytes": 6 * MiB, "count": 2,
    }  # fmt: skip
    assert phases["optimizer step"]["freed_bytes"] == 6 * MiB
    operators = rows(found, "operators")
    assert operators["aten::linear"]["self_us"] == 50
    assert operators["aten::mul"]["net_bytes"] == 2 * MiB


def test_density_against_the_ridge() -> None:
    found = inspected(trace(*STEP, deviceProperties=[H100]))
    flops = 2 * 1024 * 512 * 256
    moved = 2 * (1024 * 512 + 512 * 256 + 1024 * 256)
    row = rows(found, "kernel_density")["gemm"]
    assert row["work_flops"] == flops
    assert row["moved_bytes"] == moved
    assert row["compute_density"] == flops / moved
    assert row["flops_per_s"] == pytest.approx(flops / 2e-6)
    gpu = gpu_named("NVIDIA H100 80GB HBM3")
    assert gpu is not None
    assert row["ridge_density"] == dict(gpu.flops)["bfloat16"] / gpu.bandwidth_bytes_per_s
    assert row["waits_for"] == "memory"
    assert rows(found, "phase_density")["forward"]["compute_density"] == flops / moved
    copies = rows(found, "copies")["Memcpy DtoD"]
    assert copies["bytes_per_s"] == pytest.approx(1e12)
    busy = rows(found, "devices")["0"]
    assert busy["busy_us"] == pytest.approx(2 + 8 + 1 - 0)
    assert busy["busy_share"] == pytest.approx(11 / 1000)


def test_a_leak_is_found_by_its_floor() -> None:
    events = []
    for step in range(8):
        start = 1000.0 * step
        events.append(operator(f"ProfilerStep#{step}", start, 900, cat="user_annotation"))
        events.append(operator("aten::empty", start + 10, 10, step))
        events.append(memory(start + 15, 2 * MiB, step + 1, (step + 1) * 2 * MiB, 64 * MiB))
    found = inspected(trace(*events))
    assert found.cause == "leak"
    assert "2.0 MiB per step" in found.verdict
    assert "aten::empty" in found.advice[0].change
    steady = [memory(each["ts"] + 20, -each["args"]["Bytes"], each["args"]["Addr"], 0, 64 * MiB)
              for each in events if each["name"] == "[memory]"]  # fmt: skip
    assert inspected(trace(*events, *steady)).cause == "none"


def test_two_devices() -> None:
    content = trace(*STEP, memory(50, 64 * MiB, 9, 64 * MiB, 64 * MiB, device=1))
    assert inspected(content).verdict.startswith("cuda:1")
    assert dict(inspected(content, device=0).sizes)["peak_allocated"] == 20 * MiB
    with pytest.raises(InputError, match="device 5"):
        inspected(content, device=5)


def test_old_recorders_without_totals() -> None:
    events = [memory(at, size, address, 0, 0) for at, size, address in ((1, 8, 1), (2, 16, 2), (3, -8, 1))]
    for event in events:
        del event["args"]["Total Allocated"], event["args"]["Total Reserved"]
    assert dict(inspected(trace(*events)).sizes)["peak_allocated"] == 24


def test_a_cut_trace_gives_a_partial_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = trace(*STEP, *(operator("aten::add", 700 + at, 1, at) for at in range(2000)))
    for name, cut in (("t.json", content[:20_000]), ("t.json.gz", gzip.compress(content)[:2500])):
        (tmp_path / name).write_bytes(cut)
        assert main(["inspect", str(tmp_path / name)]) == 0
        out = capsys.readouterr().out
        assert "partial answer" in out
        assert "20.0 MiB allocated" in out


def test_broken_events_are_skipped() -> None:
    content = trace(*STEP).replace(b'"name": "aten::linear"', b'"name": aten::linear', 1)
    found = inspected(content)
    assert found.partial
    assert dict(found.sizes)["peak_allocated"] == 20 * MiB


@pytest.mark.parametrize("name", ["t.json", "anything", "t.json.gz"])
def test_a_trace_is_known_by_its_content(name: str, tmp_path: Path) -> None:
    content = trace(*STEP)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert inspect_source(str(tmp_path / name), io.BytesIO()).kind == "profiler_trace"
    assert inspect_source("-", io.BytesIO(json.dumps(list(STEP)).encode())).kind == "profiler_trace"


@pytest.mark.parametrize(
    ("name", "dims", "more", "flops", "elements"),
    [
        ("aten::mm", [[3, 5], [5, 7]], None, 2 * 3 * 5 * 7, 15 + 35 + 21),
        ("aten::addmm", [[7], [3, 5], [5, 7]], None, 2 * 3 * 5 * 7, 15 + 35 + 21),
        ("aten::bmm", [[2, 3, 5], [2, 5, 7]], None, 4 * 3 * 5 * 7, 2 * (15 + 35 + 21)),
        (
            "aten::conv2d",
            [[2, 3, 8, 8], [4, 3, 3, 3], []],
            ["", "", "", "[2, 2]", "[1, 1]", "[1, 1]", "1"],
            2 * 2 * 4 * 4 * 4 * 27,
            2 * 3 * 64 + 4 * 27 + 2 * 4 * 16,
        ),
        (
            "aten::_scaled_dot_product_flash_attention",
            [[1, 2, 16, 8], [1, 2, 32, 8], [1, 2, 32, 8]],
            None,
            2 * 2 * 16 * 32 * 16,
            256 + 512 + 512 + 256,
        ),
    ],
)
def test_work_of_operators(name: str, dims: object, more: object, flops: int, elements: int) -> None:
    work = work_of(name, dims, ["float", "float", "float"], more)
    assert work is not None
    assert (work.flops, work.moved_bytes) == (flops, 4 * elements)


@pytest.mark.parametrize(
    "dims", [None, [], [[1]], [[3, 5], [6, 7]], [[-1, 5], [5, 7]], [["a", 5], [5, 7]], "x", [1, 2]]
)
def test_shapes_that_do_not_tell(dims: object) -> None:
    assert work_of("aten::mm", dims, None) is None


def test_ridges() -> None:
    gpu = gpu_named("NVIDIA A100-SXM4-80GB")
    assert ridge_of(gpu, "float16") == ridge_of(gpu, "bfloat16") == pytest.approx(312e12 / 2.039e12)
    assert ridge_of(gpu, "float64") is None
    assert gpu_named("a card of my own") is None


def test_a_document_is_read_in_pieces_of_any_size() -> None:
    content = trace(*STEP, numbers=[1.5, -2e3], text='ä\\u00e4 "}')

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(min(size or 0, 7))

    document = Document(Slow(content))
    items = list(document.items("traceEvents"))
    assert [value for key, value in items if key == "traceEvents"] == list(STEP)
    assert dict(items)["numbers"] == [1.5, -2e3]
    assert not document.truncated


def test_packed_members_one_after_the_other() -> None:
    content = gzip.compress(b"one") + gzip.compress(b"two") + b"\0" * 100
    unpacked = Unpacked(io.BytesIO(content))
    parts = []
    while part := unpacked.read(2):
        parts.append(part)
    assert b"".join(parts) == b"onetwo"
    assert not unpacked.broken


RAW = [
    [-1, 1, 100, 0], [10_000, 2, 50, 4], [20_000, 3, -50, 4], [20_000, 3, 50, 7], [30_000, 2, 30, 5],
    [40_000, 4, -50, 7],
]  # fmt: skip


def test_a_raw_timeline() -> None:
    found = inspect_timeline(io.BytesIO(json.dumps(RAW).encode()))
    jsonschema.validate(inspect_json(found), SCHEMA)
    assert dict(found.sizes) == {"peak_allocated": 180, "left_at_end": 130}
    assert {term.name: term.bytes for term in found.terms} == {"parameters": 100, "gradients": 30, "unknown": 50}
    assert dict(found.metrics)["parameter_memory_share"] == pytest.approx(100 / 180)


def test_a_summed_up_timeline() -> None:
    sums = [[0, 100, 0, 0, 0, 0, 0, 0, 0], [0, 100, 0, 0, 0, 70, 0, 0, 0], [0, 100, 0, 0, 0, 0, 5, 0, 0]]
    found = inspect_timeline(io.BytesIO(json.dumps([[1, 2, 3], sums]).encode()))
    assert dict(found.sizes) == {"peak_allocated": 170, "left_at_end": 105}
    assert {term.name: term.bytes for term in found.terms} == {"parameters": 100, "activations": 70}


def test_no_timeline() -> None:
    with pytest.raises(InputError, match="no memory timeline"):
        inspect_timeline(io.BytesIO(b"[[1, 2], [3]]"))


def test_the_sample_timeline() -> None:
    path = need_shared(
        "snapshots", "facebookresearch__HolisticTraceAnalysis__tests__data__memory_analysis__memory_timeline.raw.gz"
    )
    found = inspect_source(str(path), io.BytesIO())
    events = json.loads(gzip.decompress(path.read_bytes()))
    total = peak = 0
    at_peak: dict[int, int] = {}
    now: dict[int, int] = {}
    for _time, _action, size, category in events:
        total += size
        now[category] = now.get(category, 0) + size
        if total > peak:
            peak, at_peak = total, dict(now)
    assert dict(found.sizes) == {"peak_allocated": peak, "left_at_end": total}
    assert sorted(term.bytes for term in found.terms) == sorted(size for size in at_peak.values() if size)
    assert not found.partial


def test_the_sample_trace() -> None:
    folder = "facebookresearch__HolisticTraceAnalysis__tests__data__ns_resolution_trace__"
    path = need_shared("snapshots", folder + "rank-0.Apr_03_18_51_38.1102.pt.trace.json.gz")
    found = inspect_source(str(path), io.BytesIO())
    jsonschema.validate(inspect_json(found), SCHEMA)
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    times: dict[str, float] = {}
    for event in events:
        if event.get("cat") == "kernel":
            times[event["name"][:240]] = times.get(event["name"][:240], 0.0) + event["dur"]
    ours = {name: row["time_us"] for name, row in rows(found, "kernels").items()}
    assert ours == pytest.approx(times)
    copied = sum(each["args"]["bytes"] for each in events if each.get("cat") in ("gpu_memcpy", "gpu_memset"))
    assert dict(found.sizes) == {"capacity": 34_079_637_504, "copied": copied}
    assert "23,980 operators, 4,350 kernels" in found.verdict
    assert found.partial  # profile_memory was off
