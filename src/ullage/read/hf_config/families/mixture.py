"""Mixtures of experts with grouped-query attention: Mixtral, DBRX, MiniMax-M2, gpt-oss, MiMo-V2, ERNIE 4.5, Granite.

Source: transformers@5.23.0:models/{mixtral,dbrx,minimax_m2,gpt_oss,mimo_v2_flash,ernie4_5_moe,granitemoe}/.
"""

from __future__ import annotations

from typing import Any

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.hf_config import common
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import Attention, ExtraTensor, Layer, Model, MoEFFN

#: Mixtral's names, which others took over
W123: dict[str, Any] = {"prefix": "block_sparse_moe", "gate_name": "w1", "up_name": "w3", "down_name": "w2"}


def read_mixtral(keys: Keys) -> Model:
    """Read Mixtral: no window unless one is given."""
    hidden = keys.integer("hidden_size")
    attention = common.gqa(keys, hidden, kv_default=8, window=keys.integer("sliding_window", None))
    layer = Layer(
        mixers=(attention,),
        ffns=(common.moe(keys, size="intermediate_size", **W123),),
        norms=common.pre_norms(hidden),
    )
    return common.decoder(keys, hidden, (layer,) * keys.layers())


def read_dbrx(keys: Keys) -> Model:
    """Read DBRX: sizes in two sub-configs, layer norms without bias; a layer's experts share a tensor."""
    hidden = keys.integer("d_model")
    keys.skip("emb_pdrop")
    part, ffn_part = keys.part("attn_config"), keys.part("ffn_config")
    if part is None or ffn_part is None:
        raise InputError(_("attn_config and ffn_config are both needed"), where=keys.where)
    part.skip("attn_pdrop", "clip_qkv")
    heads, kv_heads = keys.integer("n_heads"), part.integer("kv_n_heads")
    if hidden % heads or heads % kv_heads:
        raise InputError(_("d_model, n_heads and kv_n_heads do not divide each other"), where=keys.where)
    attention = Attention(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        fused_qkv="Wqkv",
        prefix="norm_attn_norm.attn",
        o_name="out_proj",
    )
    ffn = _dbrx_experts(ffn_part)
    norms = common.norms(hidden, "norm_attn_norm.norm_1", "norm_attn_norm.norm_2", kind="layer")
    layers = (Layer(mixers=(attention,), ffns=(ffn,), norms=norms),) * keys.layers("n_layers")
    names: dict[str, Any] = {
        "embedding_name": "transformer.wte",
        "layers_name": "transformer.blocks",
        "norm_name": "transformer.norm_f",
    }
    return common.decoder(keys, hidden, layers, norm_kind="layer", context=("max_seq_len",), **names)


def _dbrx_experts(part: Keys) -> MoEFFN:
    part.skip("ffn_act_fn", "moe_jitter_eps", "moe_loss_weight", "moe_normalize_expert_weights")
    part.skip("uniform_expert_assignment")
    return common.moe(
        part,
        num_experts=("moe_num_experts",),
        top_k=("moe_top_k",),
        size="ffn_hidden_size",
        prefix="ffn",
        router_name="router.layer",
        experts_name="experts.mlp",
        gate_name="w1",
        up_name="v1",
        down_name="w2",
    )


def read_minimax_m2(keys: Keys) -> Model:
    """Read MiniMax-M2: norms over whole queries and keys, a correction bias.

    The configs announce MTP modules (``use_mtp``) that neither the published checkpoints nor
    vllm@0.33.0:model_executor/models/minimax_m2.py hold: none is counted.
    """
    hidden = keys.integer("hidden_size")
    keys.skip("rotary_dim", "use_mtp", "num_mtp_modules", "mtp_transformer_layers")
    common.only(keys, qk_norm_type="per_layer", shared_intermediate_size=0, sliding_window=None)
    kinds = keys.integers("attn_type_list", None, length=keys.layers())
    if kinds is not None and set(kinds) != {1}:
        common.only(keys, attn_type_list=[1] * len(kinds))
    qk_norm = "full" if keys.flag("use_qk_norm", True) else None
    attention = common.gqa(keys, hidden, kv_default=8, head_dim_default=128, qk_norm=qk_norm)
    biased = keys.flag("use_routing_bias", True)
    name = "e_score_correction_bias"
    ffn = common.moe(keys, size="intermediate_size", correction_bias=biased, correction_bias_name=name, **W123)
    layer = Layer(mixers=(attention,), ffns=(ffn,), norms=common.pre_norms(hidden))
    return common.decoder(keys, hidden, (layer,) * keys.layers())


def read_gpt_oss(keys: Keys) -> Model:
    """Read gpt-oss: sinks, biases everywhere, every other layer slides, the first among them."""
    hidden, bias = keys.integer("hidden_size"), keys.flag("attention_bias", True)
    window = keys.integer("sliding_window", 128)
    keys.skip("swiglu_alpha", "swiglu_limit")
    ffn = common.moe(
        keys,
        top_k=("num_experts_per_tok", "experts_per_token"),
        size="intermediate_size",
        router_name="router",
        router_bias=True,
        expert_bias=True,
        fused_experts=True,
    )

    def make(window: int | None) -> Layer:
        attention = common.gqa(
            keys, hidden, kv_default=8, head_dim_default=64, qkv_bias=bias, o_bias=bias, window=window, sinks=True
        )
        return Layer(mixers=(attention,), ffns=(ffn,), norms=common.pre_norms(hidden))

    kinds = common.windows(keys, keys.layers(), window, lambda index: index % 2 == 0)
    return common.decoder(keys, hidden, common.by_kind(kinds, make))


