"""Mamba, Mamba-2, Bamba and Granite 4 (granitemoehybrid).

Source: transformers@5.23.0:models/{mamba,mamba2,bamba,granitemoehybrid}/ modeling and configuration files; defaults of
missing keys are those of the config classes.
"""

from __future__ import annotations

from typing import Any

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.hf_config import common
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import DenseFFN, FeedForward, Layer, Mamba, Mamba2, Model, MoEFFN, Norm

#: Time steps and settings of the kernels.
_WITHOUT_EFFECT = (
    "chunk_size",
    "mamba_chunk_size",
    "num_logits_to_keep",
    "position_embedding_type",
    "rescale_prenorm_residual",
    "residual_in_fp32",
    "rms_norm",
    "time_step_floor",
    "time_step_init_scheme",
    "time_step_limit",
    "time_step_max",
    "time_step_min",
    "time_step_scale",
    "use_associative_scan",
    "use_mambapy",
    "z_loss_coefficient",
)
_BACKBONE: dict[str, Any] = {"embedding_name": "backbone.embeddings", "layers_name": "backbone.layers"}


# --------------------------------------------------------------------------------------------------- state space only


def read_1(keys: Keys) -> Model:
    """Read Mamba and Falcon-Mamba: one kind of layer, no attention, no feed-forward block.

    The head is tied unless the config says otherwise.
    """
    hidden = keys.integer("hidden_size")
    keys.skip("mixer_rms_eps")  # Falcon-Mamba's norms of B, C and the time step have no learned weights
    keys.skip(*_WITHOUT_EFFECT, "d_inner", "d_model", "n_layer", "ssm_cfg", "fused_add_norm", "pad_vocab_size_multiple")
    inner = keys.integer("expand", 2) * hidden
    if keys.integer("intermediate_size", inner) != inner:
        raise InputError(
            _("is not expand x hidden_size = {size}").format(size=inner), where=keys.at("intermediate_size")
        )
    mixer = Mamba(
        inner_size=inner,
        state_size=keys.integer("state_size", 16),
        conv_kernel=keys.integer("conv_kernel", 4),
        dt_rank=_dt_rank(keys, hidden),
        conv_bias=keys.flag("use_conv_bias", True),
        proj_bias=keys.flag("use_bias", False),
        prefix="mixer",
    )
    return _backbone(keys, hidden, mixer, tied_default=True)


