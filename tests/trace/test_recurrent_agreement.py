"""Traced steps of models with delta rules and short convolutions beside the closed form, both without kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch
import transformers

from ullage.read.hf_config import read_config_object
from ullage.spec.training import TrainingJob
from ullage.trace.compare import agreement
from ullage.trace.compare.agreement import Case, compare
from ullage.trace.models.hf import Built

pytestmark = pytest.mark.reference
COMMON = {"num_hidden_layers": 4, "vocab_size": 65536, "torch_dtype": "bfloat16"}
LFM2 = COMMON | {
    "model_type": "lfm2",
    "architectures": ["Lfm2ForCausalLM"],
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "conv_L_cache": 3,
    "conv_bias": False,
    "layer_types": ["conv", "conv", "full_attention", "conv"],
    "block_auto_adjust_ff_dim": True,
    "block_ff_dim": 6656,
    "block_ffn_dim_multiplier": 1.0,
    "block_multiple_of": 256,
    "tie_word_embeddings": True,
}
QWEN3_NEXT = COMMON | {
    "model_type": "qwen3_next",
    "architectures": ["Qwen3NextForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_value_heads": 32,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "partial_rotary_factor": 0.25,
    "tie_word_embeddings": False,
}
GRANITE = COMMON | {
    "model_type": "granitemoehybrid",
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 512,
    "shared_intermediate_size": 2048,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "mamba_n_heads": 32,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 256,
    "layer_types": ["mamba", "mamba", "attention", "mamba"],
    "tie_word_embeddings": True,
}
CASES = [
    (LFM2, "none", ()),
    (LFM2, "full", ("q_proj", "in_proj")),
    (QWEN3_NEXT, "none", ()),
    (QWEN3_NEXT, "full", ()),
    (QWEN3_NEXT, "full", ("q_proj", "in_proj_qkvz")),
    (GRANITE, "none", ()),
    (GRANITE, "full", ()),
    (GRANITE, "full", ("q_proj", "in_proj")),
]


@pytest.mark.parametrize(("config", "recompute", "lora"), CASES, ids=range(len(CASES)))
def test_recurrent_models_agree(
    config: dict[str, Any], recompute: str, lora: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {
        name: value for name, value in config.items() if name not in ("torch_dtype", "architectures", "model_type")
    }

    def build(model: Any, _job: Any) -> Built:
        made = transformers.AutoConfig.for_model(config["model_type"], **values)
        made.use_cache = False
        with torch.device("meta"):
            network = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
        return Built(network, made, model.name, [])

    def without_kernels(job: TrainingJob) -> Any:
        return walk(replace(job, flags=(*job.flags, ("recurrent_kernels", "torch"))))

    walk = agreement.step
    monkeypatch.setattr(agreement, "step", without_kernels)
    monkeypatch.setattr(agreement, "build_described", build)
    monkeypatch.setattr(agreement, "load_model", lambda name: read_config_object(config, where=name, name=name))
    monkeypatch.setattr(agreement, "with_overrides", lambda model, *_args, **_more: model)
    case = Case(model="small", overrides=(), recompute=recompute, lora=lora, loss="liger", micro_batch=2, seq_len=512)
    found = compare(case)
    assert abs(found.peak_error) <= 0.01, found.moments
    assert abs(found.layer_error) <= 0.008, found.layers
    for name, traced, closed in found.moments:
        assert closed == pytest.approx(traced, rel=0.02), name
