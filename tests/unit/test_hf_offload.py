"""What the Trainer's rules keep on the host: checkpoints, states, whole shards."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ullage.catalog import models as catalog
from ullage.engines.hf_trainer.offload import UNDER_WAY
from ullage.engines.training import TrainingRank, step
from ullage.errors import InputError
from ullage.read.machine import parse_machine
from ullage.spec.training import Lora, Precision, Recompute, TrainingJob, TrainingParallel

TOKENS, HIDDEN, LAYERS = 4 * 4096, 4096, 32
STREAM = 2 * TOKENS * HIDDEN


def job(**settings: object) -> TrainingJob:
    entry = catalog.find("mistralai/Mistral-7B-v0.1")
    assert entry is not None
    made = TrainingJob(
        model=catalog.load_entry(entry),
        machine=parse_machine("1xA100-80GB-SXM"),
        engine="hf_trainer",
        engine_version="transformers 5.23.0",
        precision=Precision(moments="bfloat16"),
        optimizer_impl="fused",
        micro_batch_size=4,
        seq_len=4096,
        packing=True,
        recompute=Recompute(kind="full"),
        attention="flash",
        loss="liger",
    )
    return replace(made, **settings)  # type: ignore[arg-type]


def rank(of: TrainingJob) -> TrainingRank:
    (found,) = step(of).ranks
    return found


def term(of: TrainingJob, moment: str, name: str) -> int:
    ledger = next(one for one in rank(of).moments if one.moment == moment)
    found = ledger.find(name)
    return found.bytes if found else 0


ACTIVATIONS = (("activations", "cpu"),)


def test_checkpoints_on_the_host_leave_five_on_the_gpu() -> None:
    here, away = job(), job(offload=ACTIVATIONS)
    assert term(here, "loss", "kept_activations") == LAYERS * STREAM
    assert term(away, "loss", "kept_activations") == UNDER_WAY * STREAM
    assert rank(away).host_bytes == LAYERS * STREAM and rank(here).host_bytes == 0


def test_without_recompute_five_tensors_of_the_last_layer_stay() -> None:
    none = Recompute(kind="none")
    here, away = job(recompute=none, micro_batch_size=1), job(recompute=none, micro_batch_size=1, offload=ACTIVATIONS)
    whole = term(here, "loss", "kept_activations")
    assert term(away, "loss", "kept_activations") == min(whole // LAYERS, UNDER_WAY * 2 * 4096 * 14336)
    assert rank(away).host_bytes == term(here, "loss", "kept_activations")
    assert rank(away).peak.allocated.bytes < rank(here).peak.allocated.bytes


def test_offload_never_asks_for_more_of_the_gpu() -> None:
    for one in (job(), job(grad_accum=4), job(loss="plain"), job(recompute=Recompute(kind="none"), micro_batch_size=1)):
        for offload in (ACTIVATIONS, (("optimizer", "cpu"),), (*ACTIVATIONS, ("optimizer", "cpu"))):
            away = rank(replace(one, offload=offload))
            assert away.peak.allocated.bytes <= rank(one).peak.allocated.bytes
            assert away.host_bytes > 0


def test_states_on_the_host_leave_no_step_on_the_gpu() -> None:
    here, away = rank(job()), rank(job(offload=(("optimizer", "cpu"),)))
    assert here.after_step.find("optimizer") is not None and away.after_step.find("optimizer") is None
    assert not any("optimizer step" in one.moment for one in away.moments)
    assert [one.moment for one in away.moments] == [
        one.moment for one in here.moments if one.moment != "optimizer step"
    ]


def test_shards_on_the_host_leave_gathered_units_and_the_scales_of_a_4_bit_base() -> None:
    sharded = job(
        parallel=TrainingParallel(data_parallel_size=2, fsdp="full_shard"),
        machine=parse_machine("2xA100-80GB-SXM"),
        method="qlora",
        base_quantization="nf4",
        lora=Lora(rank=16, targets=("q_proj", "v_proj")),
        precision=Precision(grads="float32"),
    )
    here, away = rank(sharded), rank(replace(sharded, offload=(("params", "cpu"), ("optimizer", "cpu"))))
    weights = away.after_step.find("weights")
    linears = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    assert weights is not None and weights.bytes == pytest.approx(linears / 64 * (1 + 4 / 256), rel=1e-3)
    assert away.after_step.allocated.bytes < here.after_step.allocated.bytes
    gathered = away.peak.find("unsharded_parameters")
    assert gathered is not None and gathered.bytes > 0 and away.host_bytes > 0


def test_parameters_on_the_host_need_sharding() -> None:
    with pytest.raises(InputError, match="under FSDP or ZeRO only"):
        step(job(offload=(("params", "cpu"),)))


def test_fsdp_2_is_its_own_engines_to_answer() -> None:
    two = job(
        engine_version="axolotl, FSDP2",
        parallel=TrainingParallel(data_parallel_size=2, fsdp="full_shard"),
        machine=parse_machine("2xA100-80GB-SXM"),
        offload=ACTIVATIONS,
        optimizer="adamw_8bit",
    )
    answer = step(two)
    assert answer.job.engine == "fsdp2"
    assert any("as if they were on the GPU" in sentence for sentence in answer.job.assumed)
