"""Gemma 1 to 4, text parts.

Source: transformers@5.23.0:models/{gemma,gemma2,gemma3,gemma4}/; defaults of missing keys are those of the config
classes, which the published multi-modal configs rely on. Embeddings are tied unless a config says otherwise.
"""

from __future__ import annotations

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.hf_config import common
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import Attention, DenseFFN, ExtraTensor, FeedForward, Layer, Model, Norm

GEMMA_ACTIVATION = "gelu_pytorch_tanh"
SANDWICH = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


def read(keys: Keys) -> Model:
    """Read Gemma: Llama's layer with tied embeddings and head_dim 256."""
    hidden, bias = keys.integer("hidden_size"), keys.flag("attention_bias", False)
    keys.skip("use_bidirectional_attention")
    attention = common.gqa(keys, hidden, head_dim_default=256, qkv_bias=bias, o_bias=bias)
    ffn = common.dense(keys, activation=GEMMA_ACTIVATION)
    layer = Layer(mixers=(attention,), ffns=(ffn,), norms=common.pre_norms(hidden))
    return common.decoder(keys, hidden, (layer,) * keys.layers(), tied_default=True)


def read_2(keys: Keys) -> Model:
    """Read Gemma 2: norms before and after both blocks; every other layer, the first among them, slides."""
    window = keys.first_integer("sliding_window", "sliding_window_size", default=4096)
    return _read_sandwiched(keys, window=window, pattern=2, qk_norm=None, vocab=256_000)


def read_3_text(keys: Keys) -> Model:
    """Read the text part of Gemma 3: norms of queries and keys; all layers slide but every sixth."""
    keys.skip("_sliding_window_pattern")
    window, pattern = keys.integer("sliding_window", 4096), keys.integer("sliding_window_pattern", 6)
    return _read_sandwiched(keys, window=window, pattern=pattern, qk_norm="head", vocab=262_208)


def _read_sandwiched(keys: Keys, *, window: int, pattern: int, qk_norm: str | None, vocab: int) -> Model:
    hidden, num_layers = keys.integer("hidden_size", 2304), keys.layers(default=26)
    bias = keys.flag("attention_bias", False)
    keys.skip("use_bidirectional_attention")
    ffn = DenseFFN(intermediate_size=keys.integer("intermediate_size", 9216), activation=GEMMA_ACTIVATION)

    def make(window: int | None) -> Layer:
        attention = common.gqa(
            keys,
            hidden,
            heads_default=8,
            kv_default=4,
            head_dim_default=256,
            qkv_bias=bias,
            o_bias=bias,
            qk_norm=qk_norm,
            window=window,
        )
        return Layer(mixers=(attention,), ffns=(ffn,), norms=common.norms(hidden, *SANDWICH))

    layers = common.by_kind(common.windows(keys, num_layers, window, common.every(pattern)), make)
    return common.decoder(keys, hidden, layers, tied_default=True, vocab_size=keys.integer("vocab_size", vocab))


def read_4_unified_text(keys: Keys) -> Model:
    """Read the text part of Gemma 4 Unified: Gemma 4 without embeddings per layer."""
    return read_4_text(keys, default_per_layer=0, default_window=1024)


def read_4_text(keys: Keys, *, default_per_layer: int = 256, default_window: int = 512) -> Model:
    """Read the text part of Gemma 4.

    Full layers have a head_dim (and, where keys serve as values, KV heads) of their own; the last
    ``num_kv_shared_layers`` reuse the keys and values of an earlier layer of their kind; the small models add an
    embedding per layer; the MoE model runs experts beside the dense block.
    """
    hidden, num_layers = keys.integer("hidden_size", 2304), keys.layers(default=30)
    keys.skip("use_bidirectional_attention", "expert_intermediate_size")
    window = keys.integer("sliding_window", default_window)
    kinds = common.windows(keys, num_layers, window, common.every(6))
    kinds[-1] = None
    num_shared = keys.integer("num_kv_shared_layers", 0, low=0)
    shared = [index >= num_layers - num_shared for index in range(num_layers)]
    if set(kinds) != {kind for kind, reuses in zip(kinds, shared, strict=True) if not reuses}:
        raise InputError(_("leaves a kind of layer without keys and values"), where=keys.at("num_kv_shared_layers"))
    per_layer = keys.integer("hidden_size_per_layer_input", default_per_layer, low=0)
    sizes = [tuple(apart.items()) for apart in common.per_layer(keys, num_layers, "head_dim", "num_key_value_heads")]

    def make(kind: tuple[int | None, bool, tuple[tuple[str, int], ...]]) -> Layer:
        return Layer(
            mixers=(_gemma4_attention(keys, window=kind[0], shared=kind[1], apart=dict(kind[2])),),
            ffns=_gemma4_ffns(keys, shared=kind[1], hidden=hidden),
            norms=_gemma4_norms(keys, hidden, per_layer),
            extras=_per_layer_extras(hidden, per_layer),
        )

    layers = common.by_kind(zip(kinds, shared, sizes, strict=True), make)
    extras = _per_layer_embedding(keys, hidden, per_layer, num_layers)
    vocab = keys.integer("vocab_size", 262_144)
    return common.decoder(keys, hidden, layers, tied_default=True, vocab_size=vocab, extras=extras)


