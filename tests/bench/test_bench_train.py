"""``ullage bench train`` on real training steps, on the CPU: phases, curves, break point, records, page, many ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from ullage.cli import main
from ullage.cli.schema import FOLDER
from ullage.records.validate import validate_files
from ullage.units import MiB

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "tie_word_embeddings": False,
}
FUNCTION = '''
import torch


def factory(device):
    """A step that holds a tensor of 4 KiB for each token, and passing results of its size."""
    weight = torch.ones(1, device=device, requires_grad=True)

    def step(micro_batch, seq):
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(weight.detach())
        held = weight * torch.ones(micro_batch * seq * 2**10, device=device)
        (held * held).sum().backward()
        weight.grad = None

    return step


def broken(device):
    def step(micro_batch, seq):
        raise ValueError("made up")

    return step
'''


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


@pytest.fixture
def functions(tmp_path, monkeypatch):
    (tmp_path / "my_steps.py").write_text(FUNCTION)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def answered(capsys):
    answer = json.loads(capsys.readouterr().out)
    jsonschema.validate(answer, json.loads((FOLDER / "bench.json").read_text()))
    return answer


def test_a_transformers_model_through_all_phases(config, tmp_path, capsys):
    records, page = tmp_path / "r.jsonl", tmp_path / "b.html"
    words = [
        "--layers",
        "2",
        "--seq",
        "64",
        "--micro-batch",
        "2",
        "--no-search",
        "--dtype",
        "fp32",
        "--device",
        "cpu",
        "--idle",
        "0.3",
    ]
    outputs = ["--records", str(records), "--html", str(page), "--json"]
    assert main(["bench", "train", config, *words, *outputs, "--recompute", "--grad-accum", "2"]) == 0
    answer = answered(capsys)
    assert [phase["name"] for phase in answer["phases"]] == ["idle", "full_load", "changing_load"]
    assert answer["memory"] == "rss" and answer["job"]["config"]["num_hidden_layers"] == 2
    assert answer["break_point"] is None
    for phase in answer["phases"]:
        (rank,) = phase["ranks"]
        assert len(rank["curve"]) > 10 and rank["peak_used_bytes"] >= rank["marks"]["built"]["used_bytes"] > 50 * MiB
        assert rank["marks"]["start"]["t"] < rank["marks"]["built"]["t"]
    changing = answer["phases"][2]["steps"]
    assert {step["label"] for step in changing} == {"steady", "ramp", "settle", "burst", "sawtooth"}
    assert all(step["seconds"] > 0 for step in changing)
    assert answer["stability"]["drift_bytes"] is not None and answer["stability"]["num_bursts"] == 2
    report = validate_files([records])
    assert report.num_records == 1 and not report.internal_errors and not report.warnings
    (record,) = [json.loads(line) for line in records.read_text().splitlines()]
    assert record["measured"][0]["quantity"] == "host_used" and record["job"]["micro_batch_size"] == 2
    assert "Memory: changing load" in page.read_text(encoding="utf-8")


def test_the_break_point_is_found_at_the_memory_limit(functions, capsys):
    words = [
        "--seq",
        "12288",
        "--memory-limit",
        "550MiB",
        "--max-batch",
        "64",
        "--steps",
        "2",
        "--idle",
        "0.1",
        "--device",
        "cpu",
    ]
    assert main(["bench", "train", "my_steps:factory", *words, "--json"]) == 0
    answer = answered(capsys)
    found = answer["break_point"]
    assert found["limited_by"] == "memory" and found["smallest_failing"] == found["largest"] + 1
    tries = {one["size"]: one for one in found["tries"]}
    assert not tries[found["smallest_failing"]]["lives"] and tries[found["largest"]]["lives"]
    base = answer["phases"][0]["ranks"][0]["marks"]["built"]["used_bytes"]
    assert tries[found["largest"]]["peak_bytes"] <= 560 * MiB
    # Ones, their product with the weight, and its square or gradient: two to four of 48 MiB at a time.
    room = 550 * MiB - base
    assert room / (4 * 48 * MiB) - 1 <= found["largest"] <= room / (2 * 48 * MiB)


def test_nothing_lives_under_a_tiny_limit(functions, capsys):
    words = ["--memory-limit", "64MiB", "--idle", "0.1", "--device", "cpu"]
    assert main(["bench", "train", "my_steps:factory", *words]) == 3
    assert "not even the smallest lives" in capsys.readouterr().out


def test_a_step_that_fails_otherwise_is_an_error(functions, capsys):
    assert main(["bench", "train", "my_steps:broken", "--device", "cpu", "--idle", "0.1"]) == 2
    said = capsys.readouterr().err
    assert "not of memory" in said and "made up" in said and said.count("\n") == 1


@pytest.mark.parametrize("what", ["absent.json", "my_steps:absent", "absent:step", "."])
def test_what_cannot_be_loaded_is_one_sentence(functions, capsys, what):
    assert main(["bench", "train", what, "--device", "cpu", "--idle", "0.1"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "InputError" not in said and said.count(f"{what}:") == 1


@pytest.mark.parametrize(
    "kind",
    [
        "function",
        pytest.param(
            "config",
            marks=pytest.mark.skipif("ULLAGE_BENCH_FULL" not in os.environ, reason="takes long: set ULLAGE_BENCH_FULL"),
        ),
    ],
)
def test_two_ranks_measure_and_the_first_prints(kind, config, functions, tmp_path):
    records = tmp_path / "r.jsonl"
    what = config if kind == "config" else "my_steps:factory"
    words = ["--seq", "32", "--micro-batch", "2", "--no-search", "--steps", "2", "--dtype", "fp32", "--idle", "0.1"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "ullage"]
    command = [*launch, "bench", "train", what, *words, "--device", "cpu", "--json", "--records", str(records)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout)
    assert answer["machine"]["num_ranks"] == 2 and answer["break_point"] is None
    assert [[rank["rank"] for rank in phase["ranks"]] for phase in answer["phases"]] == [[0, 1]] * 3
    (record,) = [json.loads(line) for line in Path(records).read_text().splitlines()]
    assert record["job"]["num_gpus"] == 2 and record["job"]["engine"] == "ddp"
