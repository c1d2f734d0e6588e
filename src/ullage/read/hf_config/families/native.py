"""DeepSeek's own inference config (``dim``, ``n_layers``, ``n_heads``, no ``model_type``): V2, V3, V3.1, V3.2.

The keys are those of DeepSeek-V3 and V3.2-Exp inference/model.py:ModelArgs. They are renamed to the Hugging Face keys
and read as such; parameter names are therefore those of the Hugging Face checkpoints, from which that format is made.
"""

from __future__ import annotations

from typing import Any

from ullage.errors import UnknownArchitectureError
from ullage.i18n import _
from ullage.read.hf_config.families import deepseek
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import Model

EVIDENCE = frozenset({"dim", "n_layers", "n_heads", "vocab_size", "kv_lora_rank"})

RENAMED = {
    "dim": "hidden_size",
    "inter_dim": "intermediate_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_dense_layers": "first_k_dense_replace",
    "n_heads": "num_attention_heads",
    "n_activated_experts": "num_experts_per_tok",
    "index_n_heads": "index_n_heads",
    "index_head_dim": "index_head_dim",
    "index_topk": "index_topk",
    "max_seq_len": "max_position_embeddings",
}
KEPT = frozenset(
    {
        "vocab_size",
        "n_routed_experts",
        "n_shared_experts",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
    }
)
WITHOUT_EFFECT = frozenset(
    {
        "n_expert_groups",
        "n_limited_groups",
        "score_func",
        "route_scale",
        "mscale",
        "rope_theta",
        "rope_factor",
        "original_seq_len",
        "beta_fast",
        "beta_slow",
        "max_batch_size",
        "scale_fmt",
        "dtype",
    }
)


def is_native(values: dict[str, Any]) -> bool:
    """Return whether a config without ``model_type`` is of this format, by its keys."""
    return "model_type" not in values and values.keys() >= EVIDENCE


def read(keys: Keys) -> Model:
    """Read a native config. ``q_lora_rank`` 0 means none; dtype "fp8" means block-scaled fp8 weights."""
    left = sorted(keys.values.keys() - RENAMED.keys() - KEPT - WITHOUT_EFFECT)
    if left:
        what = _("this DeepSeek inference config has settings that ullage does not understand")
        raise UnknownArchitectureError(what, where=keys.where, keys=left)
    keys.skip(*keys.values)
    renamed = {new: keys.values[old] for old, new in RENAMED.items() if old in keys.values}
    renamed |= {key: value for key, value in keys.values.items() if key in KEPT}
    renamed = {"first_k_dense_replace": 1, "n_shared_experts": 2} | renamed  # defaults of ModelArgs
    renamed["q_lora_rank"] = renamed.get("q_lora_rank") or None
    # V2's router has no correction bias; the format tells V3 by its scoring function (ModelArgs.score_func)
    is_v3 = keys.text("score_func", "softmax") == "sigmoid"
    if keys.text("dtype", "bf16") == "fp8":
        renamed["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
        renamed["quantization_config"]["activation_scheme"] = "dynamic"
    has_indexer = "index_n_heads" in renamed
    renamed["model_type"] = "deepseek_v32" if has_indexer else "deepseek_v3" if is_v3 else "deepseek_v2"
    inner = Keys(renamed, keys.where)
    reader = deepseek.read_v32 if has_indexer else deepseek.read_v3 if is_v3 else deepseek.read_v2
    model = reader(inner)
    inner.finish(renamed["model_type"], assume=False)
    return model
