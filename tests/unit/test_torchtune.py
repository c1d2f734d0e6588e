"""torchtune's step: adapters, chunks of the output, sharding."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ullage.catalog import models as catalog
from ullage.engines.training import step
from ullage.read.machine import parse_machine
from ullage.spec.training import Lora, Precision, Recompute, TrainingJob, TrainingParallel


def job(**changes: object) -> TrainingJob:
    found = catalog.find("meta-llama/Llama-3.1-8B")
    assert found is not None
    base = {
        "model": catalog.load_entry(found),
        "machine": parse_machine("1xA100-80GB"),
        "engine": "torchtune",
        "precision": Precision(moments="bfloat16"),
        "micro_batch_size": 2,
        "seq_len": 2048,
        "method": "lora",
        "lora": Lora(rank=8, targets=("q_proj", "v_proj", "output_proj", "mlp")),
        "optimizer_impl": "fused",
    }
    return TrainingJob(**(base | changes))  # type: ignore[arg-type]


def allocated(one: TrainingJob) -> int:
    return max(ledger.allocated.bytes for ledger in step(one).ranks[0].moments)


def test_adapter_recipes_recompute_and_say_so() -> None:
    answer = step(job())
    assert answer.job.recompute.kind == "full" and len(answer.job.assumed) == 2


def test_chunks_cost_less_than_a_plain_loss() -> None:
    assert allocated(job()) < allocated(job(loss="plain"))


def test_a_frozen_base_has_no_gradients_and_sharding_divides_it() -> None:
    one, eight = step(job()).ranks[0], step(job(
        machine=parse_machine("8xA100-80GB"), parallel=TrainingParallel(data_parallel_size=8)
    )).ranks[0]  # fmt: skip
    weights = [rank.after_step.find("weights").bytes for rank in (one, eight)]  # type: ignore[union-attr]
    assert weights[0] == pytest.approx(8_030_261_248 * 2, rel=5e-3)
    assert weights[1] == pytest.approx(weights[0] / 8, rel=1e-3)
    assert one.after_step.find("gradients") is None


def test_full_training_keeps_weights_gradients_and_states() -> None:
    one = job(method="full", lora=None, recompute=Recompute(kind="full"))
    assert allocated(one) > 8_030_261_248 * (2 + 2 + 4)


def test_scales_of_4_bit_tensors_are_sharded_with_the_values() -> None:
    """torchao's NF4 tensor gathers values and scales alike; bitsandbytes' scales stay whole on every rank."""
    quantised = job(
        method="qlora",
        base_quantization="nf4",
        machine=parse_machine("8xA100-80GB"),
        parallel=TrainingParallel(data_parallel_size=8, fsdp="full_shard"),
    )
    weights = [
        step(one).ranks[0].after_step.find("weights").bytes  # type: ignore[union-attr]
        for one in (quantised, replace(quantised, engine="fsdp2"))
    ]
    linear = 8_030_261_248 - 2 * 128_256 * 4096
    assert weights[1] - weights[0] == pytest.approx(linear / 64 * 7 / 8, rel=0.05)


def test_a_compiled_loss_frees_the_logits_of_each_chunk() -> None:
    logits = 4096 * 128_256 * 2
    chunked, plain = (allocated(job(compile=True, loss=loss)) for loss in (None, "plain"))
    assert logits < plain - chunked < 6 * logits
