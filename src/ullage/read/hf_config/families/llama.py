"""Llama and its kin: pre-norm blocks of rotary attention and a gated feed-forward block.

Source: transformers@5.23.0:models/llama/modeling_llama.py, configuration_llama.py.
"""

from __future__ import annotations

from ullage.read.hf_config import common
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import Attention, DenseFFN, Layer, Model


def read(keys: Keys) -> Model:
    """Read a Llama config: ``attention_bias`` for q, k, v and o, ``mlp_bias`` for the block."""
    hidden = keys.integer("hidden_size")
    heads = keys.integer("num_attention_heads")
    bias = keys.flag("attention_bias", False)
    attention = Attention(
        num_heads=heads,
        num_kv_heads=keys.integer("num_key_value_heads", heads),
        head_dim=keys.integer("head_dim", hidden // heads),
        q_bias=bias,
        k_bias=bias,
        v_bias=bias,
        o_bias=bias,
    )
    ffn = DenseFFN(intermediate_size=keys.integer("intermediate_size"), bias=keys.flag("mlp_bias", False))
    layer = Layer(mixers=(attention,), ffns=(ffn,), norms=common.pre_norms(hidden))
    return common.decoder(keys, hidden, (layer,) * keys.layers())
