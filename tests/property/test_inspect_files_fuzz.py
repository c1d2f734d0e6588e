"""Whatever stands in a trace, a timeline, an export, a recording or a training log, it is answered or refused."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import sqlite3
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ullage.errors import InputError
from ullage.observe import training_logs
from ullage.observe.compare import compare
from ullage.observe.formats import inspect_source
from ullage.observe.inspection import Inspection
from ullage.observe.measured import Curve, rise_of
from ullage.observe.unpacking import Unpacked
from ullage.report.inspect_json import inspect_json

SCHEMA = json.loads((Path(__file__).parents[2] / "src/ullage/schema/inspect.json").read_text(encoding="utf-8"))
EXAMPLES = int(os.environ.get("ULLAGE_FUZZ_EXAMPLES", "60"))


def answer(content: bytes) -> Inspection | None:
    with contextlib.suppress(InputError):
        found = inspect_source("-", io.BytesIO(content))
        as_json = inspect_json(found)
        jsonschema.validate(as_json, SCHEMA)
        json.dumps(as_json)
        return found
    return None


odd = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5), st.integers(-(1 << 70), 1 << 70), st.floats(), st.text(max_size=6),
    st.sampled_from(["1", "0x10", "-7", [], {}, [1], [[2, 3], [3, 4]], "[1, 1]"]),
)  # fmt: skip
arguments = st.dictionaries(
    st.sampled_from(
        ["Bytes", "Addr", "Device Id", "Device Type", "Total Allocated", "Total Reserved", "External id", "device",
         "bytes", "Input Dims", "Input type", "Concrete Inputs"]
    ),
    odd,
)  # fmt: skip
events = st.fixed_dictionaries(
    {},
    optional={
        "ph": st.sampled_from(["X", "i", "M", 3]),
        "cat": st.sampled_from(["cpu_op", "user_annotation", "python_function", "kernel", "gpu_memcpy", 7]),
        "name": st.sampled_from(
            ["[memory]", "aten::mm", "aten::conv2d", "ProfilerStep#3", "ProfilerStep#x", "Optimizer.step", "forward",
             "nn.Module: Linear_0", "autograd::engine::evaluate_function: X", 5, "[bold]"]
        ),
        "ts": st.one_of(st.integers(0, 50), odd), "dur": st.one_of(st.integers(0, 50), odd), "pid": odd,
        "tid": st.integers(0, 1), "args": st.one_of(arguments, odd),
    },
)  # fmt: skip


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.one_of(events, odd), max_size=25), st.dictionaries(st.text(max_size=5), odd, max_size=3))
def test_any_trace(content: list[Any], heads: dict[str, Any]) -> None:
    document = {"schemaVersion": 1, "deviceProperties": [heads], **heads, "traceEvents": content}
    found = answer(json.dumps(document).encode())
    if found is not None and found.terms:
        assert sum(term.bytes for term in found.terms) >= found.total_bytes >= 0


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 400))
def test_a_trace_with_anything_in_it(noise: bytes, place: int) -> None:
    event = {"ph": "i", "name": "[memory]", "pid": 1, "tid": 1, "ts": 5, "args": {"Bytes": 8, "Addr": 1}}
    content = json.dumps({"schemaVersion": 1, "traceEvents": [event] * 4}).encode()
    answer(content[:place] + noise + content[place:])
    answer(content[:place])
    answer(gzip.compress(content)[: place // 4] + noise)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(st.one_of(st.lists(st.one_of(st.integers(-10, 10), odd), max_size=5), odd), max_size=12))
def test_any_timeline(content: list[Any]) -> None:
    answer(json.dumps([[-1, 1, 5, 0], *content]).encode())
    answer(json.dumps([[1, 2], content]).encode())


recorded = st.fixed_dictionaries(
    {},
    optional={
        "t": st.one_of(st.integers(0, 100), odd), "device": st.one_of(st.integers(0, 2), odd),
        "used_bytes": st.one_of(st.integers(0, 1 << 37), odd), "allocated_bytes": odd, "reserved_bytes": odd,
        "num_ooms": odd, "num_alloc_retries": odd, "event": odd, "text": odd,
        "processes": st.one_of(st.lists(st.dictionaries(st.sampled_from(["pid", "used_bytes"]), odd), max_size=3), odd),
    },
)  # fmt: skip


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(st.one_of(recorded, odd), max_size=20), odd)
def test_any_recording(content: list[Any], devices: Any) -> None:
    head = {"ullage_recording": 1, "devices": devices}
    found = answer(b"\n".join(json.dumps(line).encode() for line in (head, *content)))
    if found is not None:
        assert not compare(found, found).verdict.count("grew")


PIECES = [
    *training_logs.WORDS, "[Rank 3] ", "(after 12 iterations) ", " | allocated: 5.5", " | max reserved: 7", " | ",
    "step: 4 ",
    "memory: 12.5GiB(40.00%)", "3 CUDA memory allocation retries", "1 CUDA OOM errors thrown", "\n", "\r\n",
    "MA 1.0 GB         Max_MA 2.0 GB         CA 3.0 GB         Max_CA 4 GB", "global_step=7", "[rank1]: ", "\x1b[31m",
    "see_memory_usage] before 7", "MemAllocated=1.5GB, MaxMemAllocated=2.5GB", "train_mem_gpu_alloc_delta = 5MB",
    "9" * 30,
    "capacity: X with 79.19GiB memory", "CUDA out of memory. Tried to allocate 1.00 GiB",
    "Available KV cache memory: 5 GiB",
]  # fmt: skip


@settings(max_examples=2 * EXAMPLES, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=40))
def test_any_mixture_of_training_words(words: list[str]) -> None:
    answer("".join(words).encode())


@pytest.mark.parametrize("word", PIECES)
def test_no_word_repeated_takes_long(word: str) -> None:
    began = time.process_time()
    answer((word * (60_000 // len(word)) + "\n").encode())
    answer((word + " 1").encode() * 2_000)
    assert time.process_time() - began < 10


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_export(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / f"export{len(list(tmp_path.iterdir()))}"  # a fresh one for each example
    base = sqlite3.connect(path)
    base.execute("PRAGMA journal_mode=OFF")
    columns = ["start", "end", "deviceId", "globalPid", "address", "bytes", "memKind", "memoryOperationType",
               "copyKind", "shortName", "text", "textId", "id", "name", "label", "value", "totalMemory"]  # fmt: skip
    names = ["CUDA_GPU_MEMORY_USAGE_EVENTS", "CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_MEMCPY", "NVTX_EVENTS",
             "StringIds", "TARGET_INFO_GPU", "ENUM_CUDA_MEM_KIND"]  # fmt: skip
    cell = st.one_of(
        st.integers(0, 20), st.integers(-(1 << 63), (1 << 63) - 1), st.none(),
        st.text(st.characters(codec="utf-8"), max_size=5),
        st.floats(), st.binary(max_size=4),
    )  # fmt: skip
    for name in data.draw(st.lists(st.sampled_from(names), unique=True)):
        chosen = data.draw(st.lists(st.sampled_from(columns), unique=True, min_size=1))
        quoted = ", ".join('"' + each + '"' for each in chosen)
        base.execute(f"CREATE TABLE {name} ({quoted})")
        for row in data.draw(st.lists(st.tuples(*[cell] * len(chosen)), max_size=8)):
            base.execute(f"INSERT INTO {name} VALUES ({', '.join('?' * len(chosen))})", row)
    base.commit()
    base.close()
    with contextlib.suppress(InputError):
        jsonschema.validate(inspect_json(inspect_source(str(path), io.BytesIO())), SCHEMA)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(st.integers(0, 1 << 50), min_size=1, max_size=3000))
def test_a_curve_keeps_its_peak_and_its_end(values: list[int]) -> None:
    curve = Curve()
    for at, value in enumerate(values):
        curve.add(float(at), value)
    points = curve.points()
    assert max(value for _at, value in points) == max(values)
    assert points[-1] == (float(len(values) - 1), values[-1])
    assert len(points) <= 2050
    assert [at for at, _value in points] == sorted(at for at, _value in points)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.integers(5, 60), st.integers(20, 500))
def test_a_straight_rise_is_always_seen_and_a_fall_never(length: int, slope: int) -> None:
    line = [(float(at), 1000 + slope * at) for at in range(length)]
    rise = rise_of(line)
    assert rise is not None
    assert rise.per_x == pytest.approx(slope)
    assert rise_of([(at, -value) for at, value in line]) is None
    assert rise_of([(at, 10**9) for at, _value in line]) is None


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.binary(max_size=3000), st.integers(1, 500), st.integers(0, 60))
def test_unpacking_gives_back_what_was_packed(content: bytes, size: int, cut: int) -> None:
    packed = gzip.compress(content[:1000]) + gzip.compress(content[1000:])

    def unpack(raw: bytes) -> tuple[bytes, str]:
        unpacked, parts = Unpacked(io.BytesIO(raw)), []
        while part := unpacked.read(size):
            assert len(part) <= size
            parts.append(part)
        return b"".join(parts), unpacked.broken

    assert unpack(packed) == (content, "")
    part, _why = unpack(packed[: len(packed) - cut])
    assert content.startswith(part)
