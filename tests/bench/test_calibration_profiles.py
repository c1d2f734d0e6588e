"""Profiles on the path of a fit: found, laid on, refused, switched off. The profiles here are made up."""

import json
import shutil
import subprocess
import sys
import time

import pytest

from ullage import fit, fit_train, parse_machine
from ullage.catalog.calibration import VARIABLE, find, user_folder, with_calibration
from ullage.cli import main
from ullage.errors import InputError
from ullage.ledger import Certainty
from ullage.spec.codec import decode, encode
from ullage.spec.machine import Gpu
from ullage.units import MiB

H200 = parse_machine("H200").gpu


def figure(value, low, high):
    return {"value": value * MiB, "low": low * MiB, "high": high * MiB, "num_samples": 5, "unit": "bytes"}


def made_up(**changes):
    profile = {
        "ullage_calibration": 1,
        "name": "made-up",
        "measured": "2026-11-22T00:00:00+00:00",
        "gpu": {"name": H200.name, "reported": "NVIDIA H200", "total_bytes": H200.total_bytes},
        "software": {"driver": "0", "cuda": "0", "torch": "0"},
        "nccl_ranks": 8,
        "figures": {
            "cuda_context": figure(500, 498, 502),
            "cuda_context_loaded": figure(560, 555, 570),
            "cublas_workspaces": figure(64, 64, 64),
            "nccl_first": figure(700, 690, 720),
            "nccl_next": figure(120, 100, 130),
            "bandwidth_bytes_per_s": {"value": 4.1e12, "low": 4.0e12, "high": 4.2e12, "unit": "bytes/s"},
        },
    }
    return {**profile, **changes}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE)
    path = user_folder()
    assert str(path).startswith(str(tmp_path))
    path.mkdir(parents=True)
    return path


def store(folder, profile, name="made-up"):
    path = folder / f"{name}.json"
    path.write_text(json.dumps(profile))
    return path


def context_of(result):
    return result.ledger.find("cuda_context")


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_profile_narrows_the_context_of_an_engine(folder, engine):
    modelled = context_of(fit("deepseek-v3", on="8xH200", engine=engine, advise=False))
    store(folder, made_up())
    result = fit("deepseek-v3", on="8xH200", engine=engine, advise=False)
    term = context_of(result)
    assert modelled.certainty is Certainty.MODELLED and term.certainty is Certainty.CALIBRATED
    assert (term.low_bytes, term.bytes, term.high_bytes) == (498 * MiB, 500 * MiB, 570 * MiB)
    assert term.high_bytes - term.low_bytes < modelled.high_bytes - modelled.low_bytes
    assert term.source == "calibration made-up, 2026-11-22"
    assert any("made-up" in sentence for sentence in result.job.assumed)


def train(machine, engine):
    from ullage.cli import Parser
    from ullage.cli import fit_train as command

    parser = Parser(prog="x", allow_abbrev=False)
    command.add_arguments(parser)
    return fit_train(
        command.job_of(parser.parse_args(["llama-3.1-8b", "--on", machine, "--engine", engine])), advise=False
    )


def test_a_profile_narrows_context_nccl_and_workspaces_of_training(folder):
    store(folder, made_up())
    one = train("H200", "hf_trainer").ledger
    assert one.find("cuda_context").bytes == 560 * MiB
    assert one.find("cuda_context").high_bytes == (570 + 60) * MiB
    assert one.find("cublas_workspaces").certainty is Certainty.CALIBRATED
    assert one.find("cublas_workspaces").low_bytes == one.find("cublas_workspaces").high_bytes == 64 * MiB
    sharded = train("8xH200", "fsdp2").ledger.find("nccl")
    assert (sharded.low_bytes, sharded.bytes, sharded.high_bytes) == (690 * MiB, 820 * MiB, 980 * MiB)


def test_nccl_is_not_taken_from_another_number_of_gpus(folder):
    store(folder, made_up(nccl_ranks=4))
    assert train("8xH200", "fsdp2").ledger.find("nccl").certainty is Certainty.MODELLED


def test_the_calibrated_ledger_adds_up(folder):
    store(folder, made_up())
    result = train("H200", "hf_trainer")
    for moment in (*result.worst.moments, result.worst.after_step):
        for term in (moment.allocated, moment.outside):
            assert term.bytes == sum(child.bytes for child in term.children)
    plain = train_without(folder)
    difference = result.ledger.outside.bytes - plain.ledger.outside.bytes
    assert difference == 560 * MiB - plain.ledger.find("cuda_context").bytes


def train_without(folder):
    shutil.rmtree(folder)
    return train("H200", "hf_trainer")


@pytest.mark.parametrize("switch", ["flag", "variable"])
def test_it_can_be_switched_off(folder, monkeypatch, capsys, switch):
    store(folder, made_up())
    words = ["fit", "serve", "deepseek-v3", "--on", "8xH200", "--json", "--no-advice"]
    main(words)
    assert "calibrated" in capsys.readouterr().out
    if switch == "variable":
        monkeypatch.setenv(VARIABLE, "off")
    else:
        words.append("--no-calibration")
    main(words)
    assert "calibrated" not in capsys.readouterr().out


