"""The text parts of Llama 4 and of Llama 3.2 Vision.

Source: transformers@5.23.0:models/llama4/modeling_llama4.py, configuration_llama4.py, models/mllama/modeling_mllama.py.
"""

from __future__ import annotations

from dataclasses import replace

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.hf_config import common
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import ExtraTensor, FeedForward, Layer, Model


def read_llama4_text(keys: Keys) -> Model:
    """Read Llama 4: layers with rotary positions attend within chunks, every fourth, without positions, to all.

    ``no_rope_layers`` holds 1 for layers *with* rotary positions; an empty list means the default. ``use_qk_norm`` is a
    norm without weights.
    """
    keys.skip("use_qk_norm", "attn_scale", "attn_temperature_tuning", "floor_scale", "for_llm_compressor")
    hidden, num_layers = keys.integer("hidden_size"), keys.layers()
    bias = keys.flag("attention_bias", False)
    chunk = keys.nullable_integer("attention_chunk_size", 8192)
    ffns = _llama4_ffns(keys, num_layers)
    interval = keys.integer("no_rope_layer_interval", 4)
    rope = keys.integers("no_rope_layers", None) or [int((index + 1) % interval != 0) for index in range(num_layers)]
    if len(rope) != num_layers:
        keys.integers("no_rope_layers", length=num_layers)
    known = (common.CHUNKED, common.FULL)
    kinds = common.layer_types(keys, num_layers, known, lambda index: common.CHUNKED if rope[index] else common.FULL)

    def make(kind: tuple[str, FeedForward]) -> Layer:
        local = chunk if kind[0] == common.CHUNKED else None
        attention = common.gqa(
            keys, hidden, kv_default=8, head_dim_default=128, qkv_bias=bias, o_bias=bias, chunk=local
        )
        return Layer(mixers=(attention,), ffns=(kind[1],), norms=common.pre_norms(hidden))

    return common.decoder(keys, hidden, common.by_kind(zip(kinds, ffns, strict=True), make))


def _llama4_ffns(keys: Keys, num_layers: int) -> list[FeedForward]:
    """Every ``interleave_moe_layer_step``-th layer has experts and one shared expert of the same width."""
    dense = common.dense(keys, size="intermediate_size_mlp", prefix="feed_forward")
    width = keys.integer("intermediate_size")
    sparse = common.moe(
        keys,
        size="intermediate_size",
        shared_intermediate_size=width,
        fused_experts=True,
        prefix="feed_forward",
        router_name="router",
        shared_name="shared_expert",
    )
    step = keys.integer("interleave_moe_layer_step", 1)
    named = keys.integers("moe_layers", None)
    if named is not None and any(index >= num_layers for index in named):
        raise InputError(_("names layers beyond the last"), where=keys.at("moe_layers"))
    moe_layers = set(range(step - 1, num_layers, step) if named is None else named)
    return [sparse if index in moe_layers else dense for index in range(num_layers)]


def read_mllama_text(keys: Keys) -> Model:
    """Read the text part of Llama 3.2 Vision: Llama, with layers that look at the image instead of the text.

    The embedding has 8 rows more than the vocabulary (the image token among them); the head has not.
    """
    hidden, num_layers = keys.integer("hidden_size"), keys.layers()
    default = [3, 8, 13, 18, 23, 28, 33, 38]
    crossing = set(keys.integers("cross_attention_layers", default))
    if not all(index < num_layers for index in crossing):
        raise InputError(_("names layers beyond the last"), where=keys.at("cross_attention_layers"))
    attention, ffn = common.gqa(keys, hidden, kv_default=8), common.dense(keys)
    cross = replace(attention, cross=True, qk_norm="head", prefix="cross_attn")
    gates = tuple(ExtraTensor(name=name, shape=(1,)) for name in ("cross_attn_attn_gate", "cross_attn_mlp_gate"))

    def make(is_cross: bool) -> Layer:
        norms = common.pre_norms(hidden)
        if is_cross:
            return Layer(mixers=(cross,), ffns=(ffn,), norms=norms, extras=gates)
        return Layer(mixers=(attention,), ffns=(ffn,), norms=norms)

    layers = common.by_kind((index in crossing for index in range(num_layers)), make)
    return common.decoder(keys, hidden, layers, extra_embedding_rows=8)
