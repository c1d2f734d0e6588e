"""DeciLM (Llama-Nemotron): a Llama whose layers were searched one by one; some have no attention or no block.

Source: vllm@0.33.0:model_executor/models/nemotron_nas.py; modeling_decilm.py beside the checkpoints.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.hf_config import common
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import Attention, DenseFFN, ExtraTensor, Layer, Model


def read(keys: Keys) -> Model:
    """Read the per-layer ``block_configs``: KV heads by ``n_heads_in_group``, width by ``ffn_mult``."""
    hidden, num_layers, heads = keys.integer("hidden_size"), keys.layers(), keys.integer("num_attention_heads")
    bias, mlp_bias = keys.flag("attention_bias", False), keys.flag("mlp_bias", False)
    blocks = [_Block(part, hidden, heads) for part in _parts(keys, num_layers)]

    def make(kind: tuple[Any, ...]) -> Layer:
        kv_heads, window, width, linears = kind
        attention = Attention(
            num_heads=heads,
            num_kv_heads=kv_heads or heads,
            head_dim=keys.integer("head_dim", hidden // heads),
            q_bias=bias,
            k_bias=bias,
            v_bias=bias,
            o_bias=bias,
            window=window,
        )
        linear = tuple(ExtraTensor(name=f"{name}.weight", shape=(hidden, hidden)) for name in linears)
        before, after = common.pre_norms(hidden)
        has_mixer, has_block = (
            bool(kv_heads) or "self_attn.linear_attn" in linears,
            width or "mlp.linear_mlp" in linears,
        )
        return Layer(
            mixers=(attention,) if kv_heads else (),
            ffns=(DenseFFN(intermediate_size=width, bias=mlp_bias),) if width else (),
            norms=((before,) if has_mixer else ()) + ((after,) if has_block else ()),
            extras=linear,
        )

    keys.skip("intermediate_size", "num_key_value_heads")
    return common.decoder(keys, hidden, common.by_kind([block.kind for block in blocks], make))


def _parts(keys: Keys, num_layers: int) -> list[Keys]:
    parts = []
    for index, value in enumerate(keys.items("block_configs", length=num_layers)):
        if not isinstance(value, dict):
            raise InputError(_("entry {index} is not an object").format(index=index), where=keys.at("block_configs"))
        parts.append(keys.adopt(value, f"block_configs[{index}]"))
    return parts


class _Block:
    """One entry of ``block_configs`` as (KV heads, window, width, linear replacements): 0 where a block is missing."""

    def __init__(self, part: Keys, hidden: int, heads: int) -> None:
        attention, ffn = part.part("attention"), part.part("ffn")
        if attention is None or ffn is None:
            raise InputError(_("attention and ffn are both needed"), where=part.where)
        linears = []
        kv_heads = width = 0
        attention.skip("num_sink_tokens", "unshifted_sink", "use_prefill_window_in_sink_attention")
        common.only(attention, sparsify=[])
        common.only(ffn, sparsify=[])
        if attention.flag("replace_with_linear", False):
            linears.append("self_attn.linear_attn")
        elif not attention.flag("no_op", False):
            group = attention.integer("n_heads_in_group", high=heads)
            if heads % group:
                raise InputError(
                    _("{group} does not divide {heads} attention heads").format(group=group, heads=heads),
                    where=attention.at("n_heads_in_group"),
                )
            kv_heads = heads // group
        if ffn.flag("replace_with_linear", False):
            linears.append("mlp.linear_mlp")
        elif not ffn.flag("no_op", False):
            width = _width(ffn, hidden)
        attention.skip("n_heads_in_group", "no_op")
        ffn.skip("ffn_mult", "no_op", "hidden_act")
        self.kind = (kv_heads, attention.integer("window_length", None), width, tuple(linears))


def _width(ffn: Keys, hidden: int) -> int:
    """Formula: int(2 * ffn_mult * H / 3), rounded up to a multiple of 256.

    Source: vllm@0.33.0:model_executor/models/nemotron_nas.py:_ffn_mult_to_intermediate_size.
    """
    multiple = ffn.raw("ffn_mult")
    if isinstance(multiple, bool) or not isinstance(multiple, int | float) or not 0 < multiple < 1024:
        raise InputError(_("{value} is no multiple").format(value=repr(multiple)[:60]), where=ffn.at("ffn_mult"))
    return -(-int(2 * Fraction(multiple) * hidden / 3) // 256) * 256
