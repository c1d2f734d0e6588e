"""Exports of Nsight Systems: built from the documented schema, checked by plain SQL; older, newer and hostile ones."""

from __future__ import annotations

import io
import json
import sqlite3
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from ullage.cli import main
from ullage.errors import InputError
from ullage.observe import nsys_tables
from ullage.observe.formats import inspect_source
from ullage.observe.inspection import Inspection
from ullage.observe.nsys import inspect_nsys
from ullage.observe.roofline import gpu_named
from ullage.report.inspect_json import inspect_json

SCHEMA = json.loads((Path(__file__).parents[2] / "src/ullage/schema/inspect.json").read_text(encoding="utf-8"))
MiB = 1 << 20
PROCESS = 77 << 24
#: Columns as the schema reference of the tool lists them.
TABLES = """
CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE ENUM_CUDA_MEM_KIND (id INTEGER NOT NULL PRIMARY KEY, name TEXT, label TEXT);
CREATE TABLE ENUM_CUDA_DEV_MEM_EVENT_OPER (id INTEGER NOT NULL PRIMARY KEY, name TEXT, label TEXT);
CREATE TABLE ENUM_CUDA_MEMCPY_OPER (id INTEGER NOT NULL PRIMARY KEY, name TEXT, label TEXT);
CREATE TABLE TARGET_INFO_GPU (vmId INTEGER, id INTEGER, name TEXT, busLocation TEXT, totalMemory INTEGER,
    memoryBandwidth INTEGER, smCount INTEGER);
CREATE TABLE TARGET_INFO_CUDA_DEVICE (gpuId INTEGER, cudaId INTEGER, pid INTEGER, uuid TEXT);
CREATE TABLE CUDA_GPU_MEMORY_USAGE_EVENTS (start INTEGER NOT NULL, globalPid INTEGER NOT NULL,
    deviceId INTEGER NOT NULL, contextId INTEGER NOT NULL, address INTEGER NOT NULL, pc INTEGER NOT NULL,
    bytes INTEGER NOT NULL, memKind INTEGER NOT NULL, memoryOperationType INTEGER NOT NULL, name TEXT,
    correlationId INTEGER, streamId INTEGER, localMemoryPoolAddress INTEGER, localMemoryPoolReleaseThreshold INTEGER,
    localMemoryPoolSize INTEGER, localMemoryPoolUtilizedSize INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    contextId INTEGER NOT NULL, streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER,
    demangledName INTEGER NOT NULL, shortName INTEGER NOT NULL);
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    streamId INTEGER NOT NULL, bytes INTEGER NOT NULL, copyKind INTEGER NOT NULL);
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMSET (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    bytes INTEGER NOT NULL, memKind INTEGER NOT NULL);
CREATE TABLE NVTX_EVENTS (start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL, text TEXT,
    globalTid INTEGER, textId INTEGER, domainId INTEGER);
"""
KINDS = ((0, "Pageable"), (1, "Pinned"), (2, "Device"), (3, "Array"), (4, "Managed"), (5, "Device Static"))


def put(base: sqlite3.Connection, table: str, **values: Any) -> None:
    names, marks = ", ".join(f'"{name}"' for name in values), ", ".join("?" * len(values))
    base.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", tuple(values.values()))


