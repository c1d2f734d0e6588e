"""The tables of kept tensors against what autograd keeps.

``MEASURED`` was taken with torch 2.13.0 and transformers 5.23.0 on CPU, in bfloat16, with hooks on saved tensors: every
storage once, parameters left out, the difference of a model with one layer more. Where torch and transformers are
installed, the same is measured again.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from ullage.account.activations.layer import layer_table
from ullage.account.activations.saved import Implementation, Shape
from ullage.account.lora import AdapterPrecision, adapter_parameters, adapter_table
from ullage.read.hf_config import read_config_object
from ullage.spec.training import Lora

BASE = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LATENT = BASE | {
    "moe_intermediate_size": 48,
    "num_key_value_heads": 8,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 40,
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "attention_bias": False,
    "rope_theta": 10000,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": BASE | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "qwen3": BASE | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
    "mixtral": BASE
    | {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "deepseek_v3": LATENT | {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]},
    "gemma3_text": BASE
    | {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "sliding_window": 4096,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 16,
        "rope_theta": 10000.0,
        "rope_local_base_freq": 10000.0,
    },
    "gpt_oss": BASE
    | {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "attention_bias": True,
    },
    "gpt2": {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": 64,
        "n_head": 8,
        "n_positions": 512,
        "n_ctx": 512,
        "vocab_size": 320,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "activation_function": "gelu_new",
        "torch_dtype": "bfloat16",
    },
}
#: (model, attention) -> bytes kept by one layer for 2 sequences of 32 tokens.
MEASURED: dict[tuple[str, str], int] = {
    ("llama", "sdpa"): 199_168,
    ("llama", "eager"): 320_000,
    ("qwen3", "sdpa"): 263_168,
    ("qwen3", "eager"): 384_000,
    ("mixtral", "sdpa"): 328_464,
    ("mixtral", "eager"): 449_296,
    ("deepseek_v3", "eager"): 408_592,  # SDPA on a CPU falls back to fp32 where head sizes differ
    ("gemma3_text", "sdpa"): 367_232,
    ("gemma3_text", "eager"): 488_064,
    ("gpt_oss", "eager"): 539_664,
    ("gpt2", "sdpa"): 231_936,
    ("gpt2", "eager"): 262_656,
}
#: Small indices of the router, fp32 copies of weights of norms, and the precision of LayerNorm's statistics (bfloat16
#: on a CPU) are not followed.
TOLERANCE = 0.011
#: Implementations that differ from the tables' first choice.
WRITTEN = {
    "gpt2": {"softmax_dtype": "bfloat16"},
    "gemma3_text": {"norm": "late_cast"},
    "gpt_oss": {"norm": "late_cast", "gated_ffn": "clamped", "softmax_dtype": "bfloat16", "router_dtype": "bfloat16"},
}
NOT_MEASURED = {("deepseek_v3", "sdpa"), ("gpt_oss", "sdpa")}
CASES = [(name, kind) for name in CONFIGS for kind in ("sdpa", "eager") if (name, kind) not in NOT_MEASURED]
HAVE_REFERENCE = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def predicted(name: str, attention: str) -> int:
    layers_key = "n_layer" if name == "gpt2" else "num_hidden_layers"
    model = read_config_object(CONFIGS[name] | {layers_key: 2}, where=name, name=name)
    table = layer_table(
        model.layers[1],
        model.hidden_size,
        Shape(micro_batch_size=2, seq_len=32),
        Implementation(
            attention=attention,  # type: ignore[arg-type]
            moe="grouped",
            **WRITTEN.get(name, {}),  # type: ignore[arg-type]
        ),
    )
    return sum(tensor.bytes for tensor in table)


def measured(name: str, attention: str) -> int:
    """Bytes that one layer more adds to the saved tensors of a forward pass."""
    totals = [_saved_bytes(name, attention, num_layers) for num_layers in (1, 2)]
    return totals[1] - totals[0]


def _saved_bytes(name: str, attention: str, num_layers: int, *, adapters: bool = False, autocast: bool = False) -> int:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    layers_key = "n_layer" if name == "gpt2" else "num_hidden_layers"
    values = {key: value for key, value in CONFIGS[name].items() if key not in ("model_type", "torch_dtype", "n_ctx")}
    config = AutoConfig.for_model(CONFIGS[name]["model_type"], **values, **{layers_key: num_layers})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.bfloat16).train()
    if adapters:
        from peft import LoraConfig, get_peft_model

        model.enable_input_require_grads()
        model = get_peft_model(model, LoraConfig(r=ADAPTERS.rank, target_modules=list(ADAPTERS.targets)))
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[int, Any]] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    ids = torch.randint(0, 100, (2, 32))
    casting = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), casting:
        model(input_ids=ids, labels=ids, use_cache=False)
    return sum(size for size, _storage in kept.values())


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_tables_hold_what_autograd_keeps(name: str, attention: str) -> None:
    assert predicted(name, attention) == pytest.approx(MEASURED[name, attention], rel=TOLERANCE)


@pytest.mark.reference
@pytest.mark.skipif(not HAVE_REFERENCE, reason="torch and transformers are not installed")
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_measured_figures_are_still_what_autograd_keeps(name: str, attention: str) -> None:
    assert measured(name, attention) == MEASURED[name, attention]


#: autocast -> bytes kept by one layer of the small Llama with peft 0.19.1 adapters (rank 4 on q, k, v, o, no dropout,
#: frozen base, SDPA). Under autocast the casts of the adapters' own weights are among them. A dropout's mask is not
#: comparable: it is one byte per element on CUDA and in the input's format on a CPU.
MEASURED_ADAPTERS = {False: 229_888, True: 191_488}
ADAPTERS = Lora(rank=4, targets=("q_proj", "k_proj", "v_proj", "o_proj"))


@pytest.mark.parametrize("autocast", [False, True])
def test_adapters_keep_what_autograd_keeps(autocast: bool) -> None:
    model = read_config_object(CONFIGS["llama"] | {"num_hidden_layers": 2}, where="llama", name="llama")
    layer, hidden = model.layers[1], model.hidden_size
    base = layer_table(layer, hidden, Shape(micro_batch_size=2, seq_len=32), Implementation(trained=False))
    precision = AdapterPrecision(autocast=autocast)
    rows = adapter_table(layer, hidden, ADAPTERS, precision, num_tokens=64, num_routed_tokens=64)
    casts = 2 * adapter_parameters(model, ADAPTERS).num_elements // 2 if autocast else 0
    assert sum(row.bytes for row in (*base, *rows)) + casts == MEASURED_ADAPTERS[autocast]


@pytest.mark.reference
@pytest.mark.skipif(not (HAVE_REFERENCE and importlib.util.find_spec("peft")), reason="peft is not installed")
@pytest.mark.parametrize("autocast", [False, True])
def test_measured_adapters_are_still_what_autograd_keeps(autocast: bool) -> None:
    found = [_saved_bytes("llama", "sdpa", num_layers, adapters=True, autocast=autocast) for num_layers in (2, 3)]
    assert found[1] - found[0] == MEASURED_ADAPTERS[autocast]
