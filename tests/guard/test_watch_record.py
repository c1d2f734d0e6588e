"""Recordings: whole lines, bounded space, and a full disk that ends the recording and nothing else."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest

from ullage.cli import main
from ullage.errors import InputError
from ullage.guard.watch.counters import read_counters
from ullage.guard.watch.exporter import Exporter, physical_index
from ullage.guard.watch.host import host_memory
from ullage.guard.watch.record import Recorder
from ullage.guard.watch.sample import Device, Process, Sample
from ullage.guard.watch.sampler import Line, Trend

GiB = 2**30
DEVICE = Device(index=0, name="card", total_bytes=80 * GiB)
SCHEMA = json.loads((Path(__file__).parents[2] / "src/ullage/schema/watch.json").read_text())


def sample(used, **more):
    return Sample(device=DEVICE, used_bytes=used, **more)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_recording_is_what_the_contract_says(tmp_path):
    path = tmp_path / "deep" / "run.jsonl"
    recorder = Recorder(path, [DEVICE])
    recorder.samples([sample(GiB, processes=(Process(pid=5, used_bytes=7),))])
    recorder.event("restart", "smaller")
    recorder.close()
    head, first, event = lines_of(path)
    assert head["ullage_recording"] == 1
    assert head["devices"] == [{"index": 0, "name": "card", "total_bytes": 80 * GiB, "kind": "gpu"}]
    assert first.pop("t") >= 0
    assert first == {"device": 0, "used_bytes": GiB, "processes": [{"pid": 5, "used_bytes": 7}]}
    assert (event["event"], event["text"]) == ("restart", "smaller")


def test_a_recording_is_bounded_and_each_file_stands_alone(tmp_path):
    path = tmp_path / "run.jsonl"
    recorder = Recorder(path, [DEVICE], max_bytes=4096, num_files=3)
    for number in range(1000):
        recorder.samples([sample(number)])
    recorder.close()
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["run.jsonl", "run.jsonl.1", "run.jsonl.2"]
    for file in files:
        assert file.stat().st_size < 4096 + 200
        assert lines_of(file)[0]["ullage_recording"] == 1
    assert lines_of(path)[-1]["used_bytes"] == 999 or lines_of(files[1])[-1]["used_bytes"] == 999


def test_an_older_recording_is_kept(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text("precious\n")
    Recorder(path, [DEVICE]).close()
    assert (tmp_path / "run.jsonl.1").read_text() == "precious\n"


def test_a_full_disk_ends_the_recording_only(tmp_path):
    recorder = Recorder(tmp_path / "run.jsonl", [DEVICE])
    os.dup2(os.open("/dev/full", os.O_WRONLY), recorder._descriptor)
    recorder.samples([sample(1)])
    recorder.samples([sample(2)])
    assert "No space" in recorder.error
    with pytest.raises(InputError, match="cannot be written"):
        Recorder("/proc/nothing/run.jsonl", [DEVICE])


def test_a_killed_recorder_leaves_whole_lines(tmp_path):
    path = tmp_path / "run.jsonl"
    words = [sys.executable, "-m", "ullage.cli", "watch", "--record", str(path), "--interval", "0.05"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 20
    while (not path.exists() or path.read_bytes().count(b"\n") < 5) and time.monotonic() < end:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert path.read_bytes().endswith(b"\n")
    assert len(lines_of(path)) >= 5


def test_the_reader_of_recordings_reads_it(tmp_path):
    recording = pytest.importorskip("ullage.observe.recording")
    path = tmp_path / "run.jsonl"
    assert main(["watch", "--record", str(path), "--samples", "3", "--interval", "0.05"]) == 0
    with path.open("rb") as file:
        found = recording.inspect_recording(file)
    assert dict(found.sizes)
    assert found.total_bytes == host_memory().total_bytes


def test_the_reserve_is_told_once_until_it_is_free_again():
    line = Line("20%")
    told = [bool(line.check([sample(used * GiB)])) for used in (10, 65, 66, 10, 70)]
    assert told == [False, True, False, False, True]


def test_a_reserve_that_makes_no_sense_is_refused(capsys):
    for word in ("x", "120%", "-1"):
        assert main(["watch", "--once", f"--reserve={word}"]) == 2
    assert "is not a reserve" in capsys.readouterr().err


def test_the_trend_is_the_slope_of_a_line():
    trend = Trend()
    for moment in range(10):
        trend.add([sample(10 * GiB + moment * GiB)], now=60.0 * moment)
    last = sample(19 * GiB)
    assert trend.bytes_per_second(0) == pytest.approx(GiB / 60)
    assert trend.seconds_to_full(last) == pytest.approx(61 * 60)
    flat = Trend()
    for moment in range(10):
        flat.add([sample(GiB)], now=float(moment))
    assert flat.seconds_to_full(sample(GiB)) is None


def test_counters_are_read_back_and_nonsense_is_left_out(tmp_path):
    exporter = Exporter(tmp_path)
    assert exporter.update(3)
    assert not exporter.update(4)  # too soon
    written = json.loads(exporter.path.read_text())
    assert (written["pid"], written["step"], written["devices"]) == (os.getpid(), 3, [])
    good = {"device": 1, "allocated_bytes": 5, "reserved_bytes": 6, "peak_allocated_bytes": 7, "peak_reserved_bytes": 8,
            "num_alloc_retries": 1, "num_ooms": 0}  # fmt: skip
    values = {**written, "devices": [good]}
    exporter.path.write_text(json.dumps(values))
    (found,) = read_counters(tmp_path)
    assert (found.device, found.allocated_bytes, found.num_alloc_retries, found.step) == (1, 5, 1, 3)
    nonsense = (
        {**values, "devices": [{**good, "allocated_bytes": -1}]}, {**values, "devices": [{**good, "num_ooms": True}]},
        {**values, "time": values["time"] - 3600}, {**values, "pid": 2**22 + 1}, {**values, "pid": "1"}, [], 7,
        {**values, "ullage_counters": 2}, {**values, "devices": 5},
    )  # fmt: skip
    for wrong in nonsense:
        exporter.path.write_text(json.dumps(wrong))
        assert read_counters(tmp_path) == (), wrong
    exporter.path.write_bytes(b"\xff\x00" * 100_000)
    assert read_counters(tmp_path) == ()
    exporter.close()
    assert not list(tmp_path.iterdir())


def test_an_exporter_never_raises_into_the_loop(tmp_path):
    (tmp_path / "file").write_text("")
    exporter = Exporter(tmp_path / "file" / "folder")
    assert not exporter.update()
    assert exporter.error


@pytest.mark.parametrize(("visible", "expected"), [("", 1), ("4,6", 6), ("GPU-aa,GPU-bb", 1), ("3", 1)])
def test_a_device_is_named_as_nvml_names_it(monkeypatch, visible, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert physical_index(1) == expected


def tree(tmp_path, **files):
    for name, text in files.items():
        path = tmp_path / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_the_limit_of_a_cgroup_is_the_total(tmp_path):
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    tree(proc, meminfo="MemTotal: 1000 kB\nMemAvailable: 400 kB\n", self__cgroup="0::/job\n")
    assert host_memory(proc, cgroup).used_bytes == 600 << 10
    tree(cgroup, **{"job__memory_dot_max": "max\n", "job__memory_dot_current": "7\n", "job__memory_dot_stat": "x 1\n"})
    assert host_memory(proc, cgroup).scope == "machine"
    tree(cgroup, **{"job__memory_dot_max": "512000\n", "job__memory_dot_current": "300000\n",
                    "job__memory_dot_stat": "anon 5\ninactive_file 100000\n"})  # fmt: skip
    found = host_memory(proc, cgroup)
    assert (found.scope, found.total_bytes, found.used_bytes) == ("cgroup", 512000, 200000)


def test_one_look_is_what_the_schema_says(capsys):
    assert main(["watch", "--once", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    jsonschema.validate(found, SCHEMA)
    assert found["devices"][-1]["kind"] == "host"
    assert main(["watch", "--json", "--samples", "6", "--interval", "0.05"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 6
    for line in lines:
        jsonschema.validate(line, SCHEMA)
    assert lines[-1]["devices"][-1]["growth_bytes_per_second"] is not None


def test_one_look_as_a_table(capsys):
    assert main(["watch", "--once"]) == 0
    assert "host" in capsys.readouterr().out


NONSENSE = (
    ["--interval", "0"],
    ["--interval", "soon"],
    ["--port", "70000"],
    ["--samples", "0"],
    ["--record-size", "big", "--record", "x"],
)


@pytest.mark.parametrize("words", NONSENSE)
def test_nonsense_is_refused_in_one_sentence(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["watch", "--once", *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1
