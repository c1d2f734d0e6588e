"""``ullage replay``: exit codes, JSON, text, and what a made-up recording must show."""

import json
import pickle

import jsonschema
import pytest

from ullage.cli import main

MiB = 2**20
BASE = 2**40


def event(action, address, size, **more):
    return {"action": action, "addr": address, "size": size, "stream": 0, "frames": [], **more}


def freed(address, size):
    return [event("free_requested", address, size), event("free_completed", address, size)]


def block(address, size, requested=None):
    state = {"state": "inactive", "requested_size": 0}
    if requested is not None:
        frames = [
            {"filename": "??", "name": "malloc", "line": 0},
            {"filename": "train.py", "name": "step", "line": 7},
        ]
        state = {"state": "active_allocated", "requested_size": requested, "frames": frames}
    return {"address": address, "size": size, **state}


def made_up():
    """A 30 MiB segment comes and goes; a 20 MiB segment ends up kept by a block of 2 MiB."""
    large, other = BASE, BASE + 64 * MiB
    trace = [
        event("segment_alloc", large, 30 * MiB),
        event("alloc", large, 30 * MiB - 7),
        event("segment_alloc", other, 20 * MiB),
        event("alloc", other, 8 * MiB),
        event("alloc", other + 8 * MiB, 2 * MiB),
        *freed(other, 8 * MiB),
        *freed(large, 30 * MiB - 7),
        event("segment_free", large, 30 * MiB),
        event("snapshot", 0, 2 * MiB),
    ]
    blocks = [block(other, 8 * MiB), block(other + 8 * MiB, 2 * MiB, 2 * MiB), block(other + 10 * MiB, 10 * MiB)]
    segment = {
        "device": 0, "address": other, "total_size": 20 * MiB, "stream": 0, "segment_type": "large",
        "segment_pool_id": (0, 0), "is_expandable": False, "blocks": blocks,
    }  # fmt: skip
    return {"segments": [segment], "device_traces": [trace, []]}


@pytest.fixture
def recording(tmp_path):
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(pickle.dumps(made_up(), 4))
    return path


def run(capsys, *arguments):
    code = main(["replay", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def replay_json(capsys, *arguments):
    code, out, err = run(capsys, *arguments, "--json")
    assert err == ""
    values = json.loads(out)
    main(["schema", "replay"])
    schema = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(values, schema)
    return code, values


def test_a_made_up_recording(capsys, recording):
    code, values = replay_json(capsys, recording)
    assert code == 0
    assert (values["device"], values["num_events"], values["settings"]) == (0, 11, "")
    assert values["peak_reserved_bytes"] == 50 * MiB
    assert values["peak_allocated_bytes"] == 40 * MiB
    assert values["final_reserved_bytes"] == 20 * MiB
    assert values["num_segments_allocated"] == 2
    assert values["placement"] == {
        "checked": 3, "equal": 3, "final_segments": 1, "final_equal": 1, "first_difference": None,
    }  # fmt: skip
    found = values["fragmentation"]
    assert found["utilisation"] == 0.8
    assert found["rate"] == pytest.approx(0.2)
    assert (found["internal"], found["releasable_bytes"], found["pinned_bytes"]) == (0.0, 0, 18 * MiB)
    assert found["at_peak"]["reserved_bytes"] == 50 * MiB
    (pin,) = values["pinned_by"]
    assert (pin["pinned_bytes"], pin["block_bytes"], pin["stack"]) == (18 * MiB, 2 * MiB, ["step (train.py:7)"])
    assert values["what_if"] == []
    assert values["death"] is None


def test_other_settings_and_less_memory(capsys, recording):
    code, values = replay_json(capsys, recording, "--settings", "expandable_segments:True")
    assert (code, values["simulated"], values["settings"]) == (0, True, "expandable_segments:True")
    assert values["peak_reserved_bytes"] == 40 * MiB
    assert values["num_maps"] == 1
    code, values = replay_json(capsys, recording, "--capacity", "45MiB")
    assert code == 3
    assert values["death"] == {
        "allocation": 1, "requested_bytes": 8 * MiB, "reserved_bytes": 30 * MiB, "allocated_bytes": 30 * MiB,
        "limit_bytes": 45 * MiB,
    }  # fmt: skip
    code, out, _err = run(capsys, recording, "--capacity", "45MiB")
    assert code == 3
    assert out.startswith("✘ dies at allocation 1")


def test_what_if(capsys, recording):
    _code, values = replay_json(capsys, recording, "--what-if", "--capacity", "1GiB")
    rows = values["what_if"]
    assert rows[0]["baseline"]
    assert rows[0]["peak_reserved_bytes"] == 50 * MiB
    assert {row["settings"] for row in rows} >= {"expandable_segments:True", "max_split_size_mb:32"}
    peaks = [row["peak_reserved_bytes"] for row in rows[1:]]
    assert peaks == sorted(peaks)
    assert values["advice"] == []  # 10 MiB are less than one segment
    out = run(capsys, recording, "--what-if")[1]
    assert "None gains enough" in out


def test_text(capsys, recording):
    code, out, err = run(capsys, recording)
    assert (code, err) == (0, "")
    assert out.startswith("✔ peak 50.0 MiB reserved, 40.0 MiB of it allocated")
    assert "3 of 3 placements" in out
    assert "step (train.py:7)" in out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--device", "5"], "devices 0"),
        (["--settings", "block_size:256M"], "max_split_size_mb:256"),
        (["--settings", "large_segment_size_mb:64", "--torch", "2.9"], "2.11"),
        (["--settings", "per_process_memory_fraction:0.5"], "--capacity"),
        (["--settings", "backend:cudaMallocAsync"], "native"),
        (["--capacity", "much"], "not a size"),
        (["--torch", "x"], "version"),
    ],
)
def test_bad_arguments_are_one_sentence(capsys, recording, arguments, word):
    code, out, err = run(capsys, recording, *arguments)
    assert (code, out) == (2, "")
    assert word in err
    assert err.count("\n") == 1


def test_bad_files_are_one_sentence(capsys, tmp_path):
    evil = tmp_path / "evil.pickle"
    evil.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    empty = tmp_path / "empty.pickle"
    empty.write_bytes(pickle.dumps({"segments": [], "device_traces": []}))
    for path, word in ((evil, "GLOBAL"), (empty, "_record_memory_history"), (tmp_path / "none", "no such file")):
        code, out, err = run(capsys, path)
        assert (code, out) == (2, "")
        assert word in err
        assert err.count("\n") == 1


def test_a_recording_that_is_cut_or_contradicts_itself_is_said(capsys, tmp_path):
    tree = made_up()
    tree["device_traces"][0].insert(5, event("alloc", BASE + 512 * MiB, 512))
    path = tmp_path / "odd.pickle"
    path.write_bytes(pickle.dumps(tree))
    code, values = replay_json(capsys, path)
    assert code == 0
    assert values["placement"]["equal"] < values["placement"]["checked"]
    assert values["placement"]["first_difference"]
    assert any("do not fit" in one for one in values["warnings"])
    assert any("does not follow" in one for one in values["warnings"])
    assert values["peak_reserved_bytes"] == 50 * MiB


def test_nothing_heavy_is_loaded(recording):
    import subprocess
    import sys

    code = (
        f"import sys\nfrom ullage.cli import main\nmain(['replay', {str(recording)!r}, '--json'])\nprint(*sys.modules)"
    )
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "ullage.allocator.simulate" in names
    assert not {"torch", "numpy", "rich", "pickletools"} & set(names)
