"""A job's predicted ledger beside the measured one: the parts are paired, and the one that left its range is named."""

import json

import pytest
from training_snapshot import training

from ullage.cli import main
from ullage.ledger import ranged
from ullage.observe.job_ledger import pairs_of


def term(name, size, low=None, high=None):
    return ranged(name, size, low=size if low is None else low, high=size if high is None else high)


GIB = 2**30
PREDICTED = [
    term("weights", 10 * GIB), term("gradients", 10 * GIB), term("optimizer_states", 20 * GIB),
    term("activations", 5 * GIB, 4 * GIB, 6 * GIB), term("cuda_context", GIB), term("reserved_overhead", 0, 0, 3 * GIB),
]  # fmt: skip


def judged(measured):
    return {pair.part: pair.state for pair in pairs_of(PREDICTED, measured)}


def test_what_is_inside_is_inside():
    measured = [
        term("weights", 10 * GIB),
        term("activations", 3 * GIB),
        term("temporaries", 2 * GIB),
        term("unused", GIB),
    ]
    states = judged(measured)
    assert states["weights"] == states["activations_and_temporaries"] == states["reserved_unused"] == "inside"
    assert states["outside_pytorch"] == states["optimizer_states"] == "unmeasured"


@pytest.mark.parametrize(("size", "state"), [(8 * GIB, "above"), (GIB, "below"), (5 * GIB, "inside")])
def test_the_part_that_left_its_range_is_found(size, state):
    assert judged([term("activations", size)])["activations_and_temporaries"] == state


def test_what_nobody_predicted_is_told():
    assert judged([term("kv_cache", GIB)])["kv_cache"] == "unpredicted"


def test_a_rest_and_what_is_free_are_no_parts():
    assert set(judged([term("unexplained", 9 * GIB), term("free", GIB)]).values()) == {"unmeasured"}


@pytest.fixture
def job(tmp_path):
    path = tmp_path / "job.json"
    path.write_text(
        json.dumps(
            {
                "kind": "train",
                "model": "Qwen/Qwen3-0.6B",
                "gpu": "H100",
                "num_gpus": 1,
                "engine": "single",
                "seq_len": 2048,
                "micro_batch_size": 2,
            }
        )
    )
    return str(path)


def test_a_snapshot_beside_a_training_job(job, tmp_path, capsys):
    path = str(training().save(tmp_path / "a.pickle"))
    assert main(["inspect", path, "--job", job, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    ledger = answer["listings"][0]
    assert ledger["name"] == "ledger"
    assert "backward" in ledger["title"] or "loss" in ledger["title"]  # the moment that was measured
    parts = {row[0]: row for row in ledger["rows"]}
    assert parts["weights"][1] == 32 * 2**20 < parts["weights"][3]
    assert any(
        note.startswith("weights is not as predicted: 32.0 MiB measured")
        or note.startswith("weights left its range: 32.0 MiB")
        for note in answer["notes"]
    )
    assert main(["inspect", path, "--job", job]) == 0
    assert "below its range" in capsys.readouterr().out


def test_an_engine_log_beside_a_serving_job(tmp_path, capsys):
    job = tmp_path / "serve.json"
    job.write_text(
        json.dumps(
            {
                "kind": "serve",
                "model": "Qwen/Qwen3-0.6B",
                "gpu": "H100",
                "num_gpus": 1,
                "engine": "vllm",
                "max_model_len": 4096,
            }
        )
    )
    log = tmp_path / "vllm.log"
    log.write_text(
        "INFO 11-01 10:00:00 [gpu_model_runner.py:1] Model loading took 1.12 GiB and 3.0 seconds\n"
        "INFO 11-01 10:00:01 [gpu_worker.py:1] Available KV cache memory: 20.00 GiB\n"
    )
    assert main(["inspect", str(log), "--job", str(job), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    rows = {row[0]: row[-1] for row in answer["listings"][0]["rows"]}
    assert rows["weights"] == "in its range"
    assert rows["kv_cache"] == "below its range"
    assert answer["notes"][0].startswith("kv_cache left its range: 20.00 GiB measured")


def test_a_job_that_is_none_is_a_sentence(tmp_path, capsys):
    path = str(training(1).save(tmp_path / "a.pickle"))
    bad = tmp_path / "job.json"
    bad.write_text("[1, 2")
    assert main(["inspect", path, "--job", str(bad)]) == 2
    assert main(["inspect", path, "--job", str(tmp_path / "missing.json")]) == 2
    assert "Traceback" not in capsys.readouterr().err
