"""``ullage fit train``: flags, launch files and job files lead to the same answer, and say what they cannot do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import ullage
from ullage.cli import main

SCHEMA = json.loads((Path(ullage.__file__).parent / "schema" / "fit.json").read_text())
ENGINES = ["megatron", "hf_trainer", "ddp", "fsdp1", "fsdp2", "torchtitan", "deepspeed", "litgpt", "torchtune"]


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    code = main(["fit", *words, "--no-advice", "--json"])
    out, err = capsys.readouterr()
    assert code in (0, 3, 4), err
    values: dict[str, Any] = json.loads(out)
    jsonschema.validate(values, SCHEMA)
    return values


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["fit", *words]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_answers_in_the_schema(capsys: pytest.CaptureFixture[str], engine: str) -> None:
    values = answer(capsys, "train", "llama-3.2-1b", "--on", "8xA100-80GB", "--engine", engine, "--seq", "2048")
    assert values["job"]["kind"] == "train"
    worst = values["worst"]
    assert worst["allocated_peak_bytes"] <= worst["reserved_peak_bytes"] <= worst["device_used_bytes"]
    assert sum(term["bytes"] for term in values["terms"]) == worst["device_used_bytes"]
    assert sum(rank["num_ranks"] for rank in values["ranks"]) == 8


def test_the_schema_wants_moments_of_training_and_serving_of_serving(capsys: pytest.CaptureFixture[str]) -> None:
    values = answer(capsys, "train", "llama-3.2-1b", "--on", "1xA100-80GB")
    for spoilt in (
        {key: value for key, value in values.items() if key != "moments"},
        {**values, "job": {**values["job"], "kind": "serve"}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(spoilt, SCHEMA)


def job_file(tmp_path: Path, **fields: Any) -> str:
    job = {
        "kind": "train",
        "model": "llama-3.2-1b",
        "gpu": "A100-80GB",
        "num_gpus": 8,
        "engine": "fsdp2",
        "seq_len": 2048,
        "precision": {"compute": "bf16", "params": "fp32", "grads": "fp32", "moments": "fp32"},
        "parallel": {"fsdp": "full_shard"},
        **fields,
    }
    path = tmp_path / "job.json"
    path.write_text(json.dumps({"job": {key: value for key, value in job.items() if value is not None}}))
    return str(path)


def test_a_job_file_says_what_the_flags_say(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    by_file = answer(capsys, job_file(tmp_path))
    by_flags = answer(capsys, "train", "llama-3.2-1b", "--on", "8xA100-80GB", "--engine", "fsdp2", "--seq", "2048")
    assert by_file["worst"] == by_flags["worst"]
    assert by_file["job"]["parallel"]["data_parallel_size"] == 8


def test_the_machine_of_a_job_file_can_be_changed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    values = answer(capsys, job_file(tmp_path), "--on", "16xH200")
    assert (values["device"]["num_gpus"], values["job"]["parallel"]["data_parallel_size"]) == (16, 16)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"seq_len": None}, "seq_len"),
        ({"engine": "nonsense"}, "nonsense"),
        ({"gpu": "nonsense"}, "nonsense"),
        ({"parallel": {"tp": 3}}, "8 GPUs"),
        ({"parallel": {"dp": 4, "tp": 4}}, "8 GPUs"),
        ({"kind": "dream"}, "dream"),
        ({"recompute": 7}, "7"),
        ({"model": None}, "model"),
    ],
)
def test_what_is_wrong_in_a_job_file_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, fields: dict[str, Any], word: str
) -> None:
    assert word in refused(capsys, job_file(tmp_path, **fields))


def test_options_of_serving_are_refused_beside_a_training_job(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "--context" in refused(capsys, job_file(tmp_path), "--context", "8k")


SCRIPT = """export CUDA_DEVICE_MAX_CONNECTIONS=1
ARGS="--num-layers 4 --hidden-size 1024 --num-attention-heads 8 --seq-length 2048 --max-position-embeddings 2048"
torchrun pretrain_gpt.py $ARGS --tensor-model-parallel-size 2 --sequence-parallel --vocab-size 32000 \\
  --micro-batch-size 2 --global-batch-size 64 --bf16 --use-distributed-optimizer
