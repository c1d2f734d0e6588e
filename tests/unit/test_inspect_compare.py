"""Two files of a kind, compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from test_inspect_profiler import MiB, memory, operator, trace
from test_inspect_recording import GiB, lines, sample
from test_inspect_training_logs import DEATH, megatron

from ullage.cli import main
from ullage.errors import InputError
from ullage.observe.compare import compare_files
from ullage.observe.inspection import Inspection
from ullage.report.inspect_json import inspect_json

SCHEMA = json.loads((Path(__file__).parents[2] / "src/ullage/schema/inspect.json").read_text(encoding="utf-8"))


def compared(folder: Path, now: bytes | str, before: bytes | str) -> Inspection:
    for name, content in (("now", now), ("before", before)):
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    found = compare_files(str(folder / "now"), str(folder / "before"))
    jsonschema.validate(inspect_json(found), SCHEMA)
    return found


def table(found: Inspection, name: str) -> dict[str, tuple[Any, ...]]:
    return {str(row[0]): row[1:] for each in found.listings if each.name == name for row in each.rows}


def run(*sizes: tuple[str, int]) -> bytes:
    events, total = [], 0
    for at, (name, size) in enumerate(sizes):
        total += size
        events += [operator(name, 100 * at, 50, at), memory(100 * at + 10, size, at + 1, total, total)]
    return trace(*events)


def test_traces_term_by_term(tmp_path: Path) -> None:
    now = run(("aten::mm", 10 * MiB), ("aten::empty", 5 * MiB), ("aten::cat", 3 * MiB))
    found = compared(tmp_path, now, run(("aten::mm", 4 * MiB), ("aten::empty", 5 * MiB), ("aten::add", MiB)))
    assert table(found, "terms") == {
        "aten::mm": (10 * MiB, 4 * MiB, 6 * MiB), "aten::cat": (3 * MiB, 0, 3 * MiB),
        "aten::add": (0, MiB, -MiB), "aten::empty": (5 * MiB, 5 * MiB, 0),
    }  # fmt: skip
    assert next(iter(table(found, "operators"))) == "aten::mm"
    assert "aten::empty" not in table(found, "operators")
    assert dict(found.sizes)["change_peak_allocated"] == 8 * MiB
    assert found.verdict == "peak allocated grew by 8.0 MiB, from 10.0 MiB to 18.0 MiB; most of it aten::mm (+6.0 MiB)"


def test_the_other_way_round_is_the_opposite(tmp_path: Path) -> None:
    one, other = run(("aten::mm", 10 * MiB)), run(("aten::mm", 4 * MiB))
    there, back = compared(tmp_path, one, other), compared(tmp_path, other, one)
    assert {name: -size for name, size in there.sizes} == dict(back.sizes)
    assert "shrank by 6.0 MiB" in back.verdict
    assert "is the same" in compared(tmp_path, one, one).verdict


def test_recordings(tmp_path: Path) -> None:
    found = compared(tmp_path, lines(sample(0, 9 * GiB)), lines(sample(0, 4 * GiB)))
    assert dict(found.sizes)["change_peak_used"] == 5 * GiB
    assert table(found, "devices")["0"] == (9 * GiB, 4 * GiB, 5 * GiB)
    assert {series.name for series in found.series} == {"now: device 0 used_bytes", "before: device 0 used_bytes"}


def test_logs_by_rank(tmp_path: Path) -> None:
    now = megatron(0, 1, 10.0, 20.0, 30.0, 30.0) + "\n" + megatron(1, 1, 10.0, 15.0, 20.0, 20.0)
    found = compared(tmp_path, now, megatron(0, 1, 10.0, 12.0, 30.0, 30.0))
    assert table(found, "ranks") == {"1": (15 * MiB, 0, 15 * MiB), "0": (20 * MiB, 12 * MiB, 8 * MiB)}


def test_a_size_that_only_one_has_is_no_change(tmp_path: Path) -> None:
    found = compared(tmp_path, megatron(0, 1, 10.0, 20.0, 30.0, 30.0, 50.0), megatron(0, 1, 10.0, 20.0, 30.0, 30.0))
    assert "change_peak_device_used" not in dict(found.sizes)


def test_a_log_that_died_and_one_that_did_not(tmp_path: Path) -> None:
    steps = megatron(0, 1, 10.0, 20.0, 30.0, 30.0) + "\n"
    found = compared(tmp_path, steps + DEATH, steps)
    assert found.kind == "comparison"
    assert any(note.startswith("now: ") for note in found.notes)


def test_files_of_different_kinds(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be compared"):
        compared(tmp_path, run(("aten::mm", 1)), lines(sample(0, 1)))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, size in (("now", 9), ("before", 4)):
        (tmp_path / name).write_bytes(lines(sample(0, size * GiB)))
    assert main(["inspect", str(tmp_path / "now"), "--against", str(tmp_path / "before")]) == 0
    assert "+5.00 GiB" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "now"), "--against", str(tmp_path / "before"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sizes"]["change_peak_used"] == 5 * GiB
