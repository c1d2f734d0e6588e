"""Unsloth by the words of other programs: LLaMA-Factory's and axolotl's switches."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ullage.cli import main
from ullage.engines.training import step
from ullage.read.machine import parse_machine
from ullage.read.model_source import load_model
from ullage.read.recipe_fields import Fields
from ullage.read.recipe_words import lay_over
from ullage.read.recipes import READERS
from ullage.spec.training import TrainingJob

QLORA = {
    "stage": "sft",
    "finetuning_type": "lora",
    "lora_target": "all",
    "lora_rank": 8,
    "quantization_bit": 4,
    "cutoff_len": 2048,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "bf16": True,
}
AXOLOTL = {
    "base_model": "meta-llama/Meta-Llama-3-8B",
    "adapter": "qlora",
    "load_in_4bit": True,
    "lora_r": 8,
    "lora_target_linear": True,
    "sequence_len": 2048,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "bf16": True,
    "gradient_checkpointing": True,
    "optimizer": "adamw_torch",
}


def laid(kind, values, model="llama-3-8b"):
    words = READERS[kind](Fields(values, "recipe"))
    start = TrainingJob(model=load_model(model), machine=parse_machine("1xA100-80GB-SXM"), engine="hf_trainer")
    return lay_over(start, words, Path("recipe.yaml"))


def kept(job):
    (rank,) = step(job).ranks
    ledger = next(one for one in rank.moments if one.moment == "loss")
    found = ledger.find("kept_activations")
    return 0 if found is None else found.bytes


STREAM = 2 * 2048 * 4096 * 2


def test_llamafactory_hands_the_job_to_unsloth_with_checkpoints_on_the_host():
    job = laid("llamafactory", {**QLORA, "use_unsloth": True})
    answer = step(job)
    assert answer.job.engine == "unsloth"
    assert answer.ranks[0].host_bytes == 32 * STREAM
    assert kept(job) == STREAM
    off = laid("llamafactory", {**QLORA, "use_unsloth": True, "disable_gradient_checkpointing": True})
    assert kept(off) == STREAM  # LLaMA-Factory asks Unsloth for its checkpoints whatever the file says


def test_checkpoints_after_unsloths_leave_none_on_the_gpu():
    plain, host = (laid("llamafactory", {**QLORA, "use_unsloth_gc": on}) for on in (False, True))
    assert step(host).job.engine == "hf_trainer"
    assert kept(host) == 0 < kept(plain)
    streams = laid("axolotl", {**AXOLOTL, "activation_offloading": True})
    assert 0 < kept(streams) < kept(laid("axolotl", AXOLOTL))
    for settings in ({"activation_offloading": "legacy"}, {"gradient_checkpointing": "unsloth"}):
        assert kept(laid("axolotl", {**AXOLOTL, **settings})) == 0


def test_without_checkpoints_there_is_nothing_to_move():
    off = {**QLORA, "disable_gradient_checkpointing": True}
    assert kept(laid("llamafactory", {**off, "use_unsloth_gc": True})) == kept(laid("llamafactory", off))


def test_what_unsloth_does_not_follow_is_refused_in_its_words(tmp_path, capsys):
    full = {"stage": "sft", "finetuning_type": "full", "use_unsloth": True, "bf16": True, "pure_bf16": True}
    path = tmp_path / "train.yaml"
    path.write_text(json.dumps({"model_name_or_path": "meta-llama/Meta-Llama-3-8B", **full}))
    line = ["fit", "train", "llama-3-8b", "--on", "1xA100-80GB-SXM", "--from", f"llamafactory:{path}"]
    assert main(line) == 2
    assert "full fine-tuning under Unsloth" in " ".join(capsys.readouterr().err.split())
    path.write_text(json.dumps({"model_name_or_path": "meta-llama/Meta-Llama-3-8B", **QLORA, "use_unsloth": True}))
    assert main(line) == 0
    assert "unsloth" in capsys.readouterr().out


@pytest.mark.parametrize("loss", ["cut", "chunked"])
def test_a_release_of_unsloth_can_be_named_behind_the_program(loss):
    named = {"cut": "llamafactory with unsloth 2025.3", "chunked": "llamafactory with unsloth 2025.9"}[loss]
    job = replace(laid("llamafactory", {**QLORA, "use_unsloth": True}), engine_version=named)
    ledger = next(one for one in step(job).ranks[0].moments if one.moment == "loss")
    term = ledger.find("loss")
    assert term is not None
    assert ("chunks" in term.formula) == (loss == "chunked")
