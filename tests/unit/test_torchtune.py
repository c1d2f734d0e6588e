"""torchtune's step: adapters, chunks of the output, sharding."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ullage.catalog import models as catalog
from ullage.engines.torchtune.defaults import rules_of
from ullage.engines.training import step
from ullage.errors import InputError
from ullage.read.machine import parse_machine
from ullage.read.model_source import load_model
from ullage.read.training_words import RECIPES
from ullage.spec.training import Lora, Precision, Recompute, TrainingJob, TrainingParallel
from ullage.units import GiB


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


UNSAID = Recompute(given=False)


def test_recipes_recompute_by_size_and_say_so() -> None:
    answer = step(job(recompute=UNSAID))
    assert answer.job.recompute.kind == "full" and len(answer.job.assumed) == 2
    eight = {"machine": parse_machine("8xA100-80GB"), "parallel": TrainingParallel(data_parallel_size=8)}
    assert step(job(recompute=UNSAID, **eight)).job.recompute.kind == "none"
    assert step(job(recompute=UNSAID, method="full", lora=None, **eight)).job.recompute.kind == "full"
    for kind in ("none", "full"):
        assert step(job(recompute=Recompute(kind=kind))).job.recompute.kind == kind, "what is said is not changed"


def test_the_range_holds_both_where_nothing_is_said_of_recompute() -> None:
    bounds = step(job(recompute=UNSAID)).ranks[0].peak.allocated
    said = [allocated(job(recompute=Recompute(kind=kind))) for kind in ("full", "none")]
    assert bounds.bytes == said[0] and bounds.low_bytes <= said[0] < said[1] <= bounds.high_bytes


def test_a_compiled_block_keeps_eighteen_and_a_half_hidden_states() -> None:
    """Input, two norms, q, k, v and result of attention, the sum, and three of the feed-forward's width."""
    hidden, layers = 4096 * 4096 * 2, 32
    kept = [step(job(compile=True, recompute=Recompute(kind=kind))).ranks[0].moments for kind in ("none", "full")]
    forward = [next(one for one in moments if one.moment == "forward").allocated for moments in kept]
    sums = [next(one.bytes for one in term.children if one.name == "activations") for term in forward]
    assert (sums[0] - sums[1]) / hidden / layers == pytest.approx(17.5, rel=0.02)


def test_a_paged_optimizer_steps_in_the_backward_pass_and_leaves_no_states() -> None:
    changes = {"method": "full", "lora": None, "optimizer_impl": None, "recompute": Recompute(kind="full")}
    paged = step(job(**changes, optimizer="paged_adamw_8bit", precision=Precision(moments="int8"), compile=True))
    rank = paged.ranks[0]
    assert rank.after_step.find("gradients") is None and rank.after_step.find("optimizer_states") is None
    table, logits = 128_256 * 4096 * 2, 4096 * 128_256 * 2
    floor = 8_030_261_248 * 2 + 32 * 4096 * 4096 * 2 + logits + 2 * table
    assert rank.peak.allocated.bytes == pytest.approx(floor, rel=0.02), "two gradients of the head, one of the logits"
    assert any("paged" in sentence for sentence in paged.job.assumed)


def test_offloaded_activations_leave_the_inputs_of_five_blocks() -> None:
    full = Recompute(kind="full")
    plain, away = (step(job(compile=True, recompute=full, offload=sent)) for sent in ((), (("activations", "cpu"),)))
    ledgers = [next(one for one in answer.ranks[0].moments if one.moment == "loss") for answer in (plain, away)]
    hidden = 4096 * 4096 * 2
    assert ledgers[0].allocated.bytes - ledgers[1].allocated.bytes == 27 * hidden
    assert away.ranks[0].host_bytes == 27 * hidden and plain.ranks[0].host_bytes == 0
    with pytest.raises(InputError, match="checkpointing"):
        step(job(recompute=Recompute(), offload=(("activations", "cpu"),)))


def test_states_of_eight_bits_are_a_byte_a_moment_and_their_scales() -> None:
    rank = step(job(method="full", lora=None, optimizer="adamw_8bit", recompute=Recompute(kind="full"))).ranks[0]
    states = rank.after_step.find("optimizer_states")
    assert states is not None and states.bytes == pytest.approx(2 * 8_030_261_248 * (1 + 4 / 256), rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "published"),
    [
        ({"loss": "plain", "recompute": Recompute()}, 60.0),
        ({"loss": "plain", "recompute": Recompute(), "compile": True}, 51.0),
        ({"recompute": Recompute(), "compile": True}, 42.9),
        ({"recompute": Recompute(kind="full"), "compile": True}, 24.9),
    ],
    ids=["packed", "compiled", "chunked", "recomputed"],
)
def test_the_ladder_of_the_readme(changes: dict[str, object], published: float) -> None:
    """Llama 3.2 3B in full, 2 x 4,096 tokens: meta-pytorch/torchtune@bd2a0fc:README.md (Peak Memory Active, GiB)."""
    found = catalog.find("meta-llama/Llama-3.2-3B")
    assert found is not None
    shape = {"model": catalog.load_entry(found), "seq_len": 4096, "method": "full", "lora": None}
    assert allocated(job(**shape, **changes)) / GiB == pytest.approx(published, rel=0.01)


def test_before_chunks_the_recipe_held_fp32_logits() -> None:
    old, new = (allocated(job(engine_version=version)) for version in ("0.1.0", "0.3.0"))
    assert old - new > 4096 * 128_256 * 4


@pytest.mark.parametrize(
    ("version", "chunked"),
    [("0.1.1", False), ("0.2.1", False), ("0.3.1", True), ("", True), ("bd2a0fc7", True), ("main of 2024-05", False)],
)
def test_the_loss_of_a_version(version: str, chunked: bool) -> None:
    assert rules_of(version).chunked_loss == chunked


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


@pytest.mark.parametrize(("engine", "recipe"), [
    ("torchtune", "amp"), ("torchtune", "fp32"), ("litgpt", "amp"), ("litgpt", "bf16-master"), ("torchtitan", "fp32"),
])  # fmt: skip
def test_formats_that_the_walk_does_not_follow_are_refused(engine, recipe):
    job = TrainingJob(
        model=load_model("llama-3.2-1b"),
        machine=parse_machine("1xH100"),
        engine=engine,
        parallel=TrainingParallel(),
        precision=RECIPES[recipe],
        seq_len=1024,
    )
    with pytest.raises(InputError, match=r"do not follow (activations in fp32|parameters wider)"):
        step(job)
