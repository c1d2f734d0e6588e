"""DeepSpeed's stages, buffers and configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from ullage.account import zero
from ullage.account.fsdp import Group
from ullage.account.pools import Pools
from ullage.account.timeline import Timeline
from ullage.account.zero import Zero3, Zero12, ZeroSettings
from ullage.catalog import models as catalog
from ullage.engines.training import step
from ullage.errors import InputError
from ullage.read.deepspeed_json import parse_deepspeed, read_deepspeed
from ullage.read.machine import parse_machine
from ullage.spec.training import Precision, Recompute, TrainingJob, TrainingParallel
from ullage.units import MiB

P = 6_738_415_616


@pytest.mark.parametrize(
    ("stage", "per_parameter"), [(0, 2 + 2 + 4 + 8), (1, 2 + 2 + 12 / 8), (2, 2 + 2 / 8 + 12 / 8), (3, 16 / 8)]
)
def test_states_by_stage(stage: int, per_parameter: float) -> None:
    settings = ZeroSettings(stage=stage)
    total = zero.parameter_bytes(P, 2, 8, settings) + zero.gradient_bytes(P, 2, 8, settings)
    total += zero.master_bytes(P, 4, 8, settings) + zero.master_bytes(P, 8, 8, settings)
    assert total == pytest.approx(P * per_parameter, rel=1e-9)


def test_offload_moves_states_to_the_host() -> None:
    settings = ZeroSettings(stage=3, offload_optimizer="cpu", offload_params="cpu")
    assert zero.parameter_bytes(P, 2, 8, settings) == 0
    assert zero.master_bytes(P, 12, 8, settings) == 0
    assert zero.gradient_bytes(P, 2, 8, settings) == 0
    assert zero.host_bytes(P, P, 8, settings) == pytest.approx(P * 18 / 8, rel=1e-9)


def test_secondary_shards_of_zeropp() -> None:
    settings = ZeroSettings(stage=3, hpz_partition_size=8)
    assert zero.parameter_bytes(P, 2, 64, settings) == pytest.approx(P * 2 / 64 + P * 2 / 8, rel=1e-9)


def group(name: str, size: int) -> Group:
    return Group(
        name=name,
        gathered_bytes=(size,),
        stored_bytes=0,
        trained_gathered_bytes=size,
        reduced_bytes=size,
        num_ranks=4,
    )


def timeline() -> Timeline:
    line = Timeline(Pools())
    line.begin("all")
    return line


def test_stage_2_reduces_through_buckets_and_keeps_a_part() -> None:
    line = timeline()
    sharder = Zero12(line, ZeroSettings(stage=2, reduce_bucket=10 * MiB, overlap_comm=True), 4)
    sharder.unshard(group("a", 64 * MiB), forward=False)
    assert line.by_category["reduce_bucket"] == 2 * 20 * MiB
    sharder.reduce(group("a", 64 * MiB), [line.take("unsharded_gradients", 64 * MiB)])
    assert line.by_category["gradients"] == 16 * MiB
    assert line.by_category["unsharded_gradients"] == 0
    sharder.end_backward()
    assert line.by_category["reduce_bucket"] == 0


def test_stage_3_lets_the_oldest_go_when_too_many_are_live() -> None:
    line = timeline()
    sharder = Zero3(line, ZeroSettings(stage=3, max_live=70 * MiB, prefetch_bucket=0))
    for name in "abc":
        sharder.unshard(group(name, 64 * MiB), forward=True)
        sharder.reshard(group(name, 64 * MiB))
    assert line.by_category["unsharded_parameters"] == 2 * 64 * MiB
    sharder.end_backward()
    assert line.allocated == 0


def job(**changes: object) -> TrainingJob:
    found = catalog.find("meta-llama/Llama-2-7b-hf")
    assert found is not None
    base = {
        "model": catalog.load_entry(found),
        "machine": parse_machine("8xH100"),
        "engine": "deepspeed",
        "parallel": TrainingParallel(data_parallel_size=8, zero_stage=3),
        "precision": Precision(),
        "seq_len": 2048,
        "recompute": Recompute(kind="full"),
    }
    return TrainingJob(**(base | changes))  # type: ignore[arg-type]


def test_higher_stages_cost_less() -> None:
    peaks = [
        step(job(parallel=TrainingParallel(data_parallel_size=8, zero_stage=stage))).ranks[0].peak.allocated.bytes
        for stage in (0, 1, 2, 3)
    ]
    assert peaks[0] > peaks[1] > peaks[2] > peaks[3]


def test_the_jobs_own_json_wins() -> None:
    native = '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}'
    rank = step(job(native=native)).ranks[0]
    assert rank.after_step.find("optimizer_states") is None
    assert rank.host_bytes == pytest.approx(P * 16 / 8, rel=1e-6)


def test_a_configuration_of_the_trainer() -> None:
    config = {
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": True},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 4,
        "optimizer": {"type": "AdamW"},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 5e8,
            "stage3_prefetch_bucket_size": "auto",
            "offload_param": {"device": "cpu"},
            "typo": 1,
        },
        "whatever": 1,
    }
    found = parse_deepspeed(config, where="f")
    assert found.zero.stage == 3 and found.zero.reduce_bucket == 500_000_000
    assert found.zero.offload_params == "cpu" and found.zero.offload_optimizer is None
    assert (found.compute, found.optimizer, found.micro_batch_size, found.grad_accum) == ("float16", "adamw", None, 4)
    assert found.auto == ("train_micro_batch_size_per_gpu", "zero_optimization.stage3_prefetch_bucket_size")
    assert found.unknown == ("whatever", "zero_optimization.typo")


@pytest.mark.parametrize(
    "text",
    [
        '{"zero_optimization": 3}',
        '{"zero_optimization": {"stage": 4}}',
        '{"zero_optimization": {"reduce_bucket_size": "much"}}',
        '{"zero_optimization": {"overlap_comm": 1}}',
        "[]",
    ],
)
def test_a_bad_configuration_is_one_sentence(text: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(InputError):
        read_deepspeed(path)


def test_native_text_that_is_no_json_is_refused() -> None:
    with pytest.raises(InputError):
        step(job(native="{not json"))


def chat(version: str) -> TrainingJob:
    """OPT 350M as DeepSpeed-Chat trains it, at the libraries of a date."""
    found = catalog.find("facebook/opt-350m")
    assert found is not None
    return TrainingJob(
        model=catalog.load_entry(found),
        machine=parse_machine("8xA100-80GB"),
        engine="deepspeed",
        engine_version=version,
        parallel=TrainingParallel(data_parallel_size=8, zero_stage=2),
        precision=Precision(compute="float16", params="float16", grads="float16", master="float32"),
        micro_batch_size=8,
        seq_len=512,
    )


def test_attention_was_written_out_before_transformers_had_sdpa() -> None:
    old, new = (step(chat(f"DeepSpeed {date}")).ranks[0] for date in ("2023-04-18", "2025-01-01"))
    scores = 8 * 16 * 512 * 512 * 24
    more = max(one.allocated.bytes for one in old.moments) - max(one.allocated.bytes for one in new.moments)
    logits = 8 * 512 * 50272 * 6  # OPT's loss stays in 16 bits then
    # fp32 softmax, its cast, and what torch.max keeps; not SDPA's output and keys repeated
    assert scores * (4 + 2 + 1) < more + logits < scores * (4 + 2 + 2)


def test_a_loop_of_its_own_holds_the_last_logits() -> None:
    script, trainer = (
        step(chat(version)).ranks[0] for version in ("DeepSpeed-Chat 2023-04-18", "DeepSpeed 2023-04-18")
    )
    held = script.after_step.allocated.bytes - trainer.after_step.allocated.bytes
    assert held == pytest.approx(8 * 512 * 50272 * 2, rel=0.01)
