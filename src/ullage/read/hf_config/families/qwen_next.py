"""Qwen3-Next and the text part of Qwen3.5: three gated delta nets to one gated attention.

Source: transformers@5.23.0:models/qwen3_next/, models/qwen3_5/, models/qwen3_5_moe/; the MTP modules, which those leave
out: vllm@0.33.0:vllm/model_executor/models/qwen3_next_mtp.py, qwen3_5_mtp.py (checkpoint names ``mtp.*``).
"""

from __future__ import annotations

from dataclasses import replace

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.hf_config import common
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import (
    Attention,
    DenseFFN,
    ExtraTensor,
    FeedForward,
    GatedDeltaNet,
    Layer,
    Mixer,
    Model,
    MtpModule,
    Norm,
)


def read_next(keys: Keys) -> Model:
    """Read Qwen3-Next. Its config does not name the one MTP module that the published checkpoint holds.

    Source: vllm@0.33.0:vllm/model_executor/models/qwen3_next_mtp.py:Qwen3NextMultiTokenPredictor (one by default).
    """
    declared = keys.integer("num_nextn_predict_layers", None, low=0, high=64)
    model = _read(keys, fused=True, num_mtp=1 if declared is None else declared)
    if declared is not None:
        return model
    note = _("the config names no MTP module; the one that the published Qwen3-Next checkpoints hold is counted apart")
    return replace(model, assumed=(*model.assumed, note))


def read_3_5_text(keys: Keys) -> Model:
    """Read the text part of Qwen3.5, dense or with experts."""
    return _read(keys, fused=False, num_mtp=keys.integer("mtp_num_hidden_layers", 0, low=0, high=64))


def _read(keys: Keys, *, fused: bool, num_mtp: int) -> Model:
    hidden = keys.integer("hidden_size")
    keys.skip("norm_topk_prob", "use_sliding_window", "output_gate_type")
    attention = _attention(keys, hidden)
    mixers: dict[str, Mixer] = {"full_attention": attention, "linear_attention": _delta_net(keys, fused)}
    kinds = _layer_kinds(keys)
    ffns = _feed_forwards(keys, len(kinds))
    layers = common.by_kind(
        zip(kinds, ffns, strict=True),
        lambda kind: Layer(mixers=(mixers[kind[0]],), ffns=(kind[1],), norms=common.pre_norms(hidden)),
    )
    if keys.flag("mtp_use_dedicated_embeddings", False):
        raise InputError(
            _("dedicated MTP embeddings are not understood"), where=keys.at("mtp_use_dedicated_embeddings")
        )
    return common.decoder(keys, hidden, layers, mtp=_mtp(num_mtp, attention, ffns[-1], hidden))


def _attention(keys: Keys, hidden: int) -> Attention:
    bias, gate = keys.flag("attention_bias", False), keys.flag("attn_output_gate", True)
    return common.gqa(keys, hidden, qkv_bias=bias, o_bias=bias, qk_norm="head", output_gate=gate)


def _delta_net(keys: Keys, fused: bool) -> GatedDeltaNet:
    return GatedDeltaNet(
        num_k_heads=keys.integer("linear_num_key_heads"),
        num_v_heads=keys.integer("linear_num_value_heads"),
        k_head_dim=keys.integer("linear_key_head_dim"),
        v_head_dim=keys.integer("linear_value_head_dim"),
        conv_kernel=keys.integer("linear_conv_kernel_dim"),
        fused=fused,
        state_dtype=keys.text("mamba_ssm_dtype", None),
    )


def _layer_kinds(keys: Keys) -> list[str]:
    """Return the kind of each layer: ``layer_types``, or full attention every ``full_attention_interval`` layers."""
    interval = keys.integer("full_attention_interval", 4)
    kinds = ("full_attention", "linear_attention")
    return common.layer_types(keys, keys.layers(), kinds, lambda index: kinds[bool((index + 1) % interval)])


def _feed_forwards(keys: Keys, count: int) -> list[FeedForward]:
    """Return the block of each layer: experts every ``decoder_sparse_step`` layers but in ``mlp_only_layers``."""
    dense_layers, step = keys.integers("mlp_only_layers", []), keys.integer("decoder_sparse_step", 1)
    dense_size = keys.integer("intermediate_size", None)
    experts = keys.integer("num_experts", 0, low=0)
    if not experts:
        return [DenseFFN(intermediate_size=keys.integer("intermediate_size"))] * count
    moe = common.moe(
        keys,
        shared_intermediate_size=keys.integer("shared_expert_intermediate_size"),
        shared_gate=True,
        shared_name="shared_expert",
    )
    dense = DenseFFN(intermediate_size=dense_size) if dense_size else None
    blocks: list[FeedForward] = []
    for index in range(count):
        is_sparse = index not in dense_layers and (index + 1) % step == 0
        if not is_sparse and dense is None:
            raise InputError(_("the key is missing"), where=keys.at("intermediate_size"))
        blocks.append(moe if is_sparse or dense is None else dense)
    return blocks


def _mtp(count: int, attention: Attention, ffn: FeedForward, hidden: int) -> tuple[MtpModule, ...]:
    """Return the MTP modules: full-attention layers; the first carries the norms and the projection of all."""
    modules = []
    for index in range(count):
        at = f"layers.{index}."
        layer = Layer(
            mixers=(replace(attention, prefix=at + attention.prefix),),
            ffns=(replace(ffn, prefix=at + ffn.prefix),),
            norms=tuple(replace(norm, name=at + norm.name) for norm in common.pre_norms(hidden)),
        )
        names = () if index else ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
        modules.append(
            MtpModule(
                layer=layer,
                norms=tuple(Norm(name=name, size=hidden) for name in names),
                extras=() if index else (ExtraTensor(name="fc.weight", shape=(hidden, 2 * hidden)),),
                prefix="mtp.",
            )
        )
    return tuple(modules)
