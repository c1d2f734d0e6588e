"""Falcon-H1: attention and Mamba-2 side by side in every layer.

Source: transformers@5.23.0:models/falcon_h1/modeling_falcon_h1.py, configuration_falcon_h1.py.
"""

from __future__ import annotations

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.hf_config import common
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import DenseFFN, Layer, Mamba2, Model

#: Factors on activations and settings of the kernels.
_WITHOUT_EFFECT = (
    "attention_in_multiplier",
    "attention_out_multiplier",
    "attn_layer_indices",
    "embedding_multiplier",
    "key_multiplier",
    "lm_head_multiplier",
    "mamba_chunk_size",
    "mamba_norm_before_gate",
    "mamba_use_mlp",
    "mlp_multipliers",
    "num_logits_to_keep",
    "ssm_in_multiplier",
    "ssm_multipliers",
    "ssm_out_multiplier",
    "time_step_floor",
    "time_step_limit",
    "time_step_max",
    "time_step_min",
)


def read(keys: Keys) -> Model:
    """Read a Falcon-H1 config."""
    hidden = keys.integer("hidden_size")
    keys.skip(*_WITHOUT_EFFECT)
    bias = keys.flag("attention_bias", False)
    attention = common.gqa(keys, hidden, qkv_bias=bias, o_bias=bias)
    ffn = DenseFFN(
        intermediate_size=keys.integer("intermediate_size"),
        bias=keys.flag("mlp_bias", False),
        prefix="feed_forward",
    )
    norms = common.norms(hidden, "input_layernorm", "pre_ff_layernorm")
    layer = Layer(mixers=(_mamba(keys), attention), ffns=(ffn,), norms=norms)
    return common.decoder(keys, hidden, (layer,) * keys.layers(), norm_name="model.final_layernorm")


def _mamba(keys: Keys) -> Mamba2:
    """Return the Mamba-2 part; its inner size is heads times head size, which ``mamba_d_ssm`` must agree with."""
    heads, head_dim = keys.integer("mamba_n_heads"), keys.integer("mamba_d_head")
    keys.skip("mamba_expand")
    if keys.integer("mamba_d_ssm", heads * head_dim) != heads * head_dim:
        raise InputError(
            _("is not mamba_n_heads x mamba_d_head = {size}").format(size=heads * head_dim),
            where=keys.at("mamba_d_ssm"),
        )
    if keys.flag("mamba_proj_bias", False) != keys.flag("projectors_bias", False):
        raise InputError(
            _("mamba_proj_bias and projectors_bias differ, which is not understood"), where=keys.at("projectors_bias")
        )
    return Mamba2(
        num_heads=heads,
        head_dim=head_dim,
        state_size=keys.integer("mamba_d_state"),
        num_groups=keys.integer("mamba_n_groups", 1),
        conv_kernel=keys.integer("mamba_d_conv", 4),
        conv_bias=keys.flag("mamba_conv_bias", True),
        proj_bias=keys.flag("projectors_bias", False),
        gated_norm=keys.flag("mamba_rms_norm", False),
        prefix="mamba",
    )
