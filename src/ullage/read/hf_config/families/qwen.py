"""Qwen 1 to 3, dense and with experts, and MiMo.

Source: transformers@5.23.0:models/{qwen2,qwen2_moe,qwen3,qwen3_moe}/; Qwen 1 and MiMo, whose code lives beside their
checkpoints: vllm@0.33.0:model_executor/models/{qwen,mimo,mimo_mtp}.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ullage.read.hf_config import common
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import DenseFFN, ExtraTensor, FeedForward, Layer, Model, MtpModule


def read_qwen2(keys: Keys) -> Model:
    """Read Qwen2 and Qwen2.5: q, k and v have biases, o has none."""
    return _read(keys, _dense(keys), qkv_bias=True)


def read_qwen2_moe(keys: Keys) -> Model:
    """Read Qwen1.5-MoE and Qwen2-MoE: a shared expert behind a gate of its own."""
    bias, norm = keys.flag("qkv_bias", True), _qk_norm(keys, default=False)
    return _read(keys, _sparse(keys, shared_default=5632), qkv_bias=bias, **norm)


def read_qwen3(keys: Keys) -> Model:
    """Read Qwen3: norms of queries and keys; head_dim 128 unless given."""
    bias = keys.flag("attention_bias", False)
    return _read(keys, _dense(keys), qkv_bias=bias, o_bias=bias, head_dim_default=128, qk_norm="head")


def read_qwen3_moe(keys: Keys) -> Model:
    """Read Qwen3 with experts. Unlike Qwen3, head_dim defaults to hidden / heads."""
    bias = keys.flag("attention_bias", False)
    qkv = bias or keys.flag("qkv_bias", False)
    return _read(keys, _sparse(keys), qkv_bias=qkv, o_bias=bias, **_qk_norm(keys, default=True))


def read_mimo(keys: Keys) -> Model:
    """Read MiMo-7B: Qwen2 with multi-token-prediction modules of its own shape."""
    model = _read(keys, _dense(keys), qkv_bias=keys.flag("attention_bias", True))
    num_mtp = keys.integer("num_nextn_predict_layers", 0, low=0, high=64)
    hidden = model.hidden_size
    modules = tuple(
        MtpModule(
            layer=model.layers[-1],
            norms=common.norms(hidden, "token_layernorm", "hidden_layernorm", "final_layernorm"),
            extras=(ExtraTensor(name="input_proj.weight", shape=(hidden, 2 * hidden)),),
            prefix=f"model.mtp_layers.{index}.",
        )
        for index in range(num_mtp)
    )
    return replace(model, mtp=modules)


def _dense(keys: Keys) -> list[FeedForward]:
    return [common.dense(keys)] * keys.layers()


def _sparse(keys: Keys, *, shared_default: int = 0) -> list[FeedForward]:
    """Experts in every ``decoder_sparse_step``-th layer that ``mlp_only_layers`` does not name.

    Qwen2-MoE's class builds the shared expert's gate even where that expert has no width.
    """
    step = keys.integer("decoder_sparse_step", 1)
    dense_only = set(keys.integers("mlp_only_layers", []))
    shared = keys.integer("shared_expert_intermediate_size", shared_default, low=0)
    gate = shared > 0 or common.read_architecture(keys).startswith("Qwen2Moe")
    sparse = common.moe(keys, shared_intermediate_size=shared, shared_gate=gate, shared_name="shared_expert")
    dense = common.dense(keys)
    return [dense if index in dense_only or (index + 1) % step else sparse for index in range(keys.layers())]


def _qk_norm(keys: Keys, *, default: bool) -> dict[str, Any]:
    return {"qk_norm": "head" if keys.flag("use_qk_norm", default) else None}


def _read(keys: Keys, ffns: list[FeedForward], **attention: Any) -> Model:
    """Read the rest. Layers from ``max_window_layers`` on slide, and only where ``use_sliding_window`` says so."""
    hidden = keys.integer("hidden_size")
    keys.skip("mlp_bias")
    slides = keys.flag("use_sliding_window", False)
    # the class of Qwen2-MoE writes 0 where nothing slides
    window = keys.nullable_integer("sliding_window", 4096, low=1 if slides else 0)
    first = keys.integer("max_window_layers", 28, low=0)
    window = window if slides else None
    kinds = common.windows(keys, len(ffns), window, lambda index: window is not None and index >= first)

    def make(kind: tuple[int | None, FeedForward]) -> Layer:
        mixer = common.gqa(keys, hidden, window=kind[0], **attention)
        return Layer(mixers=(mixer,), ffns=(kind[1],), norms=common.pre_norms(hidden))

    return common.decoder(keys, hidden, common.by_kind(zip(kinds, ffns, strict=True), make))


def read_qwen1(keys: Keys) -> Model:
    """Read Qwen 1: multi-head attention in one projection with bias; the config counts gate and up as one width."""
    hidden = keys.integer("hidden_size")
    keys.skip(
        "bf16", "fp16", "fp32", "softmax_in_fp32", "use_cache_kernel", "use_cache_quantization", "use_dynamic_ntk"
    )
    keys.skip("use_flash_attn", "use_logn_attn", "no_bias", "onnx_safe", "scale_attn_weights", "attn_dropout_prob")
    keys.skip("emb_dropout_prob")
    attention = common.gqa(
        keys, hidden, qkv_bias=True, head_dim="kv_channels", fused_qkv="c_attn", prefix="attn", o_name="c_proj"
    )
    inner = keys.integer("intermediate_size") // 2
    ffn = DenseFFN(intermediate_size=inner, gate_name="w2", up_name="w1", down_name="c_proj")
    layer = Layer(mixers=(attention,), ffns=(ffn,), norms=common.norms(hidden, "ln_1", "ln_2"))
    names: dict[str, Any] = {
        "embedding_name": "transformer.wte",
        "layers_name": "transformer.h",
        "norm_name": "transformer.ln_f",
    }
    context = ("max_position_embeddings", "seq_length")
    return common.decoder(keys, hidden, (layer,) * keys.layers(), context=context, **names)
