"""litgpt: adapters, quantised bases, logits that stay; published runs on one card."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from conftest import need_shared

from ullage.catalog import models as catalog
from ullage.engines.litgpt.plan import adapter_bytes, rules_of
from ullage.engines.training import step
from ullage.read.machine import parse_machine
from ullage.spec.training import Lora, Precision, TrainingJob, TrainingParallel
from ullage.units import GiB

QV = Lora(rank=8, targets=("query", "value"))


def job(**changes: object) -> TrainingJob:
    found = catalog.find("meta-llama/Llama-2-7b-hf")
    assert found is not None
    base = {
        "model": catalog.load_entry(found),
        "machine": parse_machine("1xA100-40GB"),
        "engine": "litgpt",
        "precision": Precision(moments="bfloat16"),
        "seq_len": 512,
        "grad_accum": 8,
        "method": "lora",
        "lora": QV,
    }
    return TrainingJob(**(base | changes))  # type: ignore[arg-type]


def allocated(one: TrainingJob) -> int:
    return max(ledger.allocated.bytes for ledger in step(one).ranks[0].moments)


@pytest.mark.parametrize(
    ("method", "trained"),
    [("lora", 4_194_304), ("llama_adapter", 32 * (10 * 4096 + 32))],
)
def test_trained_parameters_are_litgpts(method: str, trained: int) -> None:
    """4,194,304 is what litgpt prints for rank 8 on query and value of Llama 2 7B."""
    one = job(method=method, lora=QV if method == "lora" else None)
    assert adapter_bytes(one)[0] * 32 == trained


def test_parallel_blocks_keep_their_input_once() -> None:
    """GPT-NeoX: attention and feed-forward read the same tensor; read one after the other each keeps one of its own."""
    found = catalog.find("stabilityai/stablelm-base-alpha-3b")
    assert found is not None
    model = catalog.load_entry(found)
    assert all(layer.parallel for layer in model.layers)
    apart = replace(model, layers=tuple(replace(layer, parallel=False) for layer in model.layers))
    stream = 512 * 4096 * 2
    more = allocated(job(model=apart)) - allocated(job(model=model))
    assert more == pytest.approx(len(model.layers) * stream, rel=0.1)


def test_rules_by_version() -> None:
    assert rules_of("2023-09").narrow_norm and not rules_of("2023-10-27").narrow_norm
    assert rules_of("8641822 (2023-10, torch 2.1.0)").longest_first
    assert not rules_of("26857050").narrow_norm
    assert rules_of("2025-01").stable_embedding and not rules_of("2024-05").stable_embedding


def test_a_quantised_base_is_smaller_but_keeps_inputs() -> None:
    plain, quantised = step(job()).ranks[0], step(job(base_quantization="nf4", method="qlora")).ranks[0]
    saved = plain.after_step.find("weights").bytes - quantised.after_step.find("weights").bytes  # type: ignore[union-attr]
    assert saved == pytest.approx(6_607_077_376 * (2 - 0.5625), rel=1e-3)
    found = [[one.find("activations") for one in rank.moments] for rank in (plain, quantised)]
    kept = [max(term.bytes for term in terms if term) for terms in found]
    assert kept[1] > kept[0]


def test_blocks_before_the_first_adapter_keep_nothing() -> None:
    """Version 1 starts at the third block; version 2 has scales and biases in every block."""
    from ullage.engines.litgpt.plan import plan_of

    for method, without in (("llama_adapter", 2), ("llama_adapter_v2", 0), ("lora", 0)):
        plan = plan_of(job(method=method, lora=QV if method == "lora" else None), rules_of(""), 1)
        assert sum(block.without_grad for block in plan.blocks) == without


def test_a_paged_optimizer_has_no_states_on_the_device() -> None:
    assert step(job(base_quantization="nf4", method="qlora")).ranks[0].after_step.find("optimizer_states") is None
    assert step(job()).ranks[0].after_step.find("optimizer_states") is not None


def test_several_devices_shard_and_recompute_and_say_so() -> None:
    one = job(machine=parse_machine("4xA10G"), parallel=TrainingParallel(data_parallel_size=4))
    answer = step(one)
    assert answer.job.recompute.kind == "full"
    assert len(answer.job.assumed) == 1
    assert allocated(one) < allocated(job()) / 2


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("litgpt-hub-mistral-7b-lora-1xA10G", 0.005),
        ("litgpt-hub-llama-3.1-8b-lora-1xA10G", 0.005),
        ("litgpt-hub-phi-3-lora-1xA10G", 0.005),
        ("litgpt-hub-llama-2-7b-qlora-1xA10G", 0.03),
        ("litgpt-hub-phi-2-qlora-1xA10G", 0.03),
    ],
)
def test_published_runs(name: str, error: float) -> None:
    path = need_shared("truth", "training.jsonl")
    record = next(one for one in map(json.loads, path.read_text().splitlines()) if one["id"] == name)
    said = record["job"]
    found = catalog.find(said["model"])
    assert found is not None
    lora = Lora(
        rank=said["lora"]["rank"], targets=tuple(said["lora"]["targets"]), dropout=said["lora"].get("dropout", 0.0)
    )
    one = job(
        model=catalog.load_entry(found),
        engine_version=said["engine_version"],
        micro_batch_size=said["micro_batch_size"],
        lora=lora,
        method=said["method"],
        base_quantization=said.get("base_quantization"),
    )
    assert allocated(one) == pytest.approx(record["measured"][0]["gib"] * GiB, rel=error)
