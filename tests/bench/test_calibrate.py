"""The arithmetic of a profile, from samples that are made up: no GPU was at hand when these were written."""

import json
import re

import jsonschema
import pytest

from ullage.bench.calibrate import run as calibration
from ullage.bench.calibrate.cases import EXPANDABLE, MODELS, further, matrix
from ullage.bench.calibrate.profile import (
    communicators,
    context_figures,
    figure,
    make_profile,
    save_profile,
    slope_and_fixed,
)
from ullage.bench.calibrate.steps import Measured, measured_of, predicted, record_of, workers_for
from ullage.bench.tries import Outcome
from ullage.catalog.calibration import calibration_of, read_profile
from ullage.cli import main
from ullage.cli.schema import FOLDER
from ullage.errors import InputError
from ullage.records.validate import validate_files
from ullage.units import GiB, MiB

MADE_UP_CONTEXTS = [
    {
        "bare_used": used * MiB,
        "bare_reserved": 2 * MiB,
        "loaded_used": used * MiB + 90 * MiB,
        "loaded_reserved": 42 * MiB,
    }
    for used in (502, 504, 503, 502, 510)
]
MADE_UP_TOTALS = [
    [700.0 * MiB, 820.0 * MiB, 940.0 * MiB, 1060.0 * MiB],
    [710.0 * MiB, 830.0 * MiB, 950.0 * MiB, 1090.0 * MiB],
]
MADE_UP_FACTS = {
    "reported": "NVIDIA H200",
    "total_bytes": 150149398528,
    "compute_capability": [9, 0],
    "multiprocessors": 132,
    "num_devices": 2,
    "uuid": "GPU-made-up",
    "torch": "2.13.0+cu130",
    "cuda": "13.0",
    "nccl": "2.28.9",
    "driver": "590.00",
    "python": "3.11.2",
}
MADE_UP_ALLOCATOR = {
    "block": {"requested": 1, "allocated": 512, "reserved": 2 * MiB},
    "small_segment": {"requested": 1, "allocated": 512, "reserved": 2 * MiB},
    "large_segment": {"requested": 2 * MiB, "allocated": 2 * MiB, "reserved": 20 * MiB},
    "large_request": {"requested": 21 * MiB + 1, "allocated": 21 * MiB + 512, "reserved": 22 * MiB},
}
MADE_UP_RATES = {
    "bandwidth": [4.0e12, 4.1e12, 4.2e12],
    "bfloat16": [7.5e14] * 3,
    "float16": [7e14] * 3,
    "float32": [4e14] * 3,
}


def test_a_figure_is_the_median_with_its_spread():
    assert figure([5, 1, 3], "bytes") == {"value": 3, "low": 1, "high": 5, "num_samples": 3, "unit": "bytes"}
    assert figure([1.5, 2.5], "FLOP/s")["value"] == 2.0
    with pytest.raises(ValueError, match="no samples"):
        figure([], "bytes")


