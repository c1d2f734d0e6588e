"""Phi 1.5 to 4.

Source: transformers@5.23.0:models/{phi,phi3,phimoe}/; Phi-2 under its first model type: its checkpoint's
modeling_phi.py (tensor names ``transformer.h.N.mixer``); Phi-3-small, whose config does not tell its biases:
vllm-project/vllm:vllm/model_executor/models/phi3_small.py@00db0119c3.
"""

from __future__ import annotations

from typing import Any

from ullage.read.hf_config import common
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import DenseFFN, Layer, Model


def read(keys: Keys) -> Model:
    """Read Phi 1, 1.5 and 2: parallel blocks behind one layer norm, biases everywhere, the head's included."""
    hidden = keys.integer("hidden_size")
    common.only(keys, qk_layernorm=False)
    attention = common.gqa(keys, hidden, qkv_bias=True, o_bias=True, o_name="dense")
    ffn = common.dense(keys, gated=False, bias=True, up_name="fc1", down_name="fc2", activation="gelu")
    norms = common.norms(hidden, "input_layernorm", kind="layer", bias=True)
    layers = (Layer(mixers=(attention,), ffns=(ffn,), norms=norms),) * keys.layers()
    frame: dict[str, Any] = {"norm_name": "model.final_layernorm"}
    return common.decoder(keys, hidden, layers, norm_kind="layer", norm_bias=True, lm_head_bias=True, **frame)


def read_msft(keys: Keys) -> Model:
    """Read Phi-2 under its first model type: the same sizes, q, k and v in one projection."""
    hidden = keys.integer("n_embd")
    keys.skip("flash_attn", "flash_rotary", "fused_dense", "img_processor", "rotary_dim")
    attention = common.gqa(
        keys,
        hidden,
        heads="n_head",
        kv_heads="n_head_kv",
        qkv_bias=True,
        o_bias=True,
        fused_qkv="Wqkv",
        prefix="mixer",
        o_name="out_proj",
    )
    inner = keys.integer("n_inner", 4 * hidden)
    ffn = DenseFFN(intermediate_size=inner, gated=False, bias=True, up_name="fc1", down_name="fc2", activation="gelu")
    layer = Layer(mixers=(attention,), ffns=(ffn,), norms=common.norms(hidden, "ln", kind="layer", bias=True))
    return common.decoder(
        keys,
        hidden,
        (layer,) * keys.layers("n_layer"),
        norm_kind="layer",
        norm_bias=True,
        norm_name="lm_head.ln",
        lm_head_bias=True,
        context=("n_positions",),
        embedding_name="transformer.embd.wte",
        layers_name="transformer.h",
        head_name="lm_head.linear",
    )


def read_3(keys: Keys) -> Model:
    """Read Phi-3 (mini, medium) and Phi-4: q, k and v in one projection, gate and up in another."""
    hidden = keys.integer("hidden_size")
    keys.skip("full_attn_mod", "interpolate_factor")
    common.only(keys, attention_bias=False, mlp_bias=False, lm_head_bias=False)
    attention = common.gqa(keys, hidden, fused_qkv="qkv_proj", window=keys.integer("sliding_window", None))
    ffn = common.dense(keys, fused_gate_up="gate_up_proj")
    layer = Layer(mixers=(attention,), ffns=(ffn,), norms=common.pre_norms(hidden))
    return common.decoder(keys, hidden, (layer,) * keys.layers())


def read_3_small(keys: Keys) -> Model:
    """Read Phi-3-small: biases everywhere (whatever ``attention_bias`` says), tied embeddings.

    Block-sparse layers keep all keys and values, as dense ones do.
    """
    hidden = keys.integer("hidden_size")
    for name in keys.values:
        if name.startswith(("blocksparse_", "mup_", "gegelu_")):
            keys.skip(name)
    keys.skip("attention_bias", "dense_attention_every_n_layers", "pad_sequence_to_multiple_of_64")
    keys.skip("reorder_and_upcast_attn", "rope_embedding_base", "rope_position_scale", "ff_dim_multiplier")
    attention = common.gqa(keys, hidden, qkv_bias=True, o_bias=True, fused_qkv="query_key_value", o_name="dense")
    inner = keys.first_integer("ff_intermediate_size", "intermediate_size")
    ffn = DenseFFN(intermediate_size=inner, bias=True, fused_gate_up="up_proj", activation="gegelu")
    layer = Layer(mixers=(attention,), ffns=(ffn,), norms=common.pre_norms(hidden, "layer", bias=True))
    frame: dict[str, Any] = {"norm_name": "model.final_layernorm"}
    layers = (layer,) * keys.layers()
    return common.decoder(keys, hidden, layers, tied_default=True, norm_kind="layer", norm_bias=True, **frame)


def read_moe(keys: Keys) -> Model:
    """Read Phi-3.5-MoE: Mixtral's experts, layer norms with bias, a head with bias."""
    hidden, bias = keys.integer("hidden_size"), keys.flag("attention_bias", False)
    window = keys.integer("sliding_window", None)
    attention = common.gqa(keys, hidden, kv_default=8, qkv_bias=bias, o_bias=bias, window=window)
    ffn = common.moe(
        keys, size="intermediate_size", prefix="block_sparse_moe", gate_name="w1", up_name="w3", down_name="w2"
    )
    layer = Layer(mixers=(attention,), ffns=(ffn,), norms=common.pre_norms(hidden, "layer", bias=True))
    head = keys.flag("lm_head_bias", False)
    layers = (layer,) * keys.layers()
    return common.decoder(keys, hidden, layers, norm_kind="layer", norm_bias=True, lm_head_bias=head)
