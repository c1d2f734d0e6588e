"""Kimi Linear and the text part of Kimi K3: Kimi Delta Attention with latent attention in between.

Source: transformers@5.23.0:models/kimi_linear/modeling_kimi_linear.py; for K3 (full-rank gates, gated latent attention,
experts in a latent space, attention residuals): vllm@0.33.0:vllm/models/kimi_k3/nvidia/model.py, kda.py, mla.py.
"""

from __future__ import annotations

from dataclasses import replace

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.hf_config import common
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import (
    DenseFFN,
    ExtraTensor,
    FeedForward,
    KimiDeltaAttention,
    LatentAttention,
    Layer,
    Mixer,
    Model,
    Norm,
)

#: Routing, activation factors, and head sizes that the parts state themselves.
_WITHOUT_EFFECT = (
    "activation_situ_beta",
    "activation_situ_linear_beta",
    "moe_renormalize",
    "moe_router_activation_func",
    "num_expert_group",
    "use_grouped_topk",
    # generation settings that older transformers wrote into the config
    "cross_attention_hidden_size",
)


def read(keys: Keys) -> Model:
    """Read a Kimi Linear config."""
    hidden = keys.integer("hidden_size")
    keys.skip(*_WITHOUT_EFFECT)
    common.only(keys, tie_word_embeddings=False)  # the class never ties them
    has_residuals = keys.integer("attn_res_block_size", None) is not None
    latent, count = _latent_attention(keys, hidden), keys.layers()
    delta, linear_layers = _linear_layers(keys)
    dense, moe = _feed_forwards(keys, hidden)
    layers = common.by_kind(
        ((index + 1 in linear_layers, is_sparse) for index, is_sparse in enumerate(common.sparse_after(keys, count))),
        lambda kind: _layer(delta if kind[0] else latent, moe if kind[1] else dense, hidden, has_residuals),
    )
    if keys.integer("num_nextn_predict_layers", 0, low=0):
        raise InputError(_("MTP modules are not understood here"), where=keys.at("num_nextn_predict_layers"))
    norms, extras = _residual("model.output_attn", hidden) if has_residuals else ((), ())
    model = common.decoder(keys, hidden, layers, context=("max_position_embeddings", "model_max_length"), extras=extras)
    return replace(model, final_norms=model.final_norms + norms)


def read_bailing(keys: Keys) -> Model:
    """Read Ling 2.5: delta attention whose gates are single projections, every eighth layer latent and gated per head.

    Source: transformers@5.23.0:models/bailing_hybrid/modeling_bailing_hybrid.py, configuration_bailing_hybrid.py. The
    MTP module that the key announces is not in transformers and not understood here.
    """
    hidden, count, heads = keys.integer("hidden_size"), keys.layers(), keys.integer("num_attention_heads")
    keys.skip(*_WITHOUT_EFFECT, "kda_safe_gate", "kda_lower_bound", "mtp_loss_scaling_factor")
    common.only(keys, tie_word_embeddings=False)  # the class never ties them
    # the class takes the delta heads' size from head_dim, before it replaces that by the rotary size
    delta = KimiDeltaAttention(
        num_heads=keys.integer("linear_num_heads", heads),
        head_dim=keys.integer("linear_head_dim", keys.integer("head_dim", 128)),
        conv_kernel=keys.integer("linear_conv_kernel_dim", keys.integer("short_conv_kernel_size", 4)),
        gate_rank=None,
        output_gate_rank=None,
    )
    gate = ExtraTensor(name="g_proj.weight", shape=(heads, hidden), split="out")
    latent = common.mla(keys, q_lora_rank=keys.integer("q_lora_rank", None), extras=(gate,))
    group = keys.integer("layer_group_size", 8)
    kinds = ("full_attention", "linear_attention")
    named = common.layer_types(keys, count, kinds, lambda index: kinds[bool((index + 1) % group)])
    size = keys.integer("moe_intermediate_size")
    shared = size * keys.integer("num_shared_experts", 1, low=0)
    moe = common.moe(
        keys,
        top_k=("num_experts_per_token", "num_experts_per_tok"),
        shared_intermediate_size=shared,
        correction_bias=True,
    )
    dense = DenseFFN(intermediate_size=keys.integer("intermediate_size"))
    layers = common.by_kind(
        zip(named, common.sparse_after(keys, count, 2), strict=True),
        lambda kind: _layer(delta if kind[0] == kinds[1] else latent, moe if kind[1] else dense, hidden, False),
    )
    context = ("max_position_embeddings", "model_max_length")
    model = common.decoder(keys, hidden, layers, context=context)
    return _without_mtp(keys, model)