def read_mimo_v2(keys: Keys) -> Model:
    """Read MiMo-V2-Flash: windowed layers have their own head counts and dimensions, and sinks.

    ``hybrid_layer_pattern`` holds 1 for windowed layers, ``moe_layer_freq`` 1 for layers with experts. Newer files
    leave out the keys of windowed layers, which then have twice the KV heads of the others
    (transformers@5.23.0:models/mimo_v2_flash/modeling_mimo_v2_flash.py:MiMoV2FlashAttention).
    """
    hidden, num_layers = keys.integer("hidden_size"), keys.layers()
    keys.skip("attention_value_scale", "swa_rope_theta", "attention_chunk_size")
    bias = keys.flag("attention_bias", False)
    window = keys.first_integer("sliding_window_size", "sliding_window")
    sliding = keys.integers("hybrid_layer_pattern", None, length=num_layers)
    types = ("full_attention", "sliding_attention")
    kinds = common.layer_types(keys, num_layers, types, lambda index: types[_pattern(sliding, index)])
    full_sinks = keys.flag("add_full_attention_sink_bias", False)
    sinks = {"full_attention": full_sinks, "sliding_attention": keys.flag("add_swa_attention_sink_bias", True)}
    shared = keys.integer("moe_intermediate_size") * keys.integer("n_shared_experts", 0, low=0)
    sparse = common.moe(keys, shared_intermediate_size=shared, correction_bias=True)
    dense = common.dense(keys)
    has_experts = _mimo_experts(keys, num_layers)

    def make(kind: tuple[str, int]) -> Layer:
        swa = "swa_" if kind[0] == common.SLIDING else ""
        attention = common.gqa(
            keys,
            hidden,
            heads=f"{swa}num_attention_heads",
            heads_default=keys.integer("num_attention_heads"),
            kv_heads=f"{swa}num_key_value_heads",
            kv_default=keys.integer("num_key_value_heads") * (2 if swa else 1),
            head_dim=f"{swa}head_dim",
            head_dim_default=keys.integer("head_dim"),
            v_head_dim=keys.integer(f"{swa}v_head_dim", keys.integer("v_head_dim")),
            qkv_bias=bias,
            window=window if swa else None,
            sinks=sinks[kind[0]],
            sinks_name="attention_sink_bias",
        )
        return Layer(mixers=(attention,), ffns=(sparse if kind[1] else dense,), norms=common.pre_norms(hidden))

    return common.decoder(keys, hidden, common.by_kind(zip(kinds, has_experts, strict=True), make))


def _mimo_experts(keys: Keys, num_layers: int) -> list[int]:
    """Return 1 for layers with experts, by one of two keys; by default all but the first have some."""
    named = common.layer_types(
        keys, num_layers, ("dense", "sparse"), lambda index: "sparse" if index else "dense", key="mlp_layer_types"
    )
    found: list[int] = keys.integers("moe_layer_freq", [int(kind == "sparse") for kind in named], length=num_layers)
    return found


def _pattern(sliding: list[int] | None, index: int) -> int:
    """Return 1 for a windowed layer; by default all are but the first and every sixth (MiMoV2FlashConfig)."""
    return min(sliding[index], 1) if sliding is not None else int(index > 0 and (index + 1) % 6 > 0)


def read_ernie_moe(keys: Keys) -> Model:
    """Read ERNIE 4.5 with experts: shared experts, and a correction bias that is a parameter of its own module."""
    hidden, num_layers, bias = keys.integer("hidden_size"), keys.layers(), False
    common.only(keys, use_bias=False)
    keys.skip("moe_norm_min", "moe_capacity", "moe_gate", "moe_use_aux_free", "moe_norm_gate_logits")
    attention = common.gqa(keys, hidden, kv_default=4, qkv_bias=bias, o_bias=bias)
    width = keys.integer("moe_intermediate_size")
    sparse: MoEFFN = common.moe(
        keys,
        num_experts=("moe_num_experts", "num_experts"),
        top_k=("moe_k", "num_experts_per_tok"),
        shared_intermediate_size=width * keys.integer("moe_num_shared_experts", 2, low=0),
        extras=(
            ExtraTensor(
                name="moe_statics.e_score_correction_bias",
                shape=(1, keys.first_integer("moe_num_experts", "num_experts")),
                dtype="float32",
                linear=False,
            ),
        ),
    )
    dense, interval = common.dense(keys, bias=bias), keys.integer("moe_layer_interval", 1)
    first, last = keys.integer("moe_layer_start_index", 1, low=0), keys.integer("moe_layer_end_index", -1, low=-1)
    last = num_layers - 1 if last == -1 else last

    def make(has_experts: bool) -> Layer:
        return Layer(mixers=(attention,), ffns=(sparse if has_experts else dense,), norms=common.pre_norms(hidden))

    kinds = [first <= index <= last and (index + 1) % interval == 0 for index in range(num_layers)]
    return common.decoder(keys, hidden, common.by_kind(kinds, make), tied_default=True)


def read_granite_moe(keys: Keys) -> Model:
    """Read Granite 3 with experts: gate and up in one tensor, all experts of a layer together."""
    hidden, bias = keys.integer("hidden_size"), keys.flag("attention_bias", False)
    attention = common.gqa(keys, hidden, qkv_bias=bias, o_bias=bias)
    ffn = common.moe(
        keys, size="intermediate_size", prefix="block_sparse_moe", router_name="router.layer", fused_experts=True
    )
    layer = Layer(mixers=(attention,), ffns=(ffn,), norms=common.pre_norms(hidden))
    return common.decoder(keys, hidden, (layer,) * keys.layers())
