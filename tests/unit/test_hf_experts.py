"""Routed experts under a quantised base: lists of linears before transformers 5, stacked tensors since."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ullage.catalog import models as catalog
from ullage.engines.hf_trainer import experts
from ullage.engines.training import TrainingRank, step
from ullage.read.machine import parse_machine
from ullage.spec.training import Lora, Precision, Recompute, TrainingJob

EXPERTS = 32 * 8 * 3 * 4096 * 14336


def job(version: str, base: str = "nf4") -> TrainingJob:
    entry = catalog.find("mistralai/Mixtral-8x7B-v0.1")
    assert entry is not None
    return TrainingJob(
        model=catalog.load_entry(entry),
        machine=parse_machine("1xH200"),
        engine="hf_trainer",
        engine_version=version,
        precision=Precision(grads="float32"),
        micro_batch_size=1,
        seq_len=2048,
        packing=True,
        recompute=Recompute(kind="full"),
        attention="flash",
        loss="liger",
        method="qlora",
        lora=Lora(rank=16, targets=("q_proj", "v_proj")),
        base_quantization=base,
    )


def rank(of: TrainingJob) -> TrainingRank:
    (found,) = step(of).ranks
    return found


def weights(of: TrainingJob) -> int:
    found = rank(of).after_step.find("weights")
    assert found is not None
    return found.bytes


def test_lists_of_linears_are_quantised_and_stacks_are_not() -> None:
    before, after = weights(job("transformers 4.57.1")), weights(job("transformers 5.23.0"))
    assert before < 0.6 * 46.7e9 < after
    assert after - before == pytest.approx(EXPERTS * (2 - 0.516), rel=0.01)  # fused kernels: nothing is prepared
    assert any("stay in 16 bits" in sentence for sentence in step(job("transformers 5.23.0")).warnings)
    assert not any("experts" in sentence for sentence in step(job("transformers 4.57.1")).warnings)


def test_preparation_makes_stacks_fp32() -> None:
    plain = replace(job("transformers 5.23.0"), loss="plain")
    found = rank(plain).after_step.find("fp32_experts")
    assert found is not None and found.bytes == 2 * EXPERTS and found.low_bytes == 0
    assert rank(replace(plain, engine_version="transformers 4.57.1")).after_step.find("fp32_experts") is None


@pytest.mark.parametrize(("base", "width"), [("nf4", 2), ("int8", 4)])
def test_axolotl_quantises_stacks_and_makes_a_layers_whole_again(base: str, width: int) -> None:
    one = job("axolotl 0.18.0", base)
    assert weights(one) == weights(job("transformers 4.57.1", base))
    layer = one.model.layers[0]
    assert experts.dequantised_bytes(one, layer) == EXPERTS // 32 * width
    assert experts.dequantised_bytes(job("transformers 5.23.0", base), layer) == 0
    assert any("quantize_moe_experts" in sentence for sentence in step(one).warnings)


def test_a_dense_model_and_a_wide_base_have_no_stacks() -> None:
    assert not experts.are_stacked(replace(job("transformers 5.23.0"), base_quantization=None))
    entry = catalog.find("mistralai/Mistral-7B-v0.1")
    assert entry is not None
    assert not experts.are_stacked(replace(job("transformers 5.23.0"), model=catalog.load_entry(entry)))