def _dt_rank(keys: Keys, hidden: int) -> int:
    """Take the rank of the time step; "auto" is hidden_size / 16, rounded up."""
    auto = keys.raw("time_step_rank", "auto") == "auto"
    return -(-hidden // 16) if auto else int(keys.integer("time_step_rank"))


def read_2(keys: Keys) -> Model:
    """Read Mamba-2 (Codestral Mamba)."""
    hidden, heads, head_dim = keys.integer("hidden_size"), keys.integer("num_heads", 128), keys.integer("head_dim", 64)
    keys.skip(*_WITHOUT_EFFECT, "time_step_rank", "norm_before_gate", "intermediate_size")
    if keys.integer("expand", 2) * hidden != heads * head_dim:
        raise InputError(_("expand x hidden_size is not num_heads x head_dim"), where=keys.at("expand"))
    mixer = Mamba2(
        num_heads=heads,
        head_dim=head_dim,
        state_size=keys.integer("state_size", 128),
        num_groups=keys.integer("n_groups", 8),
        conv_kernel=keys.integer("conv_kernel", 4),
        conv_bias=keys.flag("use_conv_bias", True),
        proj_bias=keys.flag("use_bias", False),
    )
    return _backbone(keys, hidden, mixer, tied_default=False)


def _backbone(keys: Keys, hidden: int, mixer: Mamba | Mamba2, *, tied_default: bool) -> Model:
    layer = Layer(mixers=(mixer,), ffns=(), norms=(Norm(name="norm", size=hidden),))
    layers = (layer,) * keys.layers()
    return common.decoder(keys, hidden, layers, tied_default=tied_default, norm_name="backbone.norm_f", **_BACKBONE)


# ------------------------------------------------------------------------------------------------------ with attention


def read_bamba(keys: Keys) -> Model:
    """Read Bamba: ``attn_layer_indices`` names the attention layers, all others are Mamba-2."""
    hidden, bias = keys.integer("hidden_size"), keys.flag("attention_bias", False)
    keys.skip(*_WITHOUT_EFFECT)
    attention, mamba = common.gqa(keys, hidden, kv_default=8, qkv_bias=bias, o_bias=bias), _mamba2(keys, hidden)
    ffn = common.dense(keys, bias=keys.flag("mlp_bias", False), prefix="feed_forward")
    norms, full = common.norms(hidden, "input_layernorm", "pre_ff_layernorm"), keys.integers("attn_layer_indices", [])
    layers = common.by_kind(
        (index in full for index in range(keys.layers())),
        lambda is_full: Layer(mixers=(attention if is_full else mamba,), ffns=(ffn,), norms=norms),
    )
    return common.decoder(keys, hidden, layers, norm_name="model.final_layernorm")


def read_granite(keys: Keys) -> Model:
    """Read Granite 4: ``layer_types`` says which layers are Mamba-2; a shared block is beside the experts, if any."""
    hidden, bias, kinds = keys.integer("hidden_size"), keys.flag("attention_bias", False), ("attention", "mamba")
    keys.skip(*_WITHOUT_EFFECT)
    attention, mamba = common.gqa(keys, hidden, qkv_bias=bias, o_bias=bias), _mamba2(keys, hidden)
    ffn, norms = _granite_block(keys), common.pre_norms(hidden)
    words = {"full_attention": "attention", "linear_attention": "mamba"} | {kind: kind for kind in kinds}
    layers = common.by_kind(
        (words[kind] for kind in common.layer_types(keys, keys.layers(), words, lambda _index: "mamba")),
        lambda kind: Layer(mixers=(attention if kind == "attention" else mamba,), ffns=(ffn,), norms=norms),
    )
    return common.decoder(keys, hidden, layers)


def _granite_block(keys: Keys) -> FeedForward:
    """Return the experts with their shared block, or that block alone where there are no experts."""
    shared = keys.integer("shared_intermediate_size", 1024, low=0)
    if not keys.integer("num_local_experts", 8, low=0):
        keys.skip("num_experts_per_tok", "intermediate_size")
        return DenseFFN(
            intermediate_size=shared, prefix="shared_mlp", fused_gate_up="input_linear", down_name="output_linear"
        )
    moe: MoEFFN = common.moe(
        keys,
        size="intermediate_size",
        shared_intermediate_size=shared,
        fused_experts=True,
        prefix="block_sparse_moe",
        router_name="router.layer",
    )
    return moe


def _mamba2(keys: Keys, hidden: int) -> Mamba2:
    """Return the Mamba-2 layer of Bamba and Granite; a head size of "auto" is the inner size over the heads."""
    inner, heads = keys.integer("mamba_expand", 2) * hidden, keys.integer("mamba_n_heads", 128)
    head_dim = keys.raw("mamba_d_head", "auto")
    head_dim = inner // heads if head_dim == "auto" else keys.integer("mamba_d_head")
    if heads * head_dim != inner:
        raise InputError(_("mamba_n_heads x mamba_d_head is not mamba_expand x hidden_size"), where=keys.where)
    return Mamba2(
        num_heads=heads,
        head_dim=head_dim,
        state_size=keys.integer("mamba_d_state", 256),
        num_groups=keys.integer("mamba_n_groups", 1),
        conv_kernel=keys.integer("mamba_d_conv", 4),
        conv_bias=keys.flag("mamba_conv_bias", True),
        proj_bias=keys.flag("mamba_proj_bias", False),
        prefix="mamba",
    )