def _gemma4_attention(keys: Keys, *, window: int | None, shared: bool, apart: dict[str, int]) -> Attention:
    """Build attention. What full layers have apart stands in keys of their own or, in newer files, layer by layer."""
    bias, value_is_key = keys.flag("attention_bias", False), keys.flag("attention_k_eq_v", False)
    dim, global_dim = keys.integer("head_dim", 256), keys.integer("global_head_dim", 512)
    kv_heads = keys.integer("num_key_value_heads", 4)
    global_kv_heads = keys.integer("num_global_key_value_heads", kv_heads)
    full = window is None
    if "per_layer_config" in keys:
        dim = global_dim = apart.get("head_dim", dim)
        kv_heads = global_kv_heads = apart.get("num_key_value_heads", kv_heads)
    return Attention(
        num_heads=keys.integer("num_attention_heads", 8),
        num_kv_heads=global_kv_heads if full and value_is_key else kv_heads,
        head_dim=global_dim if full else dim,
        q_bias=bias,
        k_bias=bias,
        v_bias=bias,
        o_bias=bias,
        qk_norm="head",
        window=window,
        shared_kv=shared,
        value_is_key=full and value_is_key,
    )


def _gemma4_ffns(keys: Keys, *, shared: bool, hidden: int) -> tuple[FeedForward, ...]:
    wide = keys.flag("use_double_wide_mlp", False) and shared
    width = keys.integer("intermediate_size", 9216) * (2 if wide else 1)
    dense = DenseFFN(intermediate_size=width, activation=GEMMA_ACTIVATION)
    if not keys.flag("enable_moe_block", False):
        keys.skip("num_experts", "top_k_experts", "moe_intermediate_size")
        return (dense,)
    experts = keys.integer("num_experts")
    scales = (
        ExtraTensor(name="router.scale", shape=(hidden,)),
        ExtraTensor(name="router.per_expert_scale", shape=(experts,)),
    )
    sparse = common.moe(
        keys, top_k=("top_k_experts",), fused_experts=True, prefix="", router_name="router.proj", extras=scales
    )
    return (dense, sparse)


def _gemma4_norms(keys: Keys, hidden: int, per_layer: int) -> tuple[Norm, ...]:
    names = list(SANDWICH)
    if keys.flag("enable_moe_block", False):
        names += ["post_feedforward_layernorm_1", "post_feedforward_layernorm_2", "pre_feedforward_layernorm_2"]
    if per_layer:
        names.append("post_per_layer_input_norm")
    return common.norms(hidden, *names)


def _per_layer_extras(hidden: int, per_layer: int) -> tuple[ExtraTensor, ...]:
    scalar = ExtraTensor(name="layer_scalar", shape=(1,), buffer=True)
    if not per_layer:
        return (scalar,)
    return (
        ExtraTensor(name="per_layer_input_gate.weight", shape=(per_layer, hidden)),
        ExtraTensor(name="per_layer_projection.weight", shape=(hidden, per_layer)),
        scalar,
    )


def _per_layer_embedding(keys: Keys, hidden: int, per_layer: int, num_layers: int) -> tuple[ExtraTensor, ...]:
    """One further embedding row of ``per_layer`` values for each layer, with a projection and a norm."""
    vocab = keys.integer("vocab_size_per_layer_input", 262_144)
    if not per_layer:
        return ()
    width = num_layers * per_layer
    return (
        ExtraTensor(name="model.embed_tokens_per_layer.weight", shape=(vocab, width), split="vocab", linear=False),
        ExtraTensor(name="model.per_layer_model_projection.weight", shape=(width, hidden), split="out"),
        ExtraTensor(name="model.per_layer_projection_norm.weight", shape=(per_layer,)),
    )