"""


def test_a_megatron_script_is_a_job(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "run.sh"
    path.write_text(SCRIPT)
    values = answer(capsys, "train", "--from", f"megatron:{path}", "--on", "8xA100-80GB")
    assert values["job"]["engine"] == "megatron"
    assert values["job"]["parallel"]["tensor_parallel_size"] == 2
    assert values["job"]["micro_batch_size"] == 2
    assert "--tp" in refused(capsys, "train", "--from", f"megatron:{path}", "--on", "8xA100-80GB", "--tp", "4")


def test_a_deepspeed_configuration_lies_over_the_flags(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    config = {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 8,
    }
    path.write_text(json.dumps(config))
    words = ("train", "llama-3.2-1b", "--from", f"deepspeed:{path}", "--on", "8xA100-80GB")
    values = answer(capsys, *words, "--micro-batch", "2")
    job = values["job"]
    assert (job["parallel"]["zero_stage"], job["micro_batch_size"], job["grad_accum"]) == (3, 2, 8)
    assert job["precision"] == {"master": "float32"}
    assert values["ranks"][0]["host_bytes"] > 0
    assert "train_micro_batch_size_per_gpu" in " ".join(job["assumed"])
    assert "--zero" in refused(capsys, *words, "--zero", "2")


def test_a_framework_without_a_reader_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "train", "--from", "nemo:x.yaml", "--on", "8xH100")
    assert "nemo" in said and "megatron, deepspeed, torchtitan, accelerate" in said


def test_a_torchtitan_configuration_lies_over_the_flags(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("tomllib")
    path = tmp_path / "train.toml"
    path.write_text(
        '[model]\nflavor = "1B"\n[training]\nlocal_batch_size = 2\nseq_len = 2048\n[parallelism]\n'
        'tensor_parallel_degree = 2\n[activation_checkpoint]\nmode = "full"\n'
    )
    words = ("train", "llama-3.2-1b", "--from", f"torchtitan:{path}", "--on", "8xA100-80GB")
    job = answer(capsys, *words)["job"]
    assert (job["engine"], job["micro_batch_size"], job["seq_len"]) == ("torchtitan", 2, 2048)
    assert (job["parallel"]["data_parallel_size"], job["parallel"]["tensor_parallel_size"]) == (4, 2)
    assert job["recompute"] == {"kind": "full"}
    assert "--seq" in refused(capsys, *words, "--seq", "4096")
    path.write_text("[parallelism]\ntensor_parallel_degree = 3\n")
    assert "8 GPUs" in refused(capsys, *words)


@pytest.mark.parametrize(
    ("text", "engine", "stage"),
    [
        ("distributed_type: FSDP\nfsdp_config:\n  fsdp_version: 2\n", "fsdp2", None),
        ("distributed_type: MULTI_GPU\n", "ddp", None),
        ("distributed_type: DEEPSPEED\ndeepspeed_config:\n  zero_stage: 3\n", "deepspeed", 3),
    ],
)
def test_an_accelerate_configuration_names_the_framework(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, engine: str, stage: int | None
) -> None:
    pytest.importorskip("yaml")
    path = tmp_path / "accelerate.yaml"
    path.write_text(text + "mixed_precision: bf16\nnum_processes: 8\n")
    job = answer(capsys, "train", "llama-3.2-1b", "--from", f"accelerate:{path}", "--on", "8xA100-80GB")["job"]
    assert job["engine"] == engine
    assert job["parallel"].get("zero_stage") == stage
    said = refused(capsys, "train", "llama-3.2-1b", "--from", f"accelerate:{path}", "--on", "4xA100-80GB")
    assert "num_processes is 8" in said


def test_the_worst_moment_is_the_one_with_the_most_allocated(capsys: pytest.CaptureFixture[str]) -> None:
    values = answer(capsys, "train", "llama-3.2-1b", "--on", "8xA100-80GB", "--engine", "fsdp2", "--seq", "2048")
    assert values["worst"]["allocated_peak_bytes"] == max(one["allocated_bytes"] for one in values["moments"])