def test_the_context_is_what_the_allocator_does_not_hold():
    found = context_figures(MADE_UP_CONTEXTS)
    bare, loaded = found["cuda_context"], found["cuda_context_loaded"]
    assert [bare[key] // MiB for key in ("low", "value", "high")] == [500, 501, 508]
    assert [loaded[key] // MiB for key in ("low", "value", "high")] == [550, 551, 558]


def test_slope_and_fixed_part():
    assert slope_and_fixed([(1, 12), (2, 14), (4, 18)]) == (2, 10)
    slope, fixed = slope_and_fixed([(1, 12), (2, 14), (3, 900), (4, 18), (5, 20)])  # one that is off
    assert slope == pytest.approx(2) and fixed == pytest.approx(10)
    with pytest.raises(ValueError, match="two different x"):
        slope_and_fixed([(1, 5), (1, 6)])


def test_communicators_have_a_first_and_a_next():
    found = communicators(MADE_UP_TOTALS)
    assert found["nccl_first"]["value"] == 705 * MiB
    assert found["nccl_next"]["low"] == 120 * MiB and found["nccl_next"]["high"] == 140 * MiB
    assert 120 * MiB <= found["nccl_next"]["value"] <= 127 * MiB
    assert communicators([[5.0]]) == {"nccl_first": figure([5], "bytes")}
    assert communicators([[5.0, 4.0]])["nccl_next"]["value"] == 0  # less than nothing is nothing


@pytest.fixture
def boundary(monkeypatch):
    """Stand in for the device alone: the probes' answers, the NCCL ranks and the steps are the made-up samples."""
    contexts = iter(MADE_UP_CONTEXTS)
    answers = {
        "facts": lambda: dict(MADE_UP_FACTS),
        "context": lambda: next(contexts),
        "workspaces": lambda: {"forward": 32 * MiB, "step": 64 * MiB},
        "allocator": lambda: MADE_UP_ALLOCATOR,
        "rates": lambda: MADE_UP_RATES,
    }
    monkeypatch.setattr(calibration, "need_cuda", lambda: None)
    monkeypatch.setattr(calibration, "probe", lambda name, *_arguments: answers[name]())
    monkeypatch.setattr(calibration, "nccl_totals", lambda _ranks: MADE_UP_TOTALS)
    monkeypatch.setattr(calibration, "measure", made_up_steps)
    return answers


def made_up_steps(cases, _progress, *, workers):
    assert workers == 4
    sizes = {"max_allocated_bytes": 4 * GiB, "max_reserved_bytes": 5 * GiB, "allocated_after_step_bytes": GiB}
    return [Measured(case=cases[0], died="memory: made up"), *(Measured(case=case, **sizes) for case in cases[1:])]


def test_the_command_writes_a_profile_that_a_fit_then_uses(boundary, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    records = tmp_path / "steps.jsonl"
    assert main(["calibrate", "--json", "--records", str(records)]) == 0
    answer = json.loads(capsys.readouterr().out)
    jsonschema.validate(answer, json.loads((FOLDER / "calibrate.json").read_text()))
    path = tmp_path / "ullage" / "calibration" / "H200-SXM-141GB-torch2.13.0.json"
    assert answer["path"] == str(path) and not answer["notes"]
    profile = read_profile(path)
    assert "GPU-made-up" not in path.read_text() and re.fullmatch("[0-9a-f]{16}", profile["gpu"]["uuid_sha256"])
    assert profile["figures"]["flops_bfloat16"]["value"] == 7.5e14
    assert calibration_of(profile).num_ranks == 2
    monkeypatch.delenv("ULLAGE_CALIBRATION")
    main(["fit", "train", "llama-3.1-8b", "--on", "2xH200", "--json", "--no-advice"])
    fitted = json.loads(capsys.readouterr().out)
    terms = {term["name"]: term for term in fitted["terms"]}
    assert terms["cuda_context"]["certainty"] == terms["nccl"]["certainty"] == "calibrated"
    assert terms["nccl"]["bytes"] == communicators(MADE_UP_TOTALS)["nccl_first"]["value"] + round(
        communicators(MADE_UP_TOTALS)["nccl_next"]["value"]
    )
    report = validate_files([records])
    assert report.num_records == len(matrix()) - 1 and not report.internal_errors
    assert all(row.skipped is None for row in report.comparisons)


def test_the_text_names_the_card_and_the_steps_that_died(boundary, tmp_path, capsys):
    out = tmp_path / "profile.json"
    assert main(["calibrate", "--out", str(out), "--name", "mine", "--no-uuid"]) == 0
    text = capsys.readouterr().out
    assert "NVIDIA H200" in text and f"{matrix()[0].name}: memory: made up" in text and "fit says" in text
    profile = read_profile(out)
    assert profile["name"] == "mine" and profile["gpu"]["uuid_sha256"] is None


def test_an_allocator_that_differs_from_the_rules_is_noted(boundary, tmp_path):
    boundary["allocator"] = lambda: {
        **MADE_UP_ALLOCATOR,
        "block": {"requested": 1, "allocated": 1024, "reserved": 2 * MiB},
    }
    out = tmp_path / "profile.json"
    main(["calibrate", "--out", str(out), "--no-steps"])
    assert any("allocator_block" in note for note in read_profile(out)["notes"])


def test_a_device_that_was_not_idle_is_refused(boundary, tmp_path, capsys):
    boundary["context"] = lambda: {**MADE_UP_CONTEXTS[0], "bare_used": 0}
    assert main(["calibrate", "--out", str(tmp_path / "p.json")]) == 2
    assert "idle" in capsys.readouterr().err and not (tmp_path / "p.json").exists()


def test_a_name_that_leaves_the_folder_is_refused(boundary, capsys):
    assert main(["calibrate", "--name", "../x"]) == 2
    assert "cannot be the name" in capsys.readouterr().err


def profile_of(name="p"):
    figures = {"cuda_context": figure([1], "bytes")}
    return make_profile(
        name, measured="now", gpu={"name": "g", "total_bytes": 1}, software={}, nccl_ranks=1, figures=figures
    )


def test_a_profile_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "p.json"
    save_profile(path, profile_of())
    before = path.read_text()
    with pytest.raises(ValueError, match="JSON"):
        save_profile(path, {**profile_of(), "notes": [float("nan")]})
    assert path.read_text() == before and [one.name for one in path.parent.iterdir()] == ["p.json"]
    save_profile(path, profile_of("q"))
    assert read_profile(path)["name"] == "q"


def test_a_corrupt_profile_is_kept_aside_when_a_new_one_is_written(tmp_path):
    path = tmp_path / "p.json"
    path.write_text("torn")
    save_profile(path, profile_of())
    assert (tmp_path / "p.json.corrupt-1").read_text() == "torn" and read_profile(path)["name"] == "p"


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save_profile(tmp_path / "file" / "p.json", profile_of())


def test_the_matrix_has_every_corner_once():
    cases = matrix()
    assert len(cases) == len(set(cases)) == 24
    assert {case.model for case in cases} == set(MODELS) and {case.alloc_conf for case in cases} == {"", EXPANDABLE}
    names = [case.name for case in (*cases, *further())]
    assert len(names) == len(set(names)) and len(names) >= 30


@pytest.mark.parametrize("case", [*matrix(), *further()], ids=lambda case: case.name)
def test_the_closed_form_has_an_answer_for_every_step(case):
    found = Measured(case=case, max_allocated_bytes=1, max_reserved_bytes=1, allocated_after_step_bytes=1)
    figures = predicted(record_of(found, gpu="NVIDIA H200", torch_version="2.13.0", measured="made up"))
    assert set(figures) == {"max_allocated", "max_reserved", "allocated_after_step"}
    assert 0.5 * GiB < figures["max_allocated"] < 7.5 * GiB


def test_a_step_that_died_says_of_what():
    outcome = Outcome(answers=(), died={"cause": "memory", "detail": "made up"}, seconds=1.0)
    assert measured_of(matrix()[0], outcome).died == "memory: made up"


def test_small_cards_run_one_step_at_a_time():
    assert [workers_for(size * GiB) for size in (6, 8, 24, 141)] == [1, 1, 3, 4]
