"""OLMo 1 to 3, OLMoE and Cohere: families that place or shape their norms in their own way.

Source: transformers@5.23.0:models/{olmo,olmo2,olmo3,olmoe,cohere,cohere2}/.
"""

from __future__ import annotations

from ullage.read.hf_config import common
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import GatedDeltaNet, Layer, Model

POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")


def read_olmo(keys: Keys) -> Model:
    """Read OLMo 1: layer norms without weights."""
    hidden, bias = keys.integer("hidden_size"), keys.flag("attention_bias", False)
    keys.skip("clip_qkv")
    attention = common.gqa(keys, hidden, qkv_bias=bias, o_bias=bias)
    norms = common.pre_norms(hidden, "layer", weight=False)
    layer = Layer(mixers=(attention,), ffns=(common.dense(keys),), norms=norms)
    return common.decoder(keys, hidden, (layer,) * keys.layers(), norm_kind="layer", norm_weight=False)


def read_olmo2(keys: Keys) -> Model:
    """Read OLMo 2: norms after the blocks, and over whole queries and keys."""
    return _read_post_norm(keys, [None] * keys.layers())


def read_olmo3(keys: Keys) -> Model:
    """Read Olmo 3: OLMo 2 where all layers slide but every fourth."""
    window = keys.nullable_integer("sliding_window", 4096)
    slides = common.every(4)
    kinds = common.windows(keys, keys.layers(), window, lambda index: window is not None and slides(index))
    return _read_post_norm(keys, kinds)


def _read_post_norm(keys: Keys, windows: list[int | None]) -> Model:
    hidden, bias = keys.integer("hidden_size"), keys.flag("attention_bias", False)
    ffn = common.dense(keys)

    def make(window: int | None) -> Layer:
        attention = common.gqa(keys, hidden, qkv_bias=bias, o_bias=bias, qk_norm="full", window=window)
        return Layer(mixers=(attention,), ffns=(ffn,), norms=common.norms(hidden, *POST_NORMS))

    return common.decoder(keys, hidden, common.by_kind(windows, make))


def read_olmo_hybrid(keys: Keys) -> Model:
    """Read Olmo Hybrid: OLMo 2's attention in every fourth layer, gated delta nets behind pre-norms in the others.

    The delta net's projections are counted together under Qwen3.5's names; the checkpoint has them one by one.
    Source: transformers@5.23.0:models/olmo_hybrid/modeling_olmo_hybrid.py, configuration_olmo_hybrid.py.
    """
    hidden, bias, count = keys.integer("hidden_size"), keys.flag("attention_bias", False), keys.layers()
    keys.skip("linear_a_log_min", "linear_a_log_max", "linear_dt_min", "linear_dt_max", "linear_dt_init_floor")
    keys.skip("linear_allow_neg_eigval", "linear_use_gate")
    attention = common.gqa(keys, hidden, qkv_bias=bias, o_bias=bias, qk_norm="full")
    key_heads = keys.integer("linear_num_key_heads", attention.num_heads)
    key_dim = keys.integer("linear_key_head_dim", int(0.75 * hidden / key_heads))
    delta = GatedDeltaNet(
        num_k_heads=key_heads,
        num_v_heads=keys.integer("linear_num_value_heads", attention.num_heads),
        k_head_dim=key_dim,
        v_head_dim=keys.integer("linear_value_head_dim", 2 * key_dim),
        conv_kernel=keys.integer("linear_conv_kernel_dim", 4),
        fused=False,
    )
    ffn, kinds = common.dense(keys), ("linear_attention", "full_attention")
    made = {
        kinds[0]: Layer(mixers=(delta,), ffns=(ffn,), norms=common.pre_norms(hidden)),
        kinds[1]: Layer(mixers=(attention,), ffns=(ffn,), norms=common.norms(hidden, *POST_NORMS)),
    }
    named = common.layer_types(
        keys, count, kinds, lambda index: kinds[index % 4 == 3 or (count < 4 and index == count - 1)]
    )
    return common.decoder(keys, hidden, tuple(made[kind] for kind in named))


def read_olmoe(keys: Keys) -> Model:
    """Read OLMoE: experts in every layer, norms over whole queries and keys."""
    hidden, bias = keys.integer("hidden_size"), keys.flag("attention_bias", False)
    keys.skip("clip_qkv")
    attention = common.gqa(keys, hidden, qkv_bias=bias, o_bias=bias, qk_norm="full")
    ffn = common.moe(keys, size="intermediate_size")
    layer = Layer(mixers=(attention,), ffns=(ffn,), norms=common.pre_norms(hidden))
    return common.decoder(keys, hidden, (layer,) * keys.layers())


def read_cohere(keys: Keys) -> Model:
    """Read Command R: both blocks in parallel behind one layer norm; tied embeddings.

    With ``use_qk_norm`` (Command R+) each head's queries and keys have norm weights of their own.
    """
    qk_norm = "full" if keys.flag("use_qk_norm", False) else None
    return _read_parallel(keys, [None] * keys.layers(), qk_norm)


def read_cohere2(keys: Keys) -> Model:
    """Read Command R7B and Command A: all layers slide but every fourth."""
    window, slides = keys.integer("sliding_window", 4096), common.every(keys.integer("sliding_window_pattern", 4))
    keys.skip("order_of_interleaved_layers", "position_embedding_type", "rotary_pct", "use_gated_activation")
    keys.skip("use_parallel_block", "use_parallel_embedding", "use_embedding_sharing", "_sliding_window_pattern")
    common.only(keys, use_qk_norm=False)
    return _read_parallel(keys, common.windows(keys, keys.layers(), window, slides), None)


def _read_parallel(keys: Keys, windows: list[int | None], qk_norm: str | None) -> Model:
    hidden, bias = keys.integer("hidden_size"), keys.flag("attention_bias", False)
    ffn, norms = common.dense(keys), common.norms(hidden, "input_layernorm", kind="layer")

    def make(window: int | None) -> Layer:
        attention = common.gqa(
            keys, hidden, qkv_bias=bias, o_bias=bias, qk_norm=qk_norm, qk_norm_kind="layer", window=window
        )
        return Layer(mixers=(attention,), ffns=(ffn,), norms=norms)

    return common.decoder(keys, hidden, common.by_kind(windows, make), tied_default=True, norm_kind="layer")
