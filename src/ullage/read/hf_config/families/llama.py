"""Llama and its kin: pre-norm blocks of rotary attention and a feed-forward block.

Source: transformers@5.23.0:models/{llama,mistral,ministral3,granite,seed_oss,smollm3,internlm3,hunyuan_v1_dense,
ernie4_5,stablelm,nemotron,apertus,exaone4}/; defaults of missing keys are those of their config classes. EXAONE 3,
InternLM 2 and Baichuan, whose code lives beside their checkpoints, are read as vLLM's models of them are.
"""

from __future__ import annotations

from typing import Any

from ullage.read.hf_config import common
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import ExtraTensor, Layer, Model


def _uniform(
    keys: Keys, *, qkv_bias: bool, o_bias: bool, mlp_bias: bool = False, attention: dict[str, Any], **frame: Any
) -> Model:
    """Build equal pre-norm layers of grouped-query attention and a gated block under Llama's names."""
    hidden = keys.integer("hidden_size")
    mixer = common.gqa(keys, hidden, qkv_bias=qkv_bias, o_bias=o_bias, **attention)
    layer = Layer(mixers=(mixer,), ffns=(common.dense(keys, bias=mlp_bias),), norms=common.pre_norms(hidden))
    return common.decoder(keys, hidden, (layer,) * keys.layers(), **frame)


def read(keys: Keys) -> Model:
    """Read Llama and Granite: ``attention_bias`` for q, k, v and o, ``mlp_bias`` for the block."""
    bias = keys.flag("attention_bias", False)
    return _uniform(keys, qkv_bias=bias, o_bias=bias, mlp_bias=keys.flag("mlp_bias", False), attention={})


def read_mistral(keys: Keys) -> Model:
    """Read Mistral: one sliding window for all layers; a missing key means 4096, null means none."""
    window = keys.nullable_integer("sliding_window", 4096)
    return _uniform(keys, qkv_bias=False, o_bias=False, attention={"window": window})


def read_ministral3(keys: Keys) -> Model:
    """Read Ministral 3 and Devstral 2: Mistral without a window unless one is given, head_dim 128."""
    window = keys.integer("sliding_window", None)
    return _uniform(keys, qkv_bias=False, o_bias=False, attention={"window": window, "head_dim_default": 128})


def read_seed_oss(keys: Keys) -> Model:
    """Read Seed-OSS: biases of q, k and v apart from that of o."""
    qkv, out = keys.flag("attention_bias", True), keys.flag("attention_out_bias", False)
    mlp = keys.flag("mlp_bias", False)
    return _uniform(keys, qkv_bias=qkv, o_bias=out, mlp_bias=mlp, attention={"head_dim_default": 128})


def read_internlm3(keys: Keys) -> Model:
    """Read InternLM 3: ``qkv_bias`` for q, k and v, ``bias`` for o and the block.

    Newer files call them attention_bias and mlp_bias (transformers@5.23.0:models/internlm3/configuration_internlm3.py:
    attribute_map).
    """
    bias = keys.flag("bias", keys.flag("mlp_bias", False))
    qkv = keys.flag("qkv_bias", keys.flag("attention_bias", False))
    return _uniform(keys, qkv_bias=qkv, o_bias=bias, mlp_bias=bias, attention={"head_dim_default": 128})


def read_ernie(keys: Keys) -> Model:
    """Read ERNIE 4.5 (dense): one flag for all biases, tied embeddings by default."""
    bias = keys.flag("use_bias", False)
    attention = {"head_dim_default": 128}
    return _uniform(keys, qkv_bias=bias, o_bias=bias, mlp_bias=bias, attention=attention, tied_default=True)


def read_hunyuan(keys: Keys) -> Model:
    """Read Hunyuan (dense): Llama with norms of queries and keys."""
    keys.skip("cla_share_factor", "attention_head_dim")
    common.only(keys, use_cla=False, use_qk_norm=True)
    bias = keys.flag("attention_bias", False)
    norm = {"qk_norm": "head", "q_norm_name": "query_layernorm", "k_norm_name": "key_layernorm"}
    return _uniform(keys, qkv_bias=bias, o_bias=bias, attention=norm)


def read_smollm3(keys: Keys) -> Model:
    """Read SmolLM3: some layers have no rotary positions, which costs nothing; windows as ``layer_types`` says."""
    keys.skip("no_rope_layers", "no_rope_layer_interval", "max_window_layers")
    hidden, num_layers = keys.integer("hidden_size"), keys.layers()
    bias = keys.flag("attention_bias", False)
    window = keys.integer("sliding_window", None) if keys.flag("use_sliding_window", False) else None
    keys.skip("sliding_window")
    ffn = common.dense(keys, bias=keys.flag("mlp_bias", False))

    def make(window: int | None) -> Layer:
        attention = common.gqa(keys, hidden, kv_default=4, qkv_bias=bias, o_bias=bias, window=window)
        return Layer(mixers=(attention,), ffns=(ffn,), norms=common.pre_norms(hidden))

    kinds = common.windows(keys, num_layers, window, lambda index: False)
    return common.decoder(keys, hidden, common.by_kind(kinds, make), tied_default=True)


def read_stablelm(keys: Keys) -> Model:
    """Read StableLM 2: layer norms with bias; parallel blocks share one norm."""
    hidden = keys.integer("hidden_size")
    attention = common.gqa(
        keys,
        hidden,
        qkv_bias=keys.flag("use_qkv_bias", False),
        qk_norm="full" if keys.flag("qk_layernorm", False) else None,
        qk_norm_kind="layer",
        q_norm_name="q_layernorm",
        k_norm_name="k_layernorm",
    )
    norms = common.pre_norms(hidden, "layer", bias=True)
    norms = norms[:1] if keys.flag("use_parallel_residual", False) else norms
    layer = Layer(mixers=(attention,), ffns=(common.dense(keys),), norms=norms)
    return common.decoder(keys, hidden, (layer,) * keys.layers(), norm_kind="layer", norm_bias=True)


