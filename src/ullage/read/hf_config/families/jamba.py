"""Jamba: Mamba-1 layers with an attention layer in each period, experts in every other layer.

Source: transformers@5.23.0:models/jamba/modeling_jamba.py, configuration_jamba.py.
"""

from __future__ import annotations

from ullage.read.hf_config import common
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import DenseFFN, FeedForward, Layer, Mamba, Model


def read(keys: Keys) -> Model:
    """Read a Jamba config."""
    hidden = keys.integer("hidden_size")
    keys.skip("use_mamba_kernels", "use_mambapy", "use_associative_scan", "num_logits_to_keep")
    attention, mamba = common.gqa(keys, hidden), _mamba(keys, hidden)
    dense, moe = _feed_forwards(keys)
    norms = common.norms(hidden, "input_layernorm", "pre_ff_layernorm")
    attention_at = keys.integer("attn_layer_period"), keys.integer("attn_layer_offset", low=0)
    expert_at = keys.integer("expert_layer_period"), keys.integer("expert_layer_offset", low=0)
    layers = common.by_kind(
        (
            (index % attention_at[0] == attention_at[1], index % expert_at[0] == expert_at[1])
            for index in range(keys.layers())
        ),
        lambda kind: Layer(mixers=(attention if kind[0] else mamba,), ffns=(moe if kind[1] else dense,), norms=norms),
    )
    return common.decoder(keys, hidden, layers, norm_name="model.final_layernorm")


def _mamba(keys: Keys, hidden: int) -> Mamba:
    """Return the state-space layer; a time-step rank of "auto" is hidden_size / 16, rounded up."""
    rank = keys.raw("mamba_dt_rank", "auto")
    return Mamba(
        inner_size=keys.integer("mamba_expand", 2) * hidden,
        state_size=keys.integer("mamba_d_state", 16),
        conv_kernel=keys.integer("mamba_d_conv", 4),
        dt_rank=-(-hidden // 16) if rank == "auto" else keys.integer("mamba_dt_rank"),
        conv_bias=keys.flag("mamba_conv_bias", True),
        proj_bias=keys.flag("mamba_proj_bias", False),
        inner_norms=True,
    )


def _feed_forwards(keys: Keys) -> tuple[FeedForward, FeedForward]:
    """Return the dense block and the one with experts, which is dense too where there is one expert."""
    dense = DenseFFN(intermediate_size=keys.integer("intermediate_size"), prefix="feed_forward")
    if keys.integer("num_experts") == 1:
        keys.skip("num_experts_per_tok")
        return dense, dense
    return dense, common.moe(keys, size="intermediate_size", prefix="feed_forward", router_name="router")
