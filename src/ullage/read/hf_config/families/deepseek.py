"""DeepSeek families.

Source: transformers@5.23.0:models/deepseek_v3/; DeepSeek-V3 inference/model.py.
"""

from __future__ import annotations

from ullage.read.hf_config import common
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import DenseFFN, LatentAttention, Layer, Model, MoEFFN


def read_v3(keys: Keys) -> Model:
    """Read DeepSeek-V3, R1, V3.1."""
    hidden = keys.integer("hidden_size")
    keys.skip(
        "num_key_value_heads",
        "head_dim",
        "ep_size",
        "n_group",
        "topk_group",
        "topk_method",
        "scoring_func",
        "norm_topk_prob",
        "routed_scaling_factor",
    )
    attention = LatentAttention(
        num_heads=keys.integer("num_attention_heads"),
        q_lora_rank=keys.integer("q_lora_rank", None),
        kv_lora_rank=keys.integer("kv_lora_rank"),
        qk_nope_head_dim=keys.integer("qk_nope_head_dim"),
        qk_rope_head_dim=keys.integer("qk_rope_head_dim"),
        v_head_dim=keys.integer("v_head_dim"),
        bias=keys.flag("attention_bias", False),
    )
    expert = keys.integer("moe_intermediate_size")
    moe = MoEFFN(
        num_experts=keys.integer("n_routed_experts"),
        top_k=keys.integer("num_experts_per_tok"),
        intermediate_size=expert,
        shared_intermediate_size=expert * keys.integer("n_shared_experts", 0, low=0),
        correction_bias=True,
    )
    norms = common.pre_norms(hidden)
    dense = Layer(
        mixers=(attention,), ffns=(DenseFFN(intermediate_size=keys.integer("intermediate_size")),), norms=norms
    )
    sparse = Layer(mixers=(attention,), ffns=(moe,), norms=norms)
    num_dense, frequency = keys.integer("first_k_dense_replace", 0, low=0), keys.integer("moe_layer_freq", 1)
    layers = tuple(sparse if index >= num_dense and index % frequency == 0 else dense for index in range(keys.layers()))
    return common.decoder(keys, hidden, layers, mtp_layer=sparse)