def allocate(
    base: sqlite3.Connection, start: int, address: int, size: int, *, freed: bool = False, **more: Any
) -> None:
    row = {
        "globalPid": PROCESS, "deviceId": 0, "contextId": 1, "pc": 0, "memKind": 2,
        "memoryOperationType": int(freed), **more,
    }  # fmt: skip
    put(base, "CUDA_GPU_MEMORY_USAGE_EVENTS", start=start, address=address, bytes=size, **row)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    path = tmp_path / "report.sqlite"
    base = sqlite3.connect(path)
    base.executescript(TABLES)
    for number, name in enumerate(("", "gemm<bf16>", "relu", "iteration")):
        put(base, "StringIds", id=number, value=name)
    for number, label in KINDS:
        put(base, "ENUM_CUDA_MEM_KIND", id=number, name=f"KIND_{number}", label=label)
    put(base, "ENUM_CUDA_DEV_MEM_EVENT_OPER", id=0, name="OPR_ALLOCATION", label="Allocation")
    put(base, "ENUM_CUDA_DEV_MEM_EVENT_OPER", id=1, name="OPR_DEALLOCATION", label="Deallocation")
    for number, label in ((1, "Host-to-Device"), (2, "Device-to-Host"), (8, "Device-to-Device")):
        put(base, "ENUM_CUDA_MEMCPY_OPER", id=number, name=f"KIND_{number}", label=label)
    put(base, "TARGET_INFO_GPU", vmId=0, id=3, name="NVIDIA H100 80GB HBM3", totalMemory=84_929_347_584)
    put(base, "TARGET_INFO_CUDA_DEVICE", gpuId=3, cudaId=0, pid=77)
    allocate(base, 50, 7000, 64 * MiB, memKind=1)  # pinned: on the host
    for turn in range(6):
        start = 1000 * turn
        put(base, "NVTX_EVENTS", start=start, end=start + 900, eventType=59, textId=3, globalTid=PROCESS + 5)
        inner = {"text": f"layer {turn}", "globalTid": PROCESS + 5}
        put(base, "NVTX_EVENTS", start=start + 90, end=start + 250, eventType=59, **inner)
        allocate(base, start + 100, 4096 * turn, 20 * MiB)
        allocate(base, start + 200, 900_000 + turn, (5 + turn) * MiB, memKind=4)
        allocate(base, start + 300, 900_000 + turn, (5 + turn) * MiB, freed=True, memKind=4)
        if turn % 2:
            allocate(base, start + 400, 4096 * turn, 20 * MiB, freed=True)
        names = {"deviceId": 0, "contextId": 1, "streamId": 7}
        for name, begin, end in ((1, 300, 600), (2, 500, 700)):
            times = {"start": start + begin, "end": start + end}
            put(base, "CUPTI_ACTIVITY_KIND_KERNEL", demangledName=name, shortName=name, **names, **times)
        put(base, "CUPTI_ACTIVITY_KIND_MEMCPY", start=start + 700, end=start + 750, deviceId=0, streamId=7,
            bytes=1 << 16, copyKind=8 if turn else 1)  # fmt: skip
    base.commit()
    base.close()
    return path


def table(found: Inspection, name: str) -> list[dict[str, Any]]:
    listing = next(each for each in found.listings if each.name == name)
    return [dict(zip(listing.columns, row, strict=True)) for row in listing.rows]


def test_totals_are_those_of_plain_sql(export: Path) -> None:
    found = inspect_source(str(export), io.BytesIO())
    jsonschema.validate(inspect_json(found), SCHEMA)
    base = sqlite3.connect(export)
    delta = "CASE memoryOperationType WHEN 0 THEN bytes ELSE -bytes END"
    running = (
        f"SELECT start, sum({delta}) OVER (ORDER BY start, rowid) AS total FROM CUDA_GPU_MEMORY_USAGE_EVENTS "
        "WHERE memKind != 1 AND deviceId = 0"
    )
    peak, when = base.execute(f"SELECT total, start FROM ({running}) ORDER BY total DESC, start LIMIT 1").fetchone()
    left = base.execute(f"SELECT sum({delta}) FROM CUDA_GPU_MEMORY_USAGE_EVENTS WHERE memKind != 1").fetchone()[0]
    assert dict(found.sizes) == {
        "capacity": 84_929_347_584, "peak_driver": peak, "left_at_end": left, "peak_host_pinned": 64 * MiB,
    }  # fmt: skip
    assert sum(term.bytes for term in found.terms) == peak == found.total_bytes
    kernels = base.execute(
        "SELECT s.value, sum(k.end - k.start) / 1e3, count(*) FROM CUPTI_ACTIVITY_KIND_KERNEL k "
        "JOIN StringIds s ON s.id = k.demangledName GROUP BY 1"
    ).fetchall()
    ours = [(row["kernel"], row["time_us"], row["count"]) for row in table(found, "kernels")]
    assert sorted(ours) == sorted(kernels)
    copies = base.execute("SELECT copyKind, sum(bytes) FROM CUPTI_ACTIVITY_KIND_MEMCPY GROUP BY 1").fetchall()
    assert sorted(row["moved_bytes"] for row in table(found, "copies")) == sorted(size for _kind, size in copies)
    ranges = base.execute("SELECT text FROM NVTX_EVENTS WHERE start <= ? AND end >= ? ORDER BY start", (when, when))
    assert f"iteration > {[row[0] for row in ranges][1]}" in found.why


