"""DeepSeek's own inference config (``dim``, ``n_layers``, ``n_heads``, no ``model_type``): V2, V3, V3.1, V3.2, V4.

The keys are those of ModelArgs in inference/model.py of DeepSeek-V3, V3.2-Exp and V4. They are renamed to those of
Hugging Face and read as such; parameter names are then those of the Hugging Face checkpoints the format is made from.
"""

from __future__ import annotations

from typing import Any

from ullage.errors import UnknownArchitectureError
from ullage.i18n import _
from ullage.read.hf_config.families import deepseek, deepseek_v4
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import Model

EVIDENCE = frozenset({"dim", "n_layers", "n_heads", "vocab_size"})
#: one of these tells which attention it is
ATTENTION_EVIDENCE = ("kv_lora_rank", "compress_ratios")

RENAMED = {
    "dim": "hidden_size",
    "inter_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "moe_inter_dim": "moe_intermediate_size",
    "n_activated_experts": "num_experts_per_tok",
    "n_dense_layers": "first_k_dense_replace",
    "n_hash_layers": "num_hash_layers",
    "n_heads": "num_attention_heads",
    "n_layers": "num_hidden_layers",
    "n_mtp_layers": "num_nextn_predict_layers",
    "rope_head_dim": "qk_rope_head_dim",
    "window_size": "sliding_window",
}
_KEPT = """
compress_ratios expert_dtype hc_mult head_dim index_head_dim index_n_heads index_topk kv_lora_rank n_routed_experts
n_shared_experts o_groups o_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim vocab_size
"""
_WITHOUT_EFFECT = """
beta_fast beta_slow compress_rope_theta dtype hc_eps hc_sinkhorn_iters max_batch_size mscale n_expert_groups
n_limited_groups norm_eps original_seq_len rope_factor rope_theta route_scale scale_fmt score_func swiglu_limit
"""
KEPT, WITHOUT_EFFECT = frozenset(_KEPT.split()), frozenset(_WITHOUT_EFFECT.split())

READERS = {
    "deepseek_v2": deepseek.read_v2,
    "deepseek_v3": deepseek.read_v3,
    "deepseek_v32": deepseek.read_v32,
    "deepseek_v4": deepseek_v4.read,
}


def is_native(values: dict[str, Any]) -> bool:
    """Return whether a config without ``model_type`` is of this format, by its keys."""
    told = any(key in values for key in ATTENTION_EVIDENCE)
    return "model_type" not in values and values.keys() >= EVIDENCE and told


def read(keys: Keys) -> Model:
    """Read a native config. dtype "fp8" means block-scaled fp8 weights."""
    left = sorted(keys.values.keys() - RENAMED.keys() - KEPT - WITHOUT_EFFECT)
    if left:
        what = _("this DeepSeek inference config has settings that ullage does not understand")
        raise UnknownArchitectureError(what, where=keys.where, keys=left)
    keys.skip(*keys.values)
    renamed = {new: keys.values[old] for old, new in RENAMED.items() if old in keys.values}
    renamed |= {key: value for key, value in keys.values.items() if key in KEPT}
    renamed["model_type"] = model_type = _model_type(keys)
    if keys.text("dtype", "bf16") == "fp8":
        scales: dict[str, Any] = {"weight_block_size": [128, 128], "activation_scheme": "dynamic"}
        renamed["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3"} | scales
    if model_type != "deepseek_v4":
        renamed = {"first_k_dense_replace": 1, "n_shared_experts": 2} | renamed  # defaults of ModelArgs
        renamed["q_lora_rank"] = renamed.get("q_lora_rank") or None  # 0 means none
    inner = Keys(renamed, keys.where)
    model = READERS[model_type](inner)
    inner.finish(model_type, assume=False)
    return model


def _model_type(keys: Keys) -> str:
    """Tell the model type: V4 by its ratios, V3.2 by its indexer, V3 by its scores (V2's router has no other bias)."""
    if "compress_ratios" in keys:
        return "deepseek_v4"
    if "index_n_heads" in keys:
        return "deepseek_v32"
    return "deepseek_v3" if keys.text("score_func", "softmax") == "sigmoid" else "deepseek_v2"
