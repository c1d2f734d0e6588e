"""Mixtures of experts of 2025 and 2026 with grouped-query attention, and LongCat with its latent one.

Source: transformers@5.23.0:models/{afmoe,beam,cohere2_moe,exaone_moe,flex_olmo,flint,granitemoeshared,granitemoe_swa,
hunyuan_v1_moe,hy_v3,kolibri1,laguna,longcat_flash,mellum,solar_open}/ modeling and configuration files; defaults of
missing keys are those of the config classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.hf_config import common
from ullage.read.hf_config.families.glm import SANDWICH as GLM_SANDWICH
from ullage.read.hf_config.families.olmo import POST_NORMS
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import Attention, DenseFFN, ExtraTensor, FeedForward, Layer, Mixer, Model, MoEFFN, Norm

Windows = Sequence["int | None"]


def _stack(
    keys: Keys, mixers: Iterable[Mixer], ffns: Iterable[FeedForward], norms: tuple[Norm, ...] = (), **frame: Any
) -> Model:
    """Build a decoder of layers with one mixer and one block each."""
    hidden = keys.integer("hidden_size")
    norms = norms or common.pre_norms(hidden)
    layers = common.by_kind(
        zip(mixers, ffns, strict=True), lambda kind: Layer(mixers=(kind[0],), ffns=(kind[1],), norms=norms)
    )
    return common.decoder(keys, hidden, layers, **frame)


def _attentions(keys: Keys, windows: Windows, *, gate: str = "", **settings: Any) -> list[Mixer]:
    """Return grouped-query attention for each window; ``gate`` names a projection as wide as the queries."""
    hidden = keys.integer("hidden_size")
    made: dict[int | None, Mixer] = {}
    for window in set(windows):
        attention = common.gqa(keys, hidden, window=window, **settings)
        rows = attention.num_heads * attention.head_dim
        extra = (ExtraTensor(name=f"{gate}.weight", shape=(rows, hidden), split="out"),) if gate else ()
        made[window] = replace(attention, extras=attention.extras + extra)
    return [made[window] for window in windows]


def _blocks(sparse: FeedForward, dense: FeedForward | None, pattern: Sequence[bool]) -> list[FeedForward]:
    """Return each layer's block; ``dense`` may be missing where no layer needs it."""
    return [sparse if has_experts or dense is None else dense for has_experts in pattern]


def _shared(keys: Keys, key: str, default: int) -> int:
    """Return the width of all shared experts together."""
    return int(keys.integer("moe_intermediate_size")) * int(keys.integer(key, default, low=0))


def _bias(keys: Keys) -> dict[str, Any]:
    bias = keys.flag("attention_bias", False)
    return {"qkv_bias": bias, "o_bias": bias}


# ----------------------------------------------------------------------------------------------------- shared experts


def read_afmoe(keys: Keys) -> Model:
    """Read AFMoE (Arcee Trinity): gated attention, norms around both blocks; every fourth layer does not slide.

    ``expert_bias``, the correction bias, is a parameter of its own module.
    """
    hidden, num_layers = keys.integer("hidden_size"), keys.layers()
    keys.skip("route_scale", "route_norm", "mup_enabled", "score_func", "load_balance_coeff", "use_grouped_mm")
    keys.skip("num_expert_groups", "num_limited_groups")
    period, window = keys.integer("global_attn_every_n_layers", 4), keys.integer("sliding_window", 1024)
    kinds = common.windows(keys, num_layers, window, common.every(period))
    mixers = _attentions(keys, kinds, gate="gate_proj", head_dim_default=128, qk_norm="head", **_bias(keys))
    bias = ExtraTensor(name="expert_bias", shape=(keys.first_integer("num_experts"),), dtype="float32", linear=False)
    shared = _shared(keys, "num_shared_experts", 2)
    sparse = common.moe(keys, shared_intermediate_size=shared, router_name="router.gate", extras=(bias,))
    first = keys.integer("num_dense_layers", 1, low=0)
    names = ("input_layernorm", "post_attention_layernorm", "pre_mlp_layernorm", "post_mlp_layernorm")
    ffns = _blocks(sparse, common.dense(keys), [index >= first for index in range(num_layers)])
    return _stack(keys, mixers, ffns, common.norms(hidden, *names))


