"""GLM: ChatGLM 2 to 4, GLM-4-0414, GLM-4.5 and the text part of GLM-4.5V.

Source: transformers@5.23.0:models/{glm,glm4,glm4_moe,glm4v_moe}/; ChatGLM:
vllm@0.33.0:model_executor/models/chatglm.py.
"""

from __future__ import annotations

from typing import Any

from ullage.read.hf_config import common
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import DenseFFN, Layer, Model

SANDWICH = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")


def read_chatglm(keys: Keys) -> Model:
    """Read ChatGLM2, ChatGLM3 and GLM-4-9B: q, k and v in one projection, gate and up in another."""
    hidden = keys.integer("hidden_size")
    keys.skip("apply_query_key_layer_scaling", "attention_softmax_in_fp32", "bias_dropout_fusion", "original_rope")
    keys.skip("fp32_residual_connection", "rope_ratio", "pre_seq_len", "prefix_projection", "interleaved_qkv")
    common.only(keys, apply_residual_connection_post_layernorm=False, post_layer_norm=True)
    linear_bias = keys.flag("add_bias_linear", False)
    groups: dict[str, Any] = {"kv_heads": "multi_query_group_num"} if keys.flag("multi_query_attention", False) else {}
    keys.skip("multi_query_group_num")
    attention = common.gqa(
        keys,
        hidden,
        head_dim="kv_channels",
        qkv_bias=linear_bias or keys.flag("add_qkv_bias", False),
        o_bias=linear_bias,
        fused_qkv="query_key_value",
        prefix="self_attention",
        o_name="dense",
        **groups,
    )
    ffn = common.dense(
        keys, size="ffn_hidden_size", bias=linear_bias, fused_gate_up="dense_h_to_4h", down_name="dense_4h_to_h"
    )
    kind: common.NormKind = "rms" if keys.flag("rmsnorm", True) else "layer"
    layer = Layer(mixers=(attention,), ffns=(ffn,), norms=common.pre_norms(hidden, kind, bias=kind == "layer"))
    return common.decoder(
        keys,
        hidden,
        (layer,) * keys.layers("num_layers"),
        norm_kind=kind,
        norm_bias=kind == "layer",
        norm_name="transformer.encoder.final_layernorm",
        context=("seq_length",),
        vocab_size=keys.first_integer("padded_vocab_size", "vocab_size"),
        embedding_name="transformer.embedding.word_embeddings",
        layers_name="transformer.encoder.layers",
        head_name="transformer.output_layer",
    )


def read_glm(keys: Keys) -> Model:
    """Read GLM-4-9B as converted for transformers."""
    return _read_dense(keys, ("input_layernorm", "post_attention_layernorm"))


def read_glm4(keys: Keys) -> Model:
    """Read GLM-4-0414 and GLM-Z1: norms before and after both blocks."""
    return _read_dense(keys, SANDWICH)


def read_glm4v_text(keys: Keys) -> Model:
    """Read the text part of GLM-4.1V: GLM-4-0414 whose heads share hidden_size among them."""
    return _read_dense(keys, SANDWICH, head_dim=None)


def _read_dense(keys: Keys, norm_names: tuple[str, ...], head_dim: int | None = 128) -> Model:
    hidden, bias = keys.integer("hidden_size"), keys.flag("attention_bias", True)
    attention = common.gqa(keys, hidden, kv_default=2, head_dim_default=head_dim, qkv_bias=bias)
    ffn: DenseFFN = common.dense(keys, fused_gate_up="gate_up_proj")
    layer = Layer(mixers=(attention,), ffns=(ffn,), norms=common.norms(hidden, *norm_names))
    return common.decoder(keys, hidden, (layer,) * keys.layers())


def read_glm4_moe(keys: Keys) -> Model:
    """Read GLM-4.5, 4.6 and the text part of 4.5V: biases of q, k and v, DeepSeek-V3's experts.

    An MTP module is counted where ``num_nextn_predict_layers`` says so, not by the class default: configs without the
    key belong to checkpoints without the module (GLM-4.5V).
    """
    hidden, bias = keys.integer("hidden_size"), keys.flag("attention_bias", False)
    norm: dict[str, Any] = {"qk_norm": "head" if keys.flag("use_qk_norm", False) else None}
    attention = common.gqa(keys, hidden, kv_default=8, qkv_bias=bias, **norm)
    shared = keys.integer("moe_intermediate_size") * keys.integer("n_shared_experts", 1, low=0)
    sparse = common.moe(keys, shared_intermediate_size=shared, correction_bias=True)
    dense, norms = common.dense(keys), common.pre_norms(hidden)

    def make(has_experts: bool) -> Layer:
        return Layer(mixers=(attention,), ffns=(sparse if has_experts else dense,), norms=norms)

    layers = common.by_kind(common.sparse_after(keys, keys.layers(), 1), make)
    return common.decoder(keys, hidden, layers, mtp_layer=make(True))