def test_what_is_seen_is_said(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(export)]) == 0
    out = capsys.readouterr().out
    assert "segments of its pool, not tensors" in out
    assert "iteration" in out
    assert "managed" in out


def test_a_leak_from_turn_to_turn(export: Path) -> None:
    found = inspect_nsys(export)
    iterations = next(row for row in table(found, "ranges") if row["range"] == "iteration")
    assert iterations["count"] == 6
    assert iterations["growth_bytes"] == 3 * 20 * MiB  # every second turn leaves a segment
    assert next(row for row in table(found, "ranges") if row["range"] == "layer #")["count"] == 6


def test_busy_time_counts_overlaps_once(export: Path) -> None:
    row = table(inspect_nsys(export), "devices")[0]
    assert row["busy_us"] == pytest.approx(6 * (400 + 50) / 1e3)
    assert row["busy_share"] == pytest.approx(6 * 450 / (5750 - 300))


def test_copies_on_the_card_are_held_against_its_bandwidth(export: Path) -> None:
    row = next(row for row in table(inspect_nsys(export), "copies") if row["copy"] == "Device-to-Device")
    gpu = gpu_named("NVIDIA H100 80GB HBM3")
    assert gpu is not None
    assert row["bytes_per_s"] == pytest.approx((1 << 16) / 50e-9)
    assert row["bandwidth_share"] == pytest.approx(2 * (1 << 16) / 50e-9 / gpu.bandwidth_bytes_per_s)


def test_without_enums_numbers_mean_what_they_always_meant(export: Path) -> None:
    before = inspect_nsys(export)
    base = sqlite3.connect(export)
    base.executescript("DROP TABLE ENUM_CUDA_MEM_KIND; DROP TABLE ENUM_CUDA_DEV_MEM_EVENT_OPER; DROP TABLE NVTX_EVENTS")
    base.close()
    assert inspect_nsys(export).sizes == before.sizes


def test_enums_are_believed_over_numbers(export: Path) -> None:
    base = sqlite3.connect(export)
    base.executescript(
        "UPDATE ENUM_CUDA_DEV_MEM_EVENT_OPER SET id = id + 10;"
        "UPDATE CUDA_GPU_MEMORY_USAGE_EVENTS SET memoryOperationType = memoryOperationType + 10;"
    )
    base.close()
    assert dict(inspect_nsys(export).sizes)["peak_driver"] == 90 * MiB


def test_kernels_alone_are_a_partial_answer(export: Path) -> None:
    base = sqlite3.connect(export)
    base.execute("DROP TABLE CUDA_GPU_MEMORY_USAGE_EVENTS")
    base.commit()
    base.close()
    found = inspect_nsys(export)
    assert found.partial
    assert "--cuda-memory-usage=true" in found.advice[0].flags
    assert table(found, "kernels")


def test_what_was_allocated_before_the_recording(export: Path) -> None:
    base = sqlite3.connect(export)
    allocate(base, 5900, 123, MiB, freed=True)
    base.commit()
    base.close()
    found = inspect_nsys(export)
    assert dict(found.sizes)["peak_driver"] == 90 * MiB
    assert any("before the recording" in note and note.startswith("1 ") for note in found.notes)


def test_devices_are_chosen(export: Path) -> None:
    base = sqlite3.connect(export)
    allocate(base, 100, 5, 500 * MiB, deviceId=1)
    base.commit()
    base.close()
    assert inspect_nsys(export).verdict.startswith("device 1")
    assert dict(inspect_nsys(export, 0).sizes)["peak_driver"] == 90 * MiB
    with pytest.raises(InputError, match="device 4"):
        inspect_nsys(export, 4)


