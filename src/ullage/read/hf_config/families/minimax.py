"""MiniMax-M1 (lightning attention with full attention in between) and MiniMax-M3 (block-sparse attention).

Source: MiniMax-AI/MiniMax-M1:modeling_minimax_m1.py, transformers@5.23.0:models/minimax/modeling_minimax.py;
vllm@0.33.0:vllm/models/minimax_m3/nvidia/model.py, mtp.py.
"""

from __future__ import annotations

from dataclasses import replace

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.hf_config import common
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import Attention, DenseFFN, ExtraTensor, Layer, LightningAttention, Model, MoEFFN


def read_m1(keys: Keys) -> Model:
    """Read MiniMax-M1 (and Text-01): ``attn_type_list`` has 0 for lightning attention, 1 for full attention."""
    hidden = keys.integer("hidden_size")
    keys.skip("postnorm", "rotary_dim", "router_jitter_noise", "shared_moe_mode", "sliding_window")
    keys.skip(*(f"layernorm_{part}_{name}" for part in _SCALED for name in ("alpha", "beta")))
    if keys.integer("shared_intermediate_size", 0, low=0):
        raise InputError(_("a shared expert is not understood here"), where=keys.at("shared_intermediate_size"))
    full = common.gqa(keys, hidden)
    mixers = LightningAttention(num_heads=full.num_heads, head_dim=full.head_dim), full
    moe = common.moe(
        keys, size="intermediate_size", prefix="block_sparse_moe", gate_name="w1", up_name="w3", down_name="w2"
    )
    kinds = _zeros_and_ones(keys, "attn_type_list", keys.layers())
    layers = common.by_kind(
        kinds, lambda kind: Layer(mixers=(mixers[kind],), ffns=(moe,), norms=common.pre_norms(hidden))
    )
    return common.decoder(keys, hidden, layers)


def read_text_01(keys: Keys) -> Model:
    """Read MiniMax-Text-01 as converted for transformers: every other layer, the second among them, is linear."""
    hidden, count = keys.integer("hidden_size"), keys.layers()
    keys.skip("block_size", *(f"{part}_{name}_factor" for part in _FACTORS for name in ("alpha", "beta")))
    common.only(keys, sliding_window=None)
    kinds = ("full_attention", "linear_attention")
    full = common.gqa(keys, hidden, kv_default=8)
    mixers: dict[str, Attention | LightningAttention] = {
        kinds[0]: full,
        kinds[1]: LightningAttention(num_heads=full.num_heads, head_dim=full.head_dim),
    }
    moe = common.moe(
        keys, size="intermediate_size", prefix="block_sparse_moe", gate_name="w1", up_name="w3", down_name="w2"
    )
    layers = common.by_kind(
        common.layer_types(keys, count, kinds, lambda index: kinds[index % 2]),
        lambda kind: Layer(mixers=(mixers[kind],), ffns=(moe,), norms=common.pre_norms(hidden)),
    )
    return common.decoder(keys, hidden, layers)


_FACTORS = ("full_attn", "linear_attn", "mlp")
_SCALED = ("full_attention", "linear_attention", "mlp")


def _zeros_and_ones(keys: Keys, key: str, count: int) -> list[int]:
    values: list[int] = keys.items(key, length=count)
    if any(isinstance(value, bool) or value not in (0, 1) for value in values):
        raise InputError(_("is not a list of 0 and 1, one per layer"), where=keys.at(key))
    return values


#: Routing, activation and rope settings of M3.
_M3_WITHOUT_EFFECT = (
    "num_mtp_modules",
    "num_nextn_predict_layers",
    "partial_rotary_factor",
    "rotary_dim",
    "routed_scaling_factor",
    "scoring_func",
    "index_block_size",
    "index_local_blocks",
    "index_topk_blocks",
    "shared_intermediate_size",
    "swiglu_alpha",
    "swiglu_beta",
    "swiglu_limit",
    "use_gemma_norm",
)


