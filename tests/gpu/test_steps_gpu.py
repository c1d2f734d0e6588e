"""Real training steps on a real GPU beside the trace and the closed form; calibrate; bench.

One run of ``make gpu`` on a fresh machine measures all of it within ten minutes. With ``ULLAGE_WRITE_RECORDS`` set to
a folder, the measured steps, the profile and the bench are left there for the catalog and the scoreboard.
"""

import json
import os
from pathlib import Path

import jsonschema
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda is not available: there is no GPU"),
]

from ullage.bench.calibrate.cases import MODELS, further, matrix  # noqa: E402
from ullage.bench.calibrate.steps import STEPS_PER_CASE, configs, measure, record_of, workers_for  # noqa: E402
from ullage.cli import main  # noqa: E402
from ullage.cli.schema import FOLDER  # noqa: E402

CASES = [*matrix(), *further()]
#: How far the trace may be off: of allocated, and of reserved bytes.
ALLOCATED_SHARE, RESERVED_SHARE = 0.01, 0.02
#: Of the steps, the share whose measured peaks must lie inside the range of the closed form.
COVERAGE = 0.9


def write(name, text):
    """Leave a result where ``ULLAGE_WRITE_RECORDS`` says, if anywhere."""
    folder = os.environ.get("ULLAGE_WRITE_RECORDS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / name).write_text(text, encoding="utf-8")


@pytest.fixture(scope="session")
def measured():
    """Measure every step once, each in a process of its own; by name."""
    total = torch.cuda.mem_get_info(0)[1]
    found = measure(CASES, print, workers=workers_for(total))
    gpu = torch.cuda.get_device_name(0)
    records = [
        record_of(one, gpu=gpu, torch_version=torch.__version__, measured=f"{gpu}, torch {torch.__version__}")
        for one in found
        if not one.died
    ]
    write("steps.jsonl", "".join(json.dumps(record, sort_keys=True) + "\n" for record in records))
    return {one.case.name: one for one in found}, {record["id"]: record for record in records}


@pytest.fixture(scope="module")
def paths():
    with configs() as found:
        yield found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_trace_foretells_a_step(measured, paths, case):
    from ullage.trace.api import trace

    one = measured[0][case.name]
    assert not one.died, one.died
    foretold = trace(
        str(paths[case.model]),
        settings=case.alloc_conf,
        torch_version=".".join(torch.__version__.split(".")[:2]),
        engine="plain",
        dtype="bfloat16" if case.dtype == "bf16" else "float32",
        autocast="bfloat16" if case.dtype == "bf16-mixed" else None,
        optimizer=case.optimizer,
        optimizer_impl="foreach",
        recompute="full" if case.recompute else "none",
        lora=f"r={case.lora}" if case.lora else None,
        micro_batch=case.micro_batch,
        seq_len=case.seq,
        grad_accum=case.grad_accum,
        steps=STEPS_PER_CASE,
        compute_capability=torch.cuda.get_device_capability(0),
    )
    allocated = foretold.peak_allocated_bytes / one.max_allocated_bytes - 1
    reserved = foretold.peak_reserved_bytes / one.max_reserved_bytes - 1
    print(f"{case.name}: allocated {allocated:+.4f}, reserved {reserved:+.4f}")
    assert abs(allocated) <= ALLOCATED_SHARE, f"allocated {allocated:+.2%}"
    assert abs(reserved) <= RESERVED_SHARE, f"reserved {reserved:+.2%}"


def test_the_closed_form_holds_the_steps_in_its_ranges(measured, tmp_path):
    from ullage.records.validate import validate_files

    path = tmp_path / "steps.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in measured[1].values()))
    report = validate_files([path])
    rows = [row for row in report.comparisons if row.skipped is None]
    assert len(measured[1]) == len(CASES) and len(rows) == 3 * len(CASES)
    outside = [row for row in rows if not row.low <= row.measured <= row.high]
    for row in outside:
        print(f"{row.record_id} {row.quantity}: measured {row.measured:,.0f}, {row.low:,.0f} to {row.high:,.0f}")
    assert len(outside) <= (1 - COVERAGE) * len(rows), f"{len(outside)} of {len(rows)} outside"


def test_calibrate_measures_this_gpu_and_a_fit_uses_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert main(["calibrate", "--name", "here", "--no-steps", "--json", "--no-uuid"]) == 0
    answer = json.loads(capsys.readouterr().out)
    jsonschema.validate(answer, json.loads((FOLDER / "calibrate.json").read_text()))
    write("profile.json", json.dumps({key: value for key, value in answer.items() if key != "path"}, indent=1))
    figures = answer["figures"]
    assert 100 * 2**20 < figures["cuda_context"]["value"] <= figures["cuda_context_loaded"]["value"] < 2**31
    assert figures["cublas_workspaces"]["value"] > 0 and figures["bandwidth"]["value"] > 1e11
    assert figures["flops_bfloat16"]["value"] > 1e13
    assert not answer["notes"], answer["notes"]  # the allocator's constants are those of the simulator
    monkeypatch.delenv("ULLAGE_CALIBRATION")
    words = ["fit", "train", "llama-3.1-8b", "--on", answer["gpu"]["name"], "--json", "--no-advice"]
    assert main(words) in (0, 3, 4)
    terms = {term["name"]: term for term in json.loads(capsys.readouterr().out)["terms"]}
    assert terms["cuda_context"]["certainty"] == "calibrated"


def test_bench_train_on_this_gpu(tmp_path, capsys):
    config, records = tmp_path / "config.json", tmp_path / "records.jsonl"
    config.write_text(json.dumps(MODELS["dense"]))
    words = ["--seq", "1024", "--memory-limit", "12GiB", "--max-batch", "64", "--idle", "1", "--steps", "10", "--json"]
    assert main(["bench", "train", str(config), *words, "--records", str(records)]) == 0
    answer = json.loads(capsys.readouterr().out)
    jsonschema.validate(answer, json.loads((FOLDER / "bench.json").read_text()))
    write("bench-train.json", json.dumps(answer, indent=1))
    write("bench-train.jsonl", records.read_text())
    found = answer["break_point"]
    assert found["limited_by"] == "memory" and found["largest"] >= 2
    assert [phase["name"] for phase in answer["phases"]] == ["idle", "full_load", "changing_load"]
    for phase in answer["phases"]:
        (rank,) = phase["ranks"]
        assert rank["peak_allocated_bytes"] <= rank["peak_reserved_bytes"] <= rank["peak_used_bytes"]
    assert answer["phases"][1]["died"] is None and answer["stability"]["num_bursts"] == 2
    (record,) = [json.loads(line) for line in records.read_text().splitlines()]
    assert {figure["quantity"] for figure in record["measured"]} == {
        "max_allocated", "max_reserved", "device_used", "allocated_after_step",
    }  # fmt: skip