def _without_mtp(keys: Keys, model: Model) -> Model:
    """Say that announced MTP modules are left out."""
    if not keys.integer("num_nextn_predict_layers", 0, low=0):
        return model
    said = _("num_nextn_predict_layers: the MTP modules are not understood here and are left out of every figure")
    return replace(model, assumed=(*model.assumed, said))


def _named_layers(keys: Keys) -> tuple[KimiDeltaAttention, frozenset[int]]:
    """Read the keys of newer files, which transformers writes in place of ``linear_attn_config``."""
    head_dim, kinds = keys.integer("linear_head_dim"), ("full_attention", "linear_attention")
    named = common.layer_types(keys, keys.layers(), kinds, lambda _index: kinds[0])
    delta = KimiDeltaAttention(
        num_heads=keys.integer("linear_num_heads"),
        head_dim=head_dim,
        conv_kernel=keys.integer("linear_conv_kernel_dim"),
        gate_rank=head_dim,
        output_gate_rank=head_dim,
    )
    return delta, frozenset(index + 1 for index, kind in enumerate(named) if kind == kinds[1])


def _linear_layers(keys: Keys) -> tuple[KimiDeltaAttention, frozenset[int]]:
    """Return the delta attention and the numbers, from 1, of the layers that have it."""
    part = keys.part("linear_attn_config")
    if part is None and "layer_types" in keys:
        return _named_layers(keys)
    if part is None:
        raise InputError(_("the key is missing"), where=keys.at("linear_attn_config"))
    part.skip("gate_lower_bound")
    delta_layers, full_layers = part.integers("kda_layers"), part.integers("full_attn_layers")
    if sorted(delta_layers + full_layers) != list(range(1, keys.layers() + 1)):
        raise InputError(
            _("kda_layers and full_attn_layers do not name each layer once, from 1"),
            where=keys.at("linear_attn_config"),
        )
    head_dim = part.integer("head_dim")
    delta = KimiDeltaAttention(
        num_heads=part.integer("num_heads"),
        head_dim=head_dim,
        conv_kernel=part.integer("short_conv_kernel_size"),
        gate_rank=head_dim,
        output_gate_rank=None if part.flag("use_full_rank_gate", False) else head_dim,
    )
    return delta, frozenset(delta_layers)


def _latent_attention(keys: Keys, hidden: int) -> LatentAttention:
    heads, v_head_dim = keys.integer("num_attention_heads"), keys.integer("v_head_dim")
    gate: tuple[ExtraTensor, ...] = ()
    if keys.flag("mla_use_output_gate", False):
        gate = (ExtraTensor(name="g_proj.weight", shape=(heads * v_head_dim, hidden), split="out"),)
    rope = not keys.flag("mla_use_nope", False)
    return common.mla(keys, q_lora_rank=keys.integer("q_lora_rank", None), rope=rope, extras=gate)


def _feed_forwards(keys: Keys, hidden: int) -> tuple[FeedForward, FeedForward]:
    """Return the dense block and the experts, in the latent space of ``routed_expert_hidden_size`` if there is one."""
    size = keys.integer("moe_intermediate_size")
    latent = keys.integer("routed_expert_hidden_size", None)
    extras: tuple[ExtraTensor, ...] = ()
    if keys.flag("latent_moe_use_norm", False) and latent:
        extras = (ExtraTensor(name="routed_expert_norm.weight", shape=(latent,)),)
    moe = common.moe(
        keys,
        top_k=("num_experts_per_token", "num_experts_per_tok"),
        shared_intermediate_size=size * keys.integer("num_shared_experts", 0, low=0),
        correction_bias=True,
        latent_size=latent,
        prefix="block_sparse_moe",
        extras=extras,
    )
    return DenseFFN(intermediate_size=keys.integer("intermediate_size")), moe


def _residual(name: str, hidden: int) -> tuple[tuple[Norm, ...], tuple[ExtraTensor, ...]]:
    """Return the norm and the projection to one weight by which a block attends to the residuals before it."""
    return (
        (Norm(name=f"{name}_res_norm", size=hidden),),
        (ExtraTensor(name=f"{name}_res_proj.weight", shape=(1, hidden), linear=False),),
    )


def _layer(mixer: Mixer, ffn: FeedForward, hidden: int, has_residuals: bool) -> Layer:
    norms = common.pre_norms(hidden)
    extras: tuple[ExtraTensor, ...] = ()
    if has_residuals:
        for name in ("self_attention", "mlp"):
            more_norms, more_extras = _residual(name, hidden)
            norms, extras = norms + more_norms, extras + more_extras
    return Layer(mixers=(mixer,), ffns=(ffn,), norms=norms, extras=extras)