def read_exaone_moe(keys: Keys) -> Model:
    """Read K-EXAONE: EXAONE 4's windows behind Llama's norms, and DeepSeek-V3's experts."""
    num_layers, window = keys.layers(), keys.nullable_integer("sliding_window", 4096)
    period = keys.integer("sliding_window_pattern", 4, low=0) if window else 0
    slides = common.every(period) if period else (lambda index: False)
    mixers = _attentions(keys, common.windows(keys, num_layers, window, slides), qk_norm="head")
    shared = _shared(keys, "num_shared_experts", 1)
    sparse = common.moe(keys, shared_intermediate_size=shared, correction_bias=True)
    return _stack(keys, mixers, _blocks(sparse, common.dense(keys), common.sparse_after(keys, num_layers, 1)))


def read_hy_v3(keys: Keys) -> Model:
    """Read Hunyuan 3 (HY-V3): norms of queries and keys, one dense layer first, a correction bias beside the router.

    The module that predicts further tokens is a layer of experts with DeepSeek-V3's projection and norms, whose last is
    called final_layernorm; it holds neither an embedding nor a head.
    Source: vllm@0.33.0:vllm/model_executor/models/hy_v3_mtp.py:HYV3MultiTokenPredictorLayer.
    """
    common.only(keys, mlp_bias=False, qk_norm=True)
    keys.skip("router_scaling_factor", "enable_moe_fp32_combine", "moe_router_use_sigmoid", "route_norm")
    keys.skip("expert_hidden_dim")  # moe_intermediate_size by its older name
    num_layers, width = keys.layers(), keys.integer("moe_intermediate_size")
    shared = width * keys.integer("num_shared_experts", 1)
    head: dict[str, Any] = {"kv_default": 8, "head_dim_default": 128, "qk_norm": "head"}
    mixers = _attentions(keys, [None] * num_layers, **head, **_bias(keys))
    sparse = common.moe(
        keys,
        shared_intermediate_size=shared,
        correction_bias=True,
        correction_bias_name="e_score_correction_bias",
    )
    hidden = keys.integer("hidden_size")
    model = _stack(keys, mixers, _blocks(sparse, common.dense(keys), common.sparse_after(keys, num_layers, 1)))
    num_mtp = keys.integer("num_nextn_predict_layers", 0, low=0, high=64)
    module = common.mtp_module(Layer(mixers=(mixers[0],), ffns=(sparse,), norms=common.pre_norms(hidden)), hidden)
    norms = tuple(Norm(name=name, size=hidden) for name in ("enorm", "hnorm", "final_layernorm"))
    module = replace(module, norms=norms, stores_embedding=False, stores_head=False)
    return replace(model, mtp=(module,) * num_mtp)


def read_solar_open(keys: Keys) -> Model:
    """Read Solar Open: experts in every layer, biases of q, k and v alone."""
    num_layers, bias = keys.layers(), keys.flag("attention_bias", False)
    common.only(keys, first_k_dense_replace=0, use_qk_norm=False)
    keys.skip("intermediate_size")
    mixers = _attentions(keys, [None] * num_layers, kv_default=8, head_dim_default=128, qkv_bias=bias)
    shared = _shared(keys, "n_shared_experts", 1)
    sparse = common.moe(keys, shared_intermediate_size=shared, correction_bias=True)
    return _stack(keys, mixers, [sparse] * num_layers)


def read_kolibri(keys: Keys) -> Model:
    """Read Kolibri 1: experts in every layer, norms around both blocks; every fifth layer does not slide."""
    hidden, num_layers, window = keys.integer("hidden_size"), keys.layers(), keys.integer("sliding_window", 513)
    kinds = common.windows(keys, num_layers, window, common.every(5))
    mixers = _attentions(keys, kinds, kv_default=4, head_dim_default=128, qk_norm="head")
    shared = keys.integer("shared_expert_intermediate_size", 512, low=0)
    sparse = common.moe(keys, shared_intermediate_size=shared, correction_bias=True)
    return _stack(keys, mixers, [sparse] * num_layers, common.norms(hidden, *GLM_SANDWICH))


