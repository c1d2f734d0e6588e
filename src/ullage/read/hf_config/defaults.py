"""What a config class takes for a missing key, where the reader of its family would take something else.

Source: transformers@5.23.0:models/*/configuration_*.py, the class of each model type. A key that
is null is not missing.
"""

from __future__ import annotations

from typing import Any

from ullage.read.hf_config.keys import Keys

_KV = "num_key_value_heads"
_SHARED = "n_shared_experts"

DEFAULTS: dict[str, dict[str, int | bool]] = {
    "axk1": {_SHARED: 1},
    "bitnet": {_KV: 5},
    "cwm": {_KV: 8},
    "deepseek_v2": {_SHARED: 2},
    "deepseek_v3": {_SHARED: 1, "first_k_dense_replace": 3},
    "deepseek_v32": {_SHARED: 1, "first_k_dense_replace": 3},
    "deepseek_v4": {_SHARED: 1},
    "ernie4_5": {_KV: 2},
    "falcon_h1": {_KV: 8},
    "glm4_moe_lite": {_SHARED: 1},
    "glm4v_moe_text": {"attention_bias": True},
    "glm_moe_dsa": {_SHARED: 1},
    "granite_swa": {_KV: 4},
    "internlm3": {_KV: 2},
    "internvl": {"tie_word_embeddings": True},
    "iquestcoder": {_KV: 8},
    "jamba": {_KV: 8},
    "kimi_linear": {"num_shared_experts": 1, "first_k_dense_replace": 1},
    "lfm2": {_KV: 8},
    "lfm2_moe": {_KV: 8},
    "minimax_m3_vl_text": {_KV: 4, "head_dim": 128},
    "ministral3": {_KV: 8},
    "mistral": {_KV: 8},
    "mistral4": {_SHARED: 1},
    "nemotron_h": {_KV: 8},
    "qwen2_5_vl_text": {_KV: 8},
    "qwen2_vl_text": {_KV: 8},
    "qwen3_5_moe_text": {_KV: 2, "head_dim": 256},
    "qwen3_5_text": {_KV: 4, "head_dim": 256},
    "qwen3_moe": {_KV: 4},
    "qwen3_next": {_KV: 2, "head_dim": 256},
    "qwen3_vl_moe": {"tie_word_embeddings": False},
    "seed_oss": {_KV: 8},
}


def fill_in(keys: Keys, model_type: str) -> None:
    """Give ``keys`` the values that the class of ``model_type`` has for keys that are missing.

    A part that stands in a whole may have some of them there, and keeps looking there.
    """
    own: dict[str, Any] = {key: value for key, value in DEFAULTS.get(model_type, {}).items() if key not in keys.values}
    if own:
        keys.values = {**keys.values, **own}
        keys.skip(*own)