def read_m3(keys: Keys) -> Model:
    """Read the text part of MiniMax-M3.

    No MTP module is counted: the keys name some, yet the published checkpoint's 427,040,140,160 elements are those of
    text, tower and routing biases, and engines take the modules from a checkpoint of their own.
    """
    hidden, count = keys.integer("hidden_size"), keys.layers()
    keys.skip(*_M3_WITHOUT_EFFECT)
    if keys.flag("attention_output_gate", False):
        raise InputError(_("an output gate is not understood here"), where=keys.at("attention_output_gate"))
    attention = _m3_attention(keys)
    sparse, sparse_layers = _m3_sparse(keys, attention, count)
    blocks = DenseFFN(intermediate_size=keys.integer("dense_intermediate_size", 12288)), _m3_experts(keys)
    named = common.layer_types(keys, count, ("dense", "sparse"), lambda _index: "sparse", key="mlp_layer_types")
    routed = [int(kind == "sparse") for kind in named]
    routed = _zeros_and_ones(keys, "moe_layer_freq", count) if "moe_layer_freq" in keys else routed
    keys.skip("first_k_dense_replace")
    layers = common.by_kind(
        zip(sparse_layers, routed, strict=True),
        lambda kind: Layer(
            mixers=(sparse if kind[0] else attention,), ffns=(blocks[kind[1]],), norms=common.pre_norms(hidden)
        ),
    )
    return common.decoder(keys, hidden, layers)


def _m3_attention(keys: Keys) -> Attention:
    norm_type = keys.text("qk_norm_type", "per_head")
    if norm_type != "per_head":
        raise InputError(
            _("{value} is not understood").format(value=repr(norm_type)[:60]), where=keys.at("qk_norm_type")
        )
    return common.gqa(keys, keys.integer("hidden_size"), qk_norm="head" if keys.flag("use_qk_norm", True) else None)


def _m3_sparse(keys: Keys, attention: Attention, count: int) -> tuple[Attention, list[int]]:
    """Return attention with an index branch, and which layers have it.

    The index branch scores blocks with its own queries (one head per KV head) and one key per token, which is cached.
    """
    part = keys.part("sparse_attention_config")
    if part is None:
        kinds = ("full_attention", "minimax_m3_sparse")
        named = common.layer_types(keys, count, kinds, lambda _index: kinds[0])
        sizes = keys.integer("index_n_heads", 4), keys.integer("index_head_dim", 128)
        return _indexed(keys, attention, *sizes), [int(kind == kinds[1]) for kind in named]
    keys.skip("layer_types")
    part.skip(*(f"sparse_{name}" for name in ("block_size", "init_block", "local_block", "score_type", "topk_blocks")))
    layers = _zeros_and_ones(part, "sparse_attention_freq", count)
    if not part.flag("use_sparse_attention", True):
        layers = [0] * count
    without_value = _zeros_and_ones(part, "sparse_disable_index_value", count)
    if any(is_sparse and not disabled for is_sparse, disabled in zip(layers, without_value, strict=True)):
        raise InputError(_("index values are not understood"), where=part.at("sparse_disable_index_value"))
    sizes = part.integer("sparse_num_index_heads"), part.integer("sparse_index_dim")
    return _indexed(keys, attention, *sizes), layers


def _indexed(keys: Keys, attention: Attention, heads: int, size: int) -> Attention:
    """Return attention with the tensors of the index branch."""
    hidden = keys.integer("hidden_size")
    extras = (
        ExtraTensor(name="index_q_proj.weight", shape=(heads * size, hidden), split="out"),
        ExtraTensor(name="index_k_proj.weight", shape=(size, hidden)),
        ExtraTensor(name="index_q_norm.weight", shape=(size,)),
        ExtraTensor(name="index_k_norm.weight", shape=(size,)),
    )
    return replace(attention, index_key_dim=size, extras=extras)


def _m3_shared(keys: Keys, size: int) -> int:
    """Return the width of the shared experts: their number in the published file, their width in newer ones."""
    if "n_shared_experts" in keys:
        return size * int(keys.integer("n_shared_experts", low=0))
    return int(keys.integer("shared_intermediate_size", 3072, low=0))


def _m3_experts(keys: Keys) -> MoEFFN:
    """Return the experts, all of ``intermediate_size``; ``moe_intermediate_size`` repeats it."""
    size = keys.integer("intermediate_size")
    if keys.integer("moe_intermediate_size", size) != size:
        raise InputError(_("differs from intermediate_size"), where=keys.at("moe_intermediate_size"))
    return common.moe(
        keys,
        size="intermediate_size",
        shared_intermediate_size=_m3_shared(keys, size),
        correction_bias=keys.flag("use_routing_bias", True),
        prefix="block_sparse_moe",
    )