def read_nemotron(keys: Keys) -> Model:
    """Read Nemotron 4 and Minitron: layer norms with bias, a block of squared ReLU without a gate."""
    hidden, bias = keys.integer("hidden_size"), keys.flag("attention_bias", False)
    attention = common.gqa(keys, hidden, qkv_bias=bias, o_bias=bias)
    ffn = common.dense(keys, gated=False, bias=keys.flag("mlp_bias", False), activation="relu2")
    layer = Layer(mixers=(attention,), ffns=(ffn,), norms=common.pre_norms(hidden, "layer", bias=True))
    return common.decoder(keys, hidden, (layer,) * keys.layers(), norm_kind="layer", norm_bias=True)


def read_arcee(keys: Keys) -> Model:
    """Read AFM: Llama with a block of squared ReLU without a gate."""
    hidden, bias = keys.integer("hidden_size"), keys.flag("attention_bias", False)
    attention = common.gqa(keys, hidden, qkv_bias=bias, o_bias=bias)
    ffn = common.dense(keys, gated=False, bias=keys.flag("mlp_bias", False), activation="relu2")
    layer = Layer(mixers=(attention,), ffns=(ffn,), norms=common.pre_norms(hidden))
    return common.decoder(keys, hidden, (layer,) * keys.layers())


def read_apertus(keys: Keys) -> Model:
    """Read Apertus: xIELU block without a gate and with two learned scalars, norms of queries and keys."""
    hidden, bias = keys.integer("hidden_size"), keys.flag("attention_bias", False)
    keys.skip("post_norm", "qk_norm", "mlp_bias")
    attention = common.gqa(keys, hidden, qkv_bias=bias, o_bias=bias, qk_norm="head")
    scalars = tuple(ExtraTensor(name=f"act_fn.{name}", shape=(1,)) for name in ("alpha_p", "alpha_n"))
    ffn = common.dense(keys, gated=False, activation="xielu", extras=scalars)
    names = ("attention_layernorm", "feedforward_layernorm")
    layer = Layer(mixers=(attention,), ffns=(ffn,), norms=common.norms(hidden, *names))
    return common.decoder(keys, hidden, (layer,) * keys.layers())


def read_exaone(keys: Keys) -> Model:
    """Read EXAONE 3 and 3.5."""
    hidden = keys.integer("hidden_size")
    attention = common.gqa(keys, hidden, prefix="attn.attention", o_name="out_proj")
    ffn = common.dense(keys, gate_name="c_fc_0", up_name="c_fc_1", down_name="c_proj")
    layer = Layer(mixers=(attention,), ffns=(ffn,), norms=common.norms(hidden, "ln_1", "ln_2"))
    num_layers = keys.first_integer("num_layers", "num_hidden_layers", high=10_000)
    names: dict[str, Any] = {
        "embedding_name": "transformer.wte",
        "layers_name": "transformer.h",
        "norm_name": "transformer.ln_f",
    }
    return common.decoder(keys, hidden, (layer,) * num_layers, **names)


def read_exaone4(keys: Keys) -> Model:
    """Read EXAONE 4: norms after the blocks; every fourth layer has full attention where a window is given."""
    hidden, num_layers = keys.integer("hidden_size"), keys.layers()
    window = keys.nullable_integer("sliding_window", 4096)
    pattern = keys.raw("sliding_window_pattern", 4)
    period = len(pattern) if isinstance(pattern, str) else keys.integer("sliding_window_pattern", 4)
    ffn = common.dense(keys)

    def make(window: int | None) -> Layer:
        attention = common.gqa(keys, hidden, qk_norm="head", window=window)
        names = ("post_attention_layernorm", "post_feedforward_layernorm")
        return Layer(mixers=(attention,), ffns=(ffn,), norms=common.norms(hidden, *names))

    kinds = common.windows(
        keys,
        num_layers,
        window,
        lambda index: window is not None and bool((index + 1) % period) and index < num_layers - 1,
    )
    return common.decoder(keys, hidden, common.by_kind(kinds, make))


def read_internlm2(keys: Keys) -> Model:
    """Read InternLM 2 and 2.5: q, k and v in one projection."""
    hidden, bias = keys.integer("hidden_size"), keys.flag("bias", False)
    attention = common.gqa(keys, hidden, qkv_bias=bias, o_bias=bias, fused_qkv="wqkv", prefix="attention", o_name="wo")
    ffn = common.dense(keys, prefix="feed_forward", gate_name="w1", up_name="w3", down_name="w2")
    layer = Layer(mixers=(attention,), ffns=(ffn,), norms=common.norms(hidden, "attention_norm", "ffn_norm"))
    names: dict[str, Any] = {"embedding_name": "model.tok_embeddings", "head_name": "output"}
    return common.decoder(keys, hidden, (layer,) * keys.layers(), **names)


def read_baichuan(keys: Keys) -> Model:
    """Read Baichuan 1 and 2: multi-head attention with q, k and v in one projection."""
    hidden = keys.integer("hidden_size")
    keys.skip("z_loss_weight")
    attention = common.gqa(keys, hidden, fused_qkv="W_pack")
    ffn = common.dense(keys)
    layer = Layer(mixers=(attention,), ffns=(ffn,), norms=common.pre_norms(hidden))
    context = ("max_position_embeddings", "model_max_length")
    return common.decoder(keys, hidden, (layer,) * keys.layers(), context=context)
