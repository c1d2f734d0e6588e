"""OLMo 1 to 3, OLMoE and Cohere: families that place or shape their norms in their own way.

Source: transformers@5.23.0:models/{olmo,olmo2,olmo3,olmoe,cohere,cohere2}/.
"""

from __future__ import annotations

from ullage.read.hf_config import common
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import Layer, Model

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
