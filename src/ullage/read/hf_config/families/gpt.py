"""The GPT line: GPT-2, GPT-J, GPT-NeoX, OPT, BLOOM, Falcon, StarCoder. Blocks with biases and layer norms, no gate.

Source: transformers@5.23.0:models/{gpt2,gptj,gpt_neox,opt,bloom,falcon,gpt_bigcode,starcoder2}/; defaults of missing
keys are those of their config classes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ullage.read.hf_config import common
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import DenseFFN, ExtraTensor, Layer, Model

TRANSFORMER = {"embedding_name": "transformer.wte", "layers_name": "transformer.h", "norm_name": "transformer.ln_f"}


def _frame(keys: Keys, hidden: int, layer: Layer, layers_key: str, **frame: Any) -> Model:
    """Build a decoder of equal layers with layer norms that have biases."""
    layers = (layer,) * keys.first_integer(layers_key, "num_hidden_layers", high=10_000)
    return common.decoder(keys, hidden, layers, norm_kind="layer", norm_bias=True, **frame)


def read_gpt2(keys: Keys) -> Model:
    """Read GPT-2: q, k and v in one projection, learned positions, tied embeddings."""
    return _read_gpt2(keys, kv_heads=None)


def read_bigcode(keys: Keys) -> Model:
    """Read StarCoder 1 and SantaCoder: GPT-2 with one KV head where ``multi_query`` says so."""
    keys.skip("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "inference_runner", "max_batch_size")
    keys.skip("max_sequence_length", "pad_key_length", "pre_allocate_kv_cache", "validate_runner_input")
    one = keys.flag("multi_query", True)
    common.only(keys, num_key_value_heads=1 if one else keys.first_integer("n_head", "num_attention_heads"))
    return _read_gpt2(keys, kv_heads=1 if one else None)


def _read_gpt2(keys: Keys, *, kv_heads: int | None) -> Model:
    """Read the keys under GPT-2's own names or the usual ones, which the config class maps to them.

    Source: transformers@5.23.0:models/gpt2/configuration_gpt2.py:GPT2Config (attribute_map; ``n_inner`` alone is the
        width of the feed-forward block).
    """
    hidden = keys.first_integer("n_embd", "hidden_size")
    keys.skip("n_ctx", "reorder_and_upcast_attn", "scale_attn_by_inverse_layer_idx")
    attention = common.gqa(
        keys,
        hidden,
        heads=keys.first_name("n_head", "num_attention_heads"),
        kv_default=kv_heads,
        qkv_bias=True,
        o_bias=True,
        fused_qkv="c_attn",
        prefix="attn",
        o_name="c_proj",
    )
    inner = keys.integer("n_inner", 4 * hidden)
    common.only(keys, intermediate_size=inner)
    activation = keys.text("activation_function", "gelu_new")
    ffn = DenseFFN(
        intermediate_size=inner, gated=False, bias=True, up_name="c_fc", down_name="c_proj", activation=activation
    )
    norms = common.norms(hidden, "ln_1", "ln_2", kind="layer", bias=True)
    layer = Layer(mixers=(attention,), ffns=(ffn,), norms=norms)
    positions = keys.first_integer("n_positions", "max_position_embeddings", default=1024)
    frame: dict[str, Any] = {**TRANSFORMER, "learned_positions": positions, "positions_name": "transformer.wpe"}
    return _frame(
        keys, hidden, layer, "n_layer", tied_default=True, context=("n_positions", "max_position_embeddings"), **frame
    )


def read_gptj(keys: Keys) -> Model:
    """Read GPT-J: parallel blocks behind one norm, a head with bias."""
    hidden = keys.first_integer("n_embd", "hidden_size")
    keys.skip("rotary", "rotary_dim")
    attention = common.gqa(keys, hidden, heads="n_head", prefix="attn", o_name="out_proj")
    inner = keys.integer("n_inner", 4 * hidden)
    ffn = DenseFFN(
        intermediate_size=inner, gated=False, bias=True, up_name="fc_in", down_name="fc_out", activation="gelu"
    )
    layer = Layer(mixers=(attention,), ffns=(ffn,), norms=common.norms(hidden, "ln_1", kind="layer", bias=True))
    return _frame(keys, hidden, layer, "n_layer", context=("n_positions",), lm_head_bias=True, **TRANSFORMER)


def read_neox(keys: Keys) -> Model:
    """Read GPT-NeoX and Pythia: q, k and v in one projection, an output embedding of its own."""
    hidden, bias = keys.integer("hidden_size"), keys.flag("attention_bias", True)
    parallel = keys.flag("use_parallel_residual", True)
    attention = common.gqa(
        keys, hidden, qkv_bias=bias, o_bias=bias, fused_qkv="query_key_value", prefix="attention", o_name="dense"
    )
    ffn = common.dense(
        keys, gated=False, bias=True, up_name="dense_h_to_4h", down_name="dense_4h_to_h", activation="gelu"
    )
    norms = common.pre_norms(hidden, "layer", bias=True)
    layer = Layer(mixers=(attention,), ffns=(ffn,), norms=norms, parallel=parallel)
    return _frame(
        keys,
        hidden,
        layer,
        "num_hidden_layers",
        embedding_name="gpt_neox.embed_in",
        layers_name="gpt_neox.layers",
        norm_name="gpt_neox.final_layer_norm",
        head_name="embed_out",
    )


def read_opt(keys: Keys) -> Model:
    """Read OPT: learned positions with two rows to spare; 350M projects its embeddings and has no last norm."""
    hidden, bias = keys.integer("hidden_size"), keys.flag("enable_bias", True)
    common.only(keys, layer_norm_elementwise_affine=True)
    width = keys.integer("word_embed_proj_dim", hidden)
    last = keys.flag("do_layer_norm_before", True) and not keys.flag("_remove_final_layer_norm", False)
    attention = common.gqa(keys, hidden, qkv_bias=bias, o_bias=bias, o_name="out_proj")
    ffn = common.dense(
        keys, size="ffn_dim", gated=False, bias=bias, prefix="", up_name="fc1", down_name="fc2", activation="relu"
    )
    norms = common.norms(hidden, "self_attn_layer_norm", "final_layer_norm", kind="layer", bias=True)
    layer = Layer(mixers=(attention,), ffns=(ffn,), norms=norms)
    model = _frame(
        keys,
        hidden,
        layer,
        "num_hidden_layers",
        tied_default=True,
        learned_positions=keys.integer("max_position_embeddings", 2048) + 2,
        positions_name="model.decoder.embed_positions",
        embedding_name="model.decoder.embed_tokens",
        layers_name="model.decoder.layers",
        norm_name="model.decoder.final_layer_norm",
    )
    model = model if last else replace(model, final_norms=())
    if width == hidden:
        return model
    projections = {"project_in": (hidden, width), "project_out": (width, hidden)}
    extras = tuple(ExtraTensor(name=f"model.decoder.{name}.weight", shape=shape) for name, shape in projections.items())
    return replace(model, embedding_size=width, extras=model.extras + extras)


def read_bloom(keys: Keys) -> Model:
    """Read BLOOM: positions by ALiBi, a norm after the embedding."""
    hidden = keys.first_integer("hidden_size", "n_embed")
    keys.skip("apply_residual_connection_post_layernorm", "slow_but_exact", "attention_softmax_in_fp32", "n_inner")
    keys.skip("bias_dropout_fusion", "masked_softmax_fusion", "offset_alibi", "skip_bias_add", "skip_bias_add_qkv")
    keys.skip("seq_length", "unk_token_id")
    attention = common.gqa(
        keys,
        hidden,
        heads="n_head" if "n_head" in keys else "num_attention_heads",
        qkv_bias=True,
        o_bias=True,
        fused_qkv="query_key_value",
        prefix="self_attention",
        o_name="dense",
    )
    ffn = DenseFFN(
        intermediate_size=4 * hidden,
        gated=False,
        bias=True,
        up_name="dense_h_to_4h",
        down_name="dense_4h_to_h",
        activation="gelu",
    )
    layer = Layer(mixers=(attention,), ffns=(ffn,), norms=common.pre_norms(hidden, "layer", bias=True))
    embedding_norm = common.norms(hidden, "transformer.word_embeddings_layernorm", kind="layer", bias=True)
    frame = {**TRANSFORMER, "embedding_name": "transformer.word_embeddings"}
    model = _frame(keys, hidden, layer, "n_layer", tied_default=True, context=("seq_length",), **frame)
    return replace(model, final_norms=embedding_norm + model.final_norms)


def read_falcon(keys: Keys) -> Model:
    """Read Falcon: one KV head (7B), or groups of them in the new decoder architecture (40B, 180B)."""
    hidden, new = keys.integer("hidden_size"), keys.flag("new_decoder_architecture", False)
    keys.skip("alibi", "num_ln_in_parallel_attn")
    bias, parallel = keys.flag("bias", False), keys.flag("parallel_attn", True)
    multi_query = keys.flag("multi_query", True)
    heads = "n_head" if "n_head" in keys else "num_attention_heads"
    groups: dict[str, Any] = {"kv_heads": "num_kv_heads"} if new else {"kv_default": 1 if multi_query else None}
    keys.skip("num_kv_heads")
    attention = common.gqa(
        keys,
        hidden,
        heads=heads,
        qkv_bias=bias,
        o_bias=bias,
        fused_qkv="query_key_value",
        prefix="self_attention",
        o_name="dense",
        **groups,
    )
    ffn = DenseFFN(
        intermediate_size=keys.integer("ffn_hidden_size", 4 * hidden),
        gated=False,
        bias=bias,
        up_name="dense_h_to_4h",
        down_name="dense_4h_to_h",
        activation="gelu",
    )
    if not new:
        common.only(keys, num_ln_in_parallel_attn=1)
    two_parallel = parallel and keys.integer("num_ln_in_parallel_attn", 2 if new else 1) == 2
    names = ["ln_attn", "ln_mlp"] if two_parallel else ["input_layernorm"]
    names += [] if parallel else ["post_attention_layernorm"]
    norms = common.norms(hidden, *names, kind="layer", bias=True)
    layer = Layer(mixers=(attention,), ffns=(ffn,), norms=norms, parallel=two_parallel)
    frame = {**TRANSFORMER, "embedding_name": "transformer.word_embeddings"}
    return _frame(keys, hidden, layer, "n_layer", tied_default=True, **frame)


def read_starcoder2(keys: Keys) -> Model:
    """Read StarCoder 2: grouped queries, one window for all layers."""
    hidden, bias = keys.integer("hidden_size"), keys.flag("use_bias", True)
    keys.skip("mlp_type", "norm_type")
    window = keys.integer("sliding_window", None)
    attention = common.gqa(keys, hidden, kv_default=2, qkv_bias=bias, o_bias=bias, window=window)
    ffn = common.dense(keys, gated=False, bias=bias, up_name="c_fc", down_name="c_proj", activation="gelu")
    layer = Layer(mixers=(attention,), ffns=(ffn,), norms=common.pre_norms(hidden, "layer", bias=True))
    return _frame(keys, hidden, layer, "num_hidden_layers", tied_default=True)