def read_flint(keys: Keys) -> Model:
    """Read Flint: Qwen3's layers with sinks; the first two, every fourth and the last have full attention."""
    num_layers, window = keys.layers(), keys.integer("sliding_window", 513)
    kinds = common.windows(
        keys, num_layers, window, lambda index: index > 1 and index % 4 != 1 and index != num_layers - 1
    )
    head: dict[str, Any] = {"kv_default": 4, "head_dim_default": 128, "qk_norm": "head", "sinks": True}
    mixers = _attentions(keys, kinds, **head, **_bias(keys))
    dense_only, step = keys.integers("mlp_only_layers", [0, 1]), keys.integer("decoder_sparse_step", 1)
    shared = keys.integer("shared_expert_intermediate_size", 1024)
    sparse = common.moe(keys, shared_intermediate_size=shared, shared_name="shared_expert")
    pattern = [index not in dense_only and (index + 1) % step == 0 for index in range(num_layers)]
    return _stack(keys, mixers, _blocks(sparse, common.dense(keys), pattern))


def read_laguna(keys: Keys) -> Model:
    """Read Laguna: heads may differ from layer to layer, a gate per head or per value, one dense layer first.

    The correction bias is a parameter of the router.
    """
    hidden, num_layers, bias = keys.integer("hidden_size"), keys.layers(), _bias(keys)
    keys.skip("moe_routed_scaling_factor", "moe_apply_router_weight_on_input", "moe_router_logit_softcapping")
    window = keys.integer("sliding_window", 512)
    kinds = common.windows(keys, num_layers, window, lambda index: False)
    heads = keys.integers(
        "num_attention_heads_per_layer", [keys.integer("num_attention_heads")] * num_layers, length=num_layers, low=1
    )
    per_element = keys.raw("gating", True) == "per-element"
    if not per_element and keys.raw("gating") != "per-head":
        common.only(keys, gating=True)
    kv_heads, dim = keys.integer("num_key_value_heads", 8), keys.integer("head_dim", 128)
    if any(count % kv_heads for count in heads):
        raise InputError(
            _("has numbers of heads that {kv} KV heads do not divide").format(kv=kv_heads),
            where=keys.at("num_attention_heads_per_layer"),
        )
    made = {}
    for kind in set(zip(kinds, heads, strict=True)):
        rows = kind[1] * (dim if per_element else 1)
        gate = ExtraTensor(name="g_proj.weight", shape=(rows, hidden), split="out")
        made[kind] = Attention(
            num_heads=kind[1],
            num_kv_heads=kv_heads,
            head_dim=dim,
            q_bias=bias["qkv_bias"],
            k_bias=bias["qkv_bias"],
            v_bias=bias["qkv_bias"],
            o_bias=bias["o_bias"],
            qk_norm="head",
            window=kind[0],
            extras=(gate,),
        )
    ffns = _blocks(_laguna_experts(keys), common.dense(keys), common.sparse_after(keys, num_layers, 1))
    return _stack(keys, [made[kind] for kind in zip(kinds, heads, strict=True)], ffns)


def _laguna_experts(keys: Keys) -> MoEFFN:
    name = "gate.e_score_correction_bias"
    correction = ExtraTensor(name=name, shape=(keys.first_integer("num_experts"),), dtype="float32", linear=False)
    shared = keys.integer("shared_expert_intermediate_size", 512)
    return common.moe(keys, shared_intermediate_size=shared, extras=(correction,))


