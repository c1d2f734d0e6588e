"""Dense decoders that are Llama but for their norms, biases, windows, gates or block.

Source: transformers@5.23.0:models/{bitnet,cwm,diffllama,doge,granite_swa,helium,hyperclovax,jais2,ministral,nanochat,
vaultgemma}/ modeling and configuration files; defaults of missing keys are those of the config classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.hf_config import common
from ullage.read.hf_config.families.gemma import GEMMA_ACTIVATION
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import DenseFFN, ExtraTensor, Layer, Model, Norm


def _windowed(
    keys: Keys,
    windows: Sequence[int | None],
    ffn: DenseFFN,
    *,
    attention: dict[str, Any],
    norms: tuple[Norm, ...] = (),
    **frame: Any,
) -> Model:
    """Build layers that differ by their window alone."""
    hidden = keys.integer("hidden_size")
    norms = norms or common.pre_norms(hidden)

    def make(window: int | None) -> Layer:
        return Layer(mixers=(common.gqa(keys, hidden, window=window, **attention),), ffns=(ffn,), norms=norms)

    return common.decoder(keys, hidden, common.by_kind(windows, make), **frame)


def _attention_bias(keys: Keys, *, default: bool = False) -> dict[str, Any]:
    bias = keys.flag("attention_bias", default)
    return {"qkv_bias": bias, "o_bias": bias}


def read_cwm(keys: Keys) -> Model:
    """Read CWM: every fourth layer, the first among them, has full attention."""
    window = keys.integer("sliding_window", 8192)
    kinds = common.windows(keys, keys.layers(), window, lambda index: index % 4 > 0)
    ffn = common.dense(keys, bias=keys.flag("mlp_bias", False))
    return _windowed(keys, kinds, ffn, attention={"head_dim_default": 128})


def read_ministral(keys: Keys) -> Model:
    """Read Ministral 8B: Mistral whose layers may slide or not, one by one."""
    window = keys.nullable_integer("sliding_window", 4096)
    kinds = common.windows(keys, keys.layers(), window, lambda index: window is not None)
    return _windowed(keys, kinds, common.dense(keys), attention={"kv_default": 8})


def read_granite_swa(keys: Keys) -> Model:
    """Read Granite with sliding windows: sinks; every fourth layer, the first among them, has full attention."""
    keys.skip("layer_rope_theta")
    window = keys.integer("sliding_window", 128)
    kinds = common.windows(keys, keys.layers(), window, lambda index: index % 4 > 0)
    ffn = common.dense(keys, bias=keys.flag("mlp_bias", False))
    return _windowed(keys, kinds, ffn, attention={**_attention_bias(keys), "sinks": True}, tied_default=True)


def read_vaultgemma(keys: Keys) -> Model:
    """Read VaultGemma: Gemma 2 without norms after the blocks; every other layer, the first among them, slides."""
    hidden, window = keys.integer("hidden_size"), keys.integer("sliding_window", 4096)
    kinds = common.windows(keys, keys.layers(), window, common.every(2))
    norms = common.norms(hidden, "input_layernorm", "pre_feedforward_layernorm")
    ffn = common.dense(keys, activation=GEMMA_ACTIVATION)
    attention = {**_attention_bias(keys), "kv_default": 4, "head_dim_default": 256}
    return _windowed(keys, kinds, ffn, attention=attention, norms=norms, tied_default=True)


def read_helium(keys: Keys) -> Model:
    """Read Helium: Llama whose output projection is square and has no bias."""
    hidden = keys.integer("hidden_size")
    attention = common.gqa(keys, hidden, head_dim_default=128, qkv_bias=keys.flag("attention_bias", False))
    if attention.num_heads * attention.head_dim != hidden:
        raise InputError(_("num_attention_heads x head_dim is not hidden_size"), where=keys.at("head_dim"))
    ffn = common.dense(keys, bias=keys.flag("mlp_bias", False))
    layer = Layer(mixers=(attention,), ffns=(ffn,), norms=common.pre_norms(hidden))
    return common.decoder(keys, hidden, (layer,) * keys.layers())


def read_hyperclovax(keys: Keys) -> Model:
    """Read HyperCLOVA X: Granite's factors and, with ``use_post_norm``, norms after both blocks."""
    hidden = keys.integer("hidden_size")
    names = ["input_layernorm", "post_attention_layernorm"]
    names += ["post_norm1", "post_norm2"] if keys.flag("use_post_norm", True) else []
    ffn = common.dense(keys, bias=keys.flag("mlp_bias", False))
    norms = common.norms(hidden, *names)
    return _windowed(keys, [None] * keys.layers(), ffn, attention=_attention_bias(keys), norms=norms)