@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"\xff" * 10_000])
def test_no_database(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").write_bytes(b"SQLite format 3\0" + content)
    assert main(["inspect", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert "Nsight Systems" in error
    assert error.count("\n") == 1


def test_another_database(tmp_path: Path) -> None:
    base = sqlite3.connect(tmp_path / "x")
    base.execute("CREATE TABLE people (name TEXT)")
    base.commit()
    with pytest.raises(InputError, match="none of the tables"):
        inspect_nsys(tmp_path / "x")


def test_a_damaged_export_is_answered_or_refused(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = export.read_bytes()
    for place in range(100, len(content), 997):
        damaged = bytearray(content)
        damaged[place : place + 40] = bytes(reversed(damaged[place : place + 40]))
        export.write_bytes(damaged)
        assert main(["inspect", str(export), "--json"]) in (0, 2)
        assert "Traceback" not in capsys.readouterr().err
    export.write_bytes(content[: len(content) // 2])
    assert main(["inspect", str(export)]) in (0, 2)


def test_values_of_any_type_are_lived_with(export: Path) -> None:
    base = sqlite3.connect(export)
    for odd in ("text", b"\xff\x00", 1.5, 1e300, float("inf"), (1 << 63) - 1, -(1 << 63), "x" * 10_000):
        row = {"globalPid": odd, "deviceId": odd, "contextId": odd, "pc": 0, "memKind": odd, "memoryOperationType": odd}
        put(base, "CUDA_GPU_MEMORY_USAGE_EVENTS", start=odd, address=odd, bytes=odd, **row)
        put(base, "NVTX_EVENTS", start=odd, end=odd, eventType=59, text=odd, globalTid=odd, textId=odd)
        for name in ("CUPTI_ACTIVITY_KIND_MEMCPY",):
            put(base, name, start=odd, end=odd, deviceId=0, streamId=0, bytes=odd, copyKind=8)
    base.commit()
    base.close()
    found = inspect_nsys(export)
    jsonschema.validate(inspect_json(found), SCHEMA)
    assert dict(found.sizes)["peak_driver"] == 90 * MiB


def test_views_and_hidden_computations_are_not_run(tmp_path: Path) -> None:
    base = sqlite3.connect(tmp_path / "x")
    endless = "WITH RECURSIVE n(start) AS (SELECT 1 UNION ALL SELECT start + 1 FROM n) SELECT start FROM n"
    base.execute(f"CREATE VIEW CUDA_GPU_MEMORY_USAGE_EVENTS AS {endless}")
    base.execute(
        "CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER, end INTEGER GENERATED ALWAYS AS "
        "(length(hex(zeroblob(start)))) VIRTUAL, shortName INTEGER)"
    )
    base.execute("INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL (start, shortName) VALUES (100000000, 1)")
    base.commit()
    base.close()
    began = time.monotonic()
    assert inspect_nsys(tmp_path / "x").partial
    assert time.monotonic() - began < 5


def test_a_query_that_takes_too_long_is_given_up(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = sqlite3.connect(export)
    for start in range(60_000):
        allocate(base, start, start, 1)
    base.commit()
    base.close()
    monkeypatch.setattr(nsys_tables, "_OPCODES_PER_TICK", 1000)
    with nsys_tables.Tables(export, seconds=0.0) as tables:
        assert len(list(tables.rows("CUDA_GPU_MEMORY_USAGE_EVENTS", ("start",), order="start"))) < 60_000
        assert tables.stopped


def test_the_file_is_not_changed(export: Path) -> None:
    before = (export.read_bytes(), export.stat().st_mtime_ns)
    inspect_nsys(export)
    assert (export.read_bytes(), export.stat().st_mtime_ns) == before
    assert [path.name for path in export.parent.iterdir()] == [export.name]


def test_a_pipe_is_refused() -> None:
    with pytest.raises(InputError, match="pipe"):
        inspect_source("-", io.BytesIO(b"SQLite format 3\0"))
