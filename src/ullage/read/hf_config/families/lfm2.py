"""LFM2: gated short convolutions with attention in between, dense or with experts.

Source: transformers@5.23.0:models/lfm2/modeling_lfm2.py, models/lfm2_moe/modeling_lfm2_moe.py, configuration files.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.hf_config import common
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import DenseFFN, ExtraTensor, FeedForward, Layer, Mixer, Model, ShortConvolution

_NAMES: dict[str, Any] = {"gate_name": "w1", "up_name": "w3", "down_name": "w2", "prefix": "feed_forward"}


def read(keys: Keys) -> Model:
    """Read LFM2: ``layer_types``, or attention in ``full_attn_idxs``."""
    return _read(keys, [DenseFFN(intermediate_size=_dense_size(keys), **_NAMES)] * keys.layers())


def read_moe(keys: Keys) -> Model:
    """Read LFM2-MoE: the first ``num_dense_layers`` are dense."""
    dense = common.dense(keys, **_NAMES)
    keys.skip("tie_embedding")
    extras: tuple[ExtraTensor, ...] = ()
    if keys.flag("use_expert_bias", True):
        experts = keys.integer("num_experts")
        extras = (ExtraTensor(name="expert_bias", shape=(experts,), dtype="float32", buffer=True),)
    moe, num_dense = common.moe(keys, extras=extras, **_NAMES), keys.integer("num_dense_layers", 2, low=0)
    return _read(keys, [dense if index < num_dense else moe for index in range(keys.layers())])


def read_3(keys: Keys) -> Model:
    """Read LFM3: windows, a gate per head, and norms after the blocks.

    Source: transformers@5.23.0:models/lfm3/modeling_lfm3.py, configuration_lfm3.py.
    """
    hidden, count = keys.integer("hidden_size"), keys.layers()
    bias, window = keys.flag("attention_bias", False), keys.integer("sliding_window", 256)
    head: dict[str, Any] = {"qkv_bias": bias, "o_bias": bias, "head_dim_default": 128, "qk_norm": "head"}
    full = common.gqa(keys, hidden, kv_default=4, **head)
    if keys.flag("use_attention_gate", True):
        gate = ExtraTensor(name="g_proj.weight", shape=(full.num_heads, hidden), split="out")
        full = replace(full, extras=(gate,))
    convolution = ShortConvolution(
        size=hidden, conv_kernel=keys.integer("conv_L_cache", 7), bias=keys.flag("conv_bias", False)
    )
    mixers: dict[str, Mixer] = {
        "conv": convolution,
        "sliding_attention": replace(full, window=window),
        "full_attention": full,
    }
    names = ["operator_norm", "ffn_norm"]
    names += ["post_operator_norm", "post_ffn_norm"] if keys.flag("use_sandwich_norm", True) else []
    dense = common.dense(keys, **_NAMES)
    cycle = ("sliding_attention", "conv", "full_attention", "conv")
    layers = common.by_kind(
        common.layer_types(keys, count, mixers, lambda index: cycle[index % 4] if index else "conv"),
        lambda kind: Layer(mixers=(mixers[kind],), ffns=(dense,), norms=common.norms(hidden, *names)),
    )
    return common.decoder(keys, hidden, layers, tied_default=True, norm_name="model.embedding_norm")


def _dense_size(keys: Keys) -> int:
    """Return the width of the dense block: two thirds of the stated one, times a factor, rounded up to a multiple.

    Source: transformers@5.23.0:models/lfm2/modeling_lfm2.py:Lfm2MLP.
    """
    keys.skip("block_dim", "block_mlp_init_scale", "block_norm_eps", "block_out_init_scale", "block_use_swiglu")
    keys.skip("block_use_xavier_init", "conv_dim", "conv_dim_out", "conv_use_xavier_init", "num_heads", "use_pos_enc")
    size = int(keys.first_integer("block_ff_dim", "intermediate_size"))
    factor = keys.raw("block_ffn_dim_multiplier", 1.0)
    multiple = keys.integer("block_multiple_of", 256)
    if not keys.flag("block_auto_adjust_ff_dim", True):
        return size
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= 64:
        raise InputError(_("is not a number from 0 to 64"), where=keys.at("block_ffn_dim_multiplier"))
    size = int(factor * int(2 * size / 3))
    return int(-(-size // multiple) * multiple)


def _read(keys: Keys, ffns: list[FeedForward] | list[DenseFFN]) -> Model:
    hidden = keys.integer("hidden_size")
    attention = common.gqa(
        keys, hidden, qk_norm="head", q_norm_name="q_layernorm", k_norm_name="k_layernorm", o_name="out_proj"
    )
    convolution = ShortConvolution(
        size=hidden, conv_kernel=keys.integer("conv_L_cache", 3), bias=keys.flag("conv_bias", False)
    )
    mixers: dict[str, Mixer] = {"full_attention": attention, "conv": convolution}
    full = keys.integers("full_attn_idxs", None)

    def default(index: int) -> str:
        return "full_attention" if full is None or index in full else "conv"

    layers = common.by_kind(
        zip(common.layer_types(keys, len(ffns), mixers, default), ffns, strict=True),
        lambda kind: Layer(
            mixers=(mixers[kind[0]],), ffns=(kind[1],), norms=common.norms(hidden, "operator_norm", "ffn_norm")
        ),
    )
    tied = keys.flag("tie_embedding", True)
    return common.decoder(keys, hidden, layers, tied_default=tied, norm_name="model.embedding_norm")