def read_jais2(keys: Keys) -> Model:
    """Read Jais 2: layer norms and linear layers with biases, a block of squared ReLU without a gate."""
    hidden = keys.integer("hidden_size")
    ffn = common.dense(keys, gated=False, bias=keys.flag("mlp_bias", True), activation="relu2")
    norms = common.pre_norms(hidden, "layer", bias=True)
    attention = {**_attention_bias(keys, default=True), "head_dim_default": 128}
    kinds = [None] * keys.layers()
    return _windowed(keys, kinds, ffn, attention=attention, norms=norms, norm_kind="layer", norm_bias=True)


def read_bitnet(keys: Keys) -> Model:
    """Read BitNet b1.58: norms inside both blocks, before their last projection."""
    hidden = keys.integer("hidden_size")
    attention = common.gqa(keys, hidden, **_attention_bias(keys))
    ffn = common.dense(keys, activation="relu2")
    inner = ExtraTensor(name="attn_sub_norm.weight", shape=(hidden,))
    block = ExtraTensor(name="ffn_sub_norm.weight", shape=(ffn.intermediate_size,))
    layer = Layer(
        mixers=(replace(attention, extras=(inner,)),),
        ffns=(replace(ffn, extras=(block,)),),
        norms=common.pre_norms(hidden),
    )
    return common.decoder(keys, hidden, (layer,) * keys.layers())


def read_nanochat(keys: Keys) -> Model:
    """Read nanochat: norms without weights, a block of squared ReLU without a gate."""
    hidden = keys.integer("hidden_size")
    ffn = common.dense(keys, gated=False, up_name="fc1", down_name="fc2", activation="relu2")
    norms = common.pre_norms(hidden, weight=False)
    kinds = [None] * keys.layers()
    return _windowed(keys, kinds, ffn, attention=_attention_bias(keys), norms=norms, norm_weight=False)


def read_diffllama(keys: Keys) -> Model:
    """Read DiffLlama: the difference of two attentions, weighted by four learned vectors of head_dim."""
    keys.skip("lambda_std_dev")
    hidden = keys.integer("hidden_size")
    attention = common.gqa(keys, hidden, **_attention_bias(keys))
    names = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
    lambdas = tuple(ExtraTensor(name=name, shape=(attention.head_dim,)) for name in names)
    mixer = replace(attention, extras=lambdas)
    layer = Layer(mixers=(mixer,), ffns=(common.dense(keys),), norms=common.pre_norms(hidden))
    return common.decoder(keys, hidden, (layer,) * keys.layers())


def read_doge(keys: Keys) -> Model:
    """Read Doge without experts: a dynamic mask from the values, and learned weights of both residuals."""
    common.only(keys, is_moe=False, sliding_window=None)
    keys.skip("keep_window_size", "num_experts", "num_experts_per_tok", "norm_topk_prob")
    hidden = keys.integer("hidden_size")
    bias = _attention_bias(keys)
    attention = common.gqa(keys, hidden, qk_norm="head", **bias)
    kv_heads = attention.num_kv_heads
    mask: list[ExtraTensor] = [
        ExtraTensor(name="A", shape=(kv_heads,)),
        ExtraTensor(name="dt_proj.weight", shape=(kv_heads, kv_heads * attention.head_dim)),
    ]
    if bias["qkv_bias"]:
        mask.append(ExtraTensor(name="dt_proj.bias", shape=(kv_heads,)))
    layer = Layer(
        mixers=(replace(attention, extras=tuple(mask)),),
        ffns=(common.dense(keys, bias=keys.flag("mlp_bias", False)),),
        norms=common.pre_norms(hidden),
        extras=tuple(ExtraTensor(name=name, shape=(hidden,)) for name in ("input_residual", "post_attention_residual")),
    )
    return common.decoder(keys, hidden, (layer,) * keys.layers())