def test_another_card_is_left_alone(folder):
    store(folder, made_up())
    assert context_of(fit("deepseek-v3", on="8xB200", advise=False)).certainty is Certainty.MODELLED
    other_total = {**made_up()["gpu"], "total_bytes": H200.total_bytes * 9 // 10}
    store(folder, made_up(gpu=other_total))
    assert find(H200)[0] is None


def test_the_newest_of_several_counts_and_one_can_be_named(folder, monkeypatch):
    store(folder, made_up(name="old"), "old")
    store(folder, made_up(name="new", measured="2027-01-01T00:00:00+00:00"), "new")
    assert find(H200)[0].name == "new"
    monkeypatch.setenv(VARIABLE, "old")
    assert context_of(fit("deepseek-v3", on="8xH200", advise=False)).source.startswith("calibration old")
    with pytest.raises(InputError, match="the job's GPU is"):
        fit("deepseek-v3", on="8xB200", advise=False)


BROKEN = {
    "torn": '{"ullage_calibration": 1, "na',
    "not an object": "[]",
    "of another format": json.dumps(made_up(ullage_calibration=2)),
    "without a GPU": json.dumps(made_up(gpu=None)),
    "negative": json.dumps(made_up(figures={"cuda_context": figure(-1, -1, -1)})),
    "not in order": json.dumps(made_up(figures={"cuda_context": figure(5, 9, 6)})),
    "not a number": json.dumps(made_up(figures={"cuda_context": {"value": "5", "low": 1, "high": 6}})),
    "nan": json.dumps(made_up(figures={"cuda_context": {"value": float("nan"), "low": 1, "high": 6}})),
    "deep": "[" * 100_000,
    "not text": "\udcff",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_corrupt_profile_is_kept_aside_and_the_fit_goes_on(folder, kind):
    path = folder / "made-up.json"
    path.write_bytes(BROKEN[kind].encode("utf-8", "surrogateescape"))
    before = path.read_bytes()
    result = fit("deepseek-v3", on="8xH200", advise=False)
    assert context_of(result).certainty is Certainty.MODELLED
    assert not path.exists() and (folder / "made-up.json.corrupt-1").read_bytes() == before
    assert any("corrupt-1" in sentence for sentence in result.job.assumed)
    assert not any("corrupt" in sentence for sentence in fit("deepseek-v3", on="8xH200", advise=False).job.assumed)


def test_a_second_corrupt_profile_does_not_overwrite_the_first(folder):
    for text in ("first", "second"):
        (folder / "made-up.json").write_text(text)
        find(H200)
    assert [(folder / f"made-up.json.corrupt-{number}").read_text() for number in (1, 2)] == ["first", "second"]


def test_a_named_profile_that_is_corrupt_is_an_error(folder, monkeypatch):
    (folder / "bad.json").write_text("{}")
    monkeypatch.setenv(VARIABLE, "bad")
    with pytest.raises(InputError, match="is no calibration profile"):
        fit("deepseek-v3", on="8xH200", advise=False)
    monkeypatch.setenv(VARIABLE, "absent")
    with pytest.raises(InputError, match="cannot be read"):
        fit("deepseek-v3", on="8xH200", advise=False)


def test_without_a_profile_it_costs_under_a_millisecond(tmp_path):
    """Measured in a process of its own, first call included; the least of several, as other work shares the machine."""
    code = (
        "import time; from ullage.read.machine import parse_machine; from types import SimpleNamespace as N\n"
        "from ullage.catalog.calibration import with_calibration\n"
        "job = N(machine=parse_machine('8xH200')); t = time.perf_counter(); assert with_calibration(job) is job\n"
        "print(time.perf_counter() - t)"
    )
    environment = {"XDG_CONFIG_HOME": str(tmp_path), "PATH": ""}
    runs = [
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True) for _ in "123"
    ]
    assert min(float(run.stdout) for run in runs) < 1e-3


def test_a_calibrated_gpu_survives_the_codec(folder):
    store(folder, made_up())
    calibrated, said = find(H200)
    assert not said
    from dataclasses import replace

    gpu = replace(H200, calibration=calibrated)
    assert decode(Gpu, encode(gpu)) == gpu
    job = with_calibration(fit("deepseek-v3", on="8xH200", advise=False).asked)
    assert job.machine.gpu == gpu


def test_rates_are_not_taken_for_bytes(folder):
    store(folder, made_up())
    assert find(H200)[0].figure("bandwidth_bytes_per_s") is None


def test_a_profile_costs_little_too(folder):
    store(folder, made_up())
    took = []
    for _ in range(5):
        begun = time.perf_counter()
        find(H200)
        took.append(time.perf_counter() - begun)
    assert min(took) < 5e-3