def read_hunyuan_moe(keys: Keys) -> Model:
    """Read Hunyuan A13B: experts and one shared block as wide as an expert, in every layer.

    Numbers that older files give layer by layer must be the same in all layers.
    """
    num_layers = keys.layers()
    for name in ("moe_topk", "num_shared_expert", "moe_intermediate_size"):
        values = keys.raw(name)
        if isinstance(values, list) and values and len(set(map(str, values))) == 1:
            keys.values = {**keys.values, name: values[0]}
    keys.skip("cla_share_factor", "attention_head_dim", "use_mixed_mlp_moe", "org_vocab_size", "class_num")
    keys.skip("moe_drop_tokens", "moe_random_routing_dropped_token", "mask_init_id")
    keys.skip("pool_type", "position_embedding_xdrope", "sep_token_id", "im_end_id", "im_newline_id", "im_start_id")
    common.only(keys, num_shared_expert=1, mlp_bias=False, use_cla=False, use_qk_norm=True, moe_layer_num_skipped=0)
    width = keys.integer("intermediate_size")
    common.only(keys, moe_intermediate_size=width)
    norm = {"qk_norm": "head", "q_norm_name": "query_layernorm", "k_norm_name": "key_layernorm"}
    mixers = _attentions(keys, [None] * num_layers, **norm, **_bias(keys))
    sparse = common.moe(
        keys,
        top_k=("moe_topk", "num_experts_per_tok"),
        size="intermediate_size",
        shared_intermediate_size=width,
        shared_name="shared_mlp",
        router_name="gate.wg",
    )
    return _stack(keys, mixers, [sparse] * num_layers)


def read_granite_moe_shared(keys: Keys) -> Model:
    """Read Granite 3 with a shared expert."""
    return _granite_moe(keys, [None] * keys.layers())


def read_granite_moe_swa(keys: Keys) -> Model:
    """Read Granite with experts, sinks and windows; every fourth layer, the first among them, has full attention."""
    keys.skip("layer_rope_theta")
    window = keys.integer("sliding_window", 128)
    kinds = common.windows(keys, keys.layers(), window, lambda index: index % 4 > 0)
    return _granite_moe(keys, kinds, sinks=True)


def _granite_moe(keys: Keys, windows: Windows, **attention: Any) -> Model:
    mixers = _attentions(keys, windows, **_bias(keys), **attention)
    sparse = common.moe(
        keys, size="intermediate_size", prefix="block_sparse_moe", router_name="router.layer", fused_experts=True
    )
    hidden, shared = keys.integer("hidden_size"), keys.integer("shared_intermediate_size", 0, low=0)
    beside = DenseFFN(
        intermediate_size=shared, prefix="shared_mlp", fused_gate_up="input_linear", down_name="output_linear"
    )
    ffns = (sparse, beside) if shared else (sparse,)
    layers = common.by_kind(mixers, lambda mixer: Layer(mixers=(mixer,), ffns=ffns, norms=common.pre_norms(hidden)))
    return common.decoder(keys, hidden, layers)


# -------------------------------------------------------------------------------------------------- routed experts only


def read_beam(keys: Keys) -> Model:
    """Read Beam: gated attention with a bias per head; every sixth layer and the last have full attention."""
    hidden, num_layers, window = keys.integer("hidden_size"), keys.layers(), keys.integer("sliding_window", 512)
    keys.skip("default_theta", "full_attention_temperature_config")
    kinds = common.windows(keys, num_layers, window, lambda index: bool((index + 1) % 6) and index != num_layers - 1)
    bias = ExtraTensor(name="gate_bias", shape=(keys.integer("num_attention_heads"),), split="out", linear=False)
    head: dict[str, Any] = {"kv_default": 8, "head_dim_default": 128, "qk_norm": "head", "extras": (bias,)}
    mixers = _attentions(keys, kinds, gate="gate_proj", **head, **_bias(keys))
    sparse, dense = common.moe(keys, correction_bias=True), common.dense(keys)
    names = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    ffns = _blocks(sparse, dense, common.sparse_after(keys, num_layers, 3))
    return _stack(keys, mixers, ffns, common.norms(hidden, *names))


def read_mellum(keys: Keys) -> Model:
    """Read Mellum 2: Qwen3's experts; sliding and dense layers as the lists say."""
    num_layers, window = keys.layers(), keys.integer("sliding_window", 1024)
    common.only(keys, num_nextn_predict_layers=0, num_mtp_layers=0)
    keys.skip("mtp_layer_types", "mtp_mlp_layer_types")
    kinds = common.windows(keys, num_layers, window, lambda index: False)
    head: dict[str, Any] = {"kv_default": 4, "head_dim_default": 128, "qk_norm": "head"}
    mixers = _attentions(keys, kinds, **head, **_bias(keys))
    sparse, dense = common.moe(keys), common.dense(keys)
    return _stack(keys, mixers, _blocks(sparse, dense, common.sparse_after(keys, num_layers)))


