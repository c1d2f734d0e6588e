"""Recordings of ``ullage watch``, read back."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from ullage.cli import main
from ullage.errors import InputError
from ullage.observe.formats import inspect_source
from ullage.observe.inspection import Inspection
from ullage.observe.recording import read_recording
from ullage.report.inspect_json import inspect_json

SCHEMA = json.loads((Path(__file__).parents[2] / "src/ullage/schema/inspect.json").read_text(encoding="utf-8"))
GiB = 1 << 30
HEAD = {
    "ullage_recording": 1, "started": "2026-11-22T10:00:00+00:00", "host": "node1",
    "devices": [{"index": each, "name": "NVIDIA H100 80GB HBM3", "total_bytes": 80 * GiB} for each in (0, 1)],
}  # fmt: skip


def lines(*samples: dict[str, Any], head: Any = HEAD) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in (head, *samples))


def sample(moment: float, used: int, device: int = 0, **more: Any) -> dict[str, Any]:
    return {"t": moment, "device": device, "used_bytes": used, **more}


def inspected(content: bytes, device: int | None = None) -> Inspection:
    found = inspect_source("-", io.BytesIO(content), device)
    jsonschema.validate(inspect_json(found), SCHEMA)
    return found


def test_the_books_at_the_peak() -> None:
    found = inspected(
        lines(
            sample(0, 10 * GiB, allocated_bytes=8 * GiB, reserved_bytes=9 * GiB),
            sample(
                1,
                60 * GiB,
                allocated_bytes=40 * GiB,
                reserved_bytes=50 * GiB,
                processes=[{"pid": 7, "used_bytes": 59 * GiB}],
            ),
            sample(1, 70 * GiB, device=1),
            sample(
                2,
                20 * GiB,
                allocated_bytes=45 * GiB // 3,
                reserved_bytes=18 * GiB,
                processes=[{"pid": 7, "used_bytes": GiB}],
            ),
            {"t": 1.5, "event": "alarm", "text": "device 1 is 87 % full"},
        )
    )
    assert found.kind == "recording"
    assert found.verdict == "device 1: peak 70.00 GiB of 80.00 GiB"
    first = inspected(lines(sample(0, GiB), sample(1, 60 * GiB, allocated_bytes=40 * GiB, reserved_bytes=50 * GiB)))
    assert {term.name: term.bytes // GiB for term in first.terms} == {
        "allocated": 40, "reserved_unallocated": 10, "outside_or_others": 10, "free": 20,
    }  # fmt: skip
    assert sum(term.bytes for term in first.terms) == first.total_bytes == 80 * GiB
    assert dict(first.metrics)["fragmentation_rate"] == pytest.approx(0.2)
    assert [each.rows[0][1:] for each in found.listings if each.name == "events"] == [
        ("alarm", "device 1 is 87 % full")
    ]


def test_a_device_is_chosen_and_its_processes_listed() -> None:
    processes = [{"pid": 7, "used_bytes": 5 * GiB}, {"pid": 8, "used_bytes": 2 * GiB}]
    content = lines(sample(0, 8 * GiB, processes=processes), sample(1, 9 * GiB), sample(1, 70 * GiB, device=1))
    found = inspected(content, 0)
    table = next(each for each in found.listings if each.name == "processes")
    assert table.rows == (("7", 5 * GiB), ("8", 2 * GiB))
    with pytest.raises(InputError, match="no samples"):
        inspected(content, 3)


def test_growth_retries_and_refusals() -> None:
    grown = [sample(60.0 * at, 30 * GiB + at * GiB // 4, num_alloc_retries=at // 10) for at in range(60)]
    found = inspected(lines(*grown))
    assert found.cause == "leak"
    assert "15.00 GiB per hour" in found.verdict
    assert any("5 allocations" in note for note in found.notes)
    found = inspected(lines(*grown, sample(4000, GiB, num_ooms=2)))
    assert (found.cause, found.confidence) == ("capacity", "unsure")
    assert "2 allocations were refused" in found.verdict
    steady = [sample(60.0 * at, 30 * GiB + (at % 4) * GiB) for at in range(60)]
    assert inspected(lines(*steady)).cause == "none"


def test_a_recording_that_was_cut(tmp_path: Path) -> None:
    content = lines(sample(0, GiB), sample(1, 2 * GiB))[:-20]
    found = inspected(content)
    assert found.partial
    assert dict(found.sizes)["peak_used"] == GiB
    assert main(["inspect", str(tmp_path / "nothing.jsonl")]) == 2


@pytest.mark.parametrize(
    "odd",
    [
        [], "x", 5, None, {}, {"t": "1"}, {"t": 1}, {"t": 1, "device": 0}, {"t": -1, "device": 0, "used_bytes": 1},
        {"t": 1, "device": "0", "used_bytes": 1}, {"t": 1, "device": 0, "used_bytes": -5},
        {"t": 1, "device": 0, "used_bytes": 1 << 70}, {"t": 1e300, "device": 0, "used_bytes": 1},
    ],
)  # fmt: skip
def test_lines_that_are_not_understood_are_counted(odd: Any) -> None:
    found = inspected(lines(sample(0, GiB), odd, sample(1, GiB)))
    assert found.partial
    assert "1 lines" in found.notes[0]


def test_odd_processes_are_passed_over() -> None:
    odd = [None, 5, {}, {"pid": "x"}, {"pid": 1, "used_bytes": -1}, {"pid": 2, "used_bytes": 5}]
    table = next(each for each in inspected(lines(sample(0, 9, processes=odd))).listings if each.name == "processes")
    assert table.rows == (("2", 5),)


def test_newer_recordings_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="version 2"):
        inspected(lines(sample(0, 1), head={**HEAD, "ullage_recording": 2}))
    with pytest.raises(InputError, match="no samples"):
        inspected(lines())
    with pytest.raises(InputError, match="no recording"):
        read_recording(io.BytesIO(b"{}\n"))


def test_what_watch_writes_is_read(tmp_path: Path) -> None:
    from ullage.guard.watch.record import Recorder
    from ullage.guard.watch.sample import Device, Process, Sample

    card = Device(index=0, name="card", total_bytes=80 * GiB)
    host = Device(index=-1, name="node1", total_bytes=64 * GiB, kind="host")
    recorder = Recorder(tmp_path / "run.jsonl", [card, host])
    for used in (10, 30, 20):
        processes = (Process(pid=5, used_bytes=used * GiB),)
        recorder.samples([Sample(device=card, used_bytes=used * GiB, processes=processes)])
        recorder.samples([Sample(device=host, used_bytes=63 * GiB)])
    recorder.event("restart", "smaller")
    recorder.close()
    found = inspected((tmp_path / "run.jsonl").read_bytes())
    assert found.verdict == "device 0: peak 30.00 GiB of 80.00 GiB"
    assert not found.partial
    assert any("host memory was 98.4 % full" in note for note in found.notes)
    assert {each.name for each in found.listings} == {"devices", "processes", "events"}


def test_long_recordings_keep_their_peak() -> None:
    many = (sample(at, 50 * GiB if at == 4321 else GiB + at) for at in range(20_000))
    found = inspected(lines(*many))
    assert dict(found.sizes)["peak_used"] == 50 * GiB
    points = found.series[0].points
    assert len(points) <= 2100
    assert max(size for _moment, size in points) == 50 * GiB