def read_flex_olmo(keys: Keys) -> Model:
    """Read FlexOlmo: OLMo 2's layers with experts."""
    mixers = _attentions(keys, [None] * keys.layers(), qk_norm="full", **_bias(keys))
    sparse = common.moe(keys, size="intermediate_size")
    hidden = keys.integer("hidden_size")
    return _stack(keys, mixers, [sparse] * keys.layers(), common.norms(hidden, *POST_NORMS))


def read_cohere2_moe(keys: Keys) -> Model:
    """Read Command A+ with experts: parallel blocks behind one layer norm; dense layers first have a width apart.

    Shared experts, if any, have a routed expert's width each.
    """
    hidden, num_layers, window = keys.integer("hidden_size"), keys.layers(), keys.integer("sliding_window", 4096)
    keys.skip("shared_expert_combination_strategy", "expert_selection_fn")
    first = keys.integer("first_k_dense_replace", 0, low=0)
    before = common.every(keys.integer("prefix_dense_sliding_window_pattern", 1))
    after = common.every(keys.integer("sliding_window_pattern", 4))
    kinds = common.windows(
        keys, num_layers, window, lambda index: before(index) if index < first else after(index - first)
    )
    width = keys.integer("intermediate_size")
    shared = width * keys.integer("num_shared_experts", 0, low=0)
    sparse = common.moe(keys, size="intermediate_size", shared_intermediate_size=shared)
    dense = DenseFFN(intermediate_size=keys.integer("prefix_dense_intermediate_size", width))
    mixers = _attentions(keys, kinds, head_dim_default=128, **_bias(keys))
    norms = common.norms(hidden, "input_layernorm", kind="layer")
    ffns = _blocks(sparse, dense, common.sparse_after(keys, num_layers))
    return _stack(keys, mixers, ffns, norms, tied_default=True, norm_kind="layer")


def read_longcat(keys: Keys) -> Model:
    """Read LongCat-Flash: two latent attentions and two dense blocks in each layer, and experts across them.

    The router chooses among ``zero_expert_num`` further experts that have no weights and return their input.
    transformers gives those rows of the first projection all the same, the published checkpoints do not.
    """
    hidden, zero = keys.integer("hidden_size"), keys.integer("zero_expert_num", 0, low=0)
    keys.skip("zero_expert_type", "mla_scale_q_lora", "mla_scale_kv_lora", "attention_method", "emb_neighbor_num")
    common.only(keys, router_bias=False, num_nextn_predict_layers=0)
    attention = common.mla(keys, q_lora_rank=keys.nullable_integer("q_lora_rank", 1536))
    common.only(keys, qk_head_dim=attention.qk_nope_head_dim + attention.qk_rope_head_dim)
    experts = keys.integer("n_routed_experts")
    router = (ExtraTensor(name="router.classifier.zero.weight", shape=(zero, hidden)),) if zero else ()
    name = "router.e_score_correction_bias"
    sparse: MoEFFN = common.moe(
        keys,
        num_experts=("n_routed_experts",),
        top_k=("moe_topk",),
        size="expert_ffn_hidden_size",
        router_name="router.classifier",
        extras=(*router, ExtraTensor(name=name, shape=(experts + zero,), dtype="float32", buffer=True)),
    )
    dense = common.dense(keys, size="ffn_hidden_size")
    both = (0, 1)
    norms = tuple(f"{name}.{step}" for step in both for name in ("input_layernorm", "post_attention_layernorm"))
    layer = Layer(
        mixers=tuple(replace(attention, prefix=f"self_attn.{step}") for step in both),
        ffns=(sparse, *(replace(dense, prefix=f"mlps.{step}") for step in both)),
        norms=common.norms(hidden, *norms),
    )
    num_layers = keys.first_integer("num_layers", "num_hidden_layers", high=10_000)
    return common.decoder(keys, hidden, (layer,) * num_layers)
