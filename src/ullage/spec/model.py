"""A model as data: a list of layers, each made of typed parts.

What a part *is* decides its parameters, its cache and its activations; nothing downstream looks at a model's name.
Names of sizes are those of Hugging Face configs. Where a part has several tensors, their names are those of the
published checkpoints, because quantisation rules and GGUF conversion go by name.

Sizes are elements, not bytes. Legend: H hidden_size, V vocab_size, I intermediate_size, E num_experts.
"""

from __future__ import annotations

from typing import Literal, Union

from ullage.frozen import Frozen
from ullage.units import WeightFormat


class Norm(Frozen):
    """A normalisation over the last axis. ``weight`` False: no learned scale (OLMo, some qk norms)."""

    name: str
    size: int
    kind: Literal["rms", "layer"] = "rms"
    weight: bool = True
    bias: bool = False


class ExtraTensor(Frozen):
    """A small named tensor that fits none of the typed parts: layer scalars, gates, hash tables.

    ``prefix`` names the module it stands in (checkpoint name without the layer's own prefix). ``buffer``: stored, but
    not a parameter (not counted). ``dtype`` when it differs from the model's. ``split``: see
    :class:`ullage.account.parameters.Parameter`. ``linear`` False: no linear layer's weight, although it is a matrix
    (tables of positions or of tokens).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str | None = None
    buffer: bool = False
    split: Literal["none", "out", "in", "vocab"] = "none"
    linear: bool = True


# ----------------------------------------------------------------------------------------------------------- attention


class Attention(Frozen):
    """Multi-head, grouped-query or multi-query attention: keys and values are cached per KV head.

    Attributes:
        num_heads, num_kv_heads, head_dim: as in the config; ``v_head_dim`` when values are narrower or wider.
        q_bias, k_bias, v_bias, o_bias: biases of the projections.
        qk_norm: "head" one norm of head_dim for all heads; "full" over the whole projection.
        window: sliding window in tokens, or None for full attention.
        chunk: attention within chunks of this many tokens (Llama 4), or None.
        sinks: one learned sink per head (gpt-oss), stored under ``sinks_name``.
        output_gate: the query projection has a second half that gates the output (Qwen3-Next).
        fused_qkv: name of the one projection that holds q, k and v, or None.
        shared_kv: keys and values are those of an earlier layer: no projections, no cache (Gemma 3n, Gemma 4).
        value_is_key: values reuse the key projection: no v_proj (Gemma 4 global layers). Both are cached.
        cross: keys and values come from the vision tower, not from the tokens (Llama 3.2 Vision).
        index_key_dim: width of one key per token that is cached besides, to choose blocks by (MiniMax-M3); 0 for none.
        prefix: module name in the checkpoint.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int | None = None
    q_bias: bool = False
    k_bias: bool = False
    v_bias: bool = False
    o_bias: bool = False
    qk_norm: Literal["head", "full"] | None = None
    qk_norm_kind: Literal["rms", "layer"] = "rms"
    window: int | None = None
    chunk: int | None = None
    sinks: bool = False
    output_gate: bool = False
    fused_qkv: str | None = None
    shared_kv: bool = False
    value_is_key: bool = False
    cross: bool = False
    index_key_dim: int = 0
    rotary_dim: int | None = None
    prefix: str = "self_attn"
    q_name: str = "q_proj"
    k_name: str = "k_proj"
    v_name: str = "v_proj"
    o_name: str = "o_proj"
    q_norm_name: str = "q_norm"
    k_norm_name: str = "k_norm"
    sinks_name: str = "sinks"
    extras: tuple[ExtraTensor, ...] = ()


class Indexer(Frozen):
    """The lightning indexer of DeepSeek sparse attention: picks ``top_k`` tokens for each query.

    One key of ``head_dim`` per token is cached for all index heads. A layer that reuses an earlier layer's choice has
    no indexer (see :attr:`LatentAttention.shared_indexer`).
    """

    num_heads: int
    head_dim: int
    top_k: int
    rope_head_dim: int = 64
    key_norm: Literal["layer", "rms"] = "layer"


class LatentAttention(Frozen):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434 eq. 9-19): one latent per token is cached.

    ``q_lora_rank`` None: queries are projected directly (V2-Lite). ``indexer``: DeepSeek sparse attention (V3.2).
    ``shared_indexer``: sparse attention too, over the tokens an earlier layer's indexer chose: no indexer tensors and
    no index keys here (GLM-5.2 index sharing).
    """

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    bias: bool = False
    indexer: Indexer | None = None
    shared_indexer: bool = False
    rope: bool = True
    output_gate_rank: int | None = None
    prefix: str = "self_attn"
    extras: tuple[ExtraTensor, ...] = ()


class CompressedAttention(Frozen):
    """DeepSeek-V4 attention: a sliding window of raw entries plus entries compressed ``compress_ratio`` to one.

    Attributes:
        head_dim: width of the one shared key-value entry, rope part included.
        compress_ratio: tokens per compressed entry; 0: window only.
        window: raw entries kept, in tokens.
        o_groups, o_lora_rank: grouped low-rank output projection.
        overlap: each compressed entry draws on two windows, so the compressor projects to twice head_dim.
        indexer: chooses among compressed entries (ratio 4 layers), with a compressor of its own.
    """

    num_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    window: int
    compress_ratio: int
    overlap: bool = False
    indexer: Indexer | None = None
    prefix: str = "attn"
    extras: tuple[ExtraTensor, ...] = ()


# --------------------------------------------------------------------------------------------- linear and state layers


class GatedDeltaNet(Frozen):
    """Gated delta rule linear attention (Qwen3-Next, Qwen3.5): a fixed state per request.

    State per request: num_v_heads x k_head_dim x v_head_dim, and conv_kernel - 1 columns of the convolution.
    ``fused``: Qwen3-Next stores in_proj_qkvz and in_proj_ba; Qwen3.5 stores four projections.
    ``state_dtype``: of the recurrent state, where the config fixes it.
    """

    num_k_heads: int
    num_v_heads: int
    k_head_dim: int
    v_head_dim: int
    conv_kernel: int
    fused: bool = True
    state_dtype: str | None = None
    prefix: str = "linear_attn"
    extras: tuple[ExtraTensor, ...] = ()


class KimiDeltaAttention(Frozen):
    """Kimi Delta Attention (Kimi Linear): per-channel gated delta rule, separate convolutions for q, k and v.

    ``gate_rank``: of the forget gate; ``output_gate_rank``: of the output gate, None for one projection (Kimi K3).
    """

    num_heads: int
    head_dim: int
    conv_kernel: int
    gate_rank: int
    output_gate_rank: int | None = None
    prefix: str = "self_attn"
    extras: tuple[ExtraTensor, ...] = ()


class LightningAttention(Frozen):
    """Lightning linear attention (MiniMax-Text-01, M1): state num_heads x head_dim x head_dim per request."""

    num_heads: int
    head_dim: int
    prefix: str = "self_attn"
    extras: tuple[ExtraTensor, ...] = ()


class Mamba(Frozen):
    """Mamba-1 selective state space layer (Jamba)."""

    inner_size: int
    state_size: int
    conv_kernel: int
    dt_rank: int
    conv_bias: bool = True
    proj_bias: bool = False
    inner_norms: bool = False
    prefix: str = "mamba"
    extras: tuple[ExtraTensor, ...] = ()


class Mamba2(Frozen):
    """Mamba-2 layer (Nemotron-H, Falcon-H1): inner size = num_heads x head_dim; B and C shared per group.

    ``state_dtype``: of the recurrent state, where the config fixes it.
    """

    num_heads: int
    head_dim: int
    state_size: int
    num_groups: int
    conv_kernel: int
    conv_bias: bool = True
    proj_bias: bool = False
    gated_norm: bool = True
    state_dtype: str | None = None
    prefix: str = "mixer"
    extras: tuple[ExtraTensor, ...] = ()


class ShortConvolution(Frozen):
    """A gated short convolution (LFM2): a request keeps ``conv_kernel`` - 1 columns, and no recurrent state."""

    size: int
    conv_kernel: int
    bias: bool = False
    prefix: str = "conv"
    extras: tuple[ExtraTensor, ...] = ()


Mixer = Union[
    Attention,
    LatentAttention,
    CompressedAttention,
    GatedDeltaNet,
    KimiDeltaAttention,
    LightningAttention,
    Mamba,
    Mamba2,
    ShortConvolution,
]


# ----------------------------------------------------------------------------------------------------------------- FFN


class DenseFFN(Frozen):
    """A dense feed-forward block. ``gated``: gate and up projections (SwiGLU, GeGLU). ``fused``: stored as one."""

    intermediate_size: int
    gated: bool = True
    bias: bool = False
    prefix: str = "mlp"
    gate_name: str = "gate_proj"
    up_name: str = "up_proj"
    down_name: str = "down_proj"
    fused_gate_up: str | None = None
    activation: str = "silu"
    extras: tuple[ExtraTensor, ...] = ()


class MoEFFN(Frozen):
    """A mixture of experts.

    Attributes:
        num_experts, top_k: routed experts, and how many each token uses.
        intermediate_size: of one routed expert.
        shared_intermediate_size: of all shared experts together, 0 for none.
        shared_gate: a scalar gate on the shared expert (Qwen2-MoE, Qwen3-Next).
        router_bias: bias of the router; correction_bias: the load-balancing bias, stored as a buffer (DeepSeek-V3).
        expert_bias: biases inside the experts (gpt-oss).
        gated: gate and up projections in each expert.
        latent_size: experts work in this smaller space between two projections (Nemotron 3), or None.
        hash_routed: experts chosen by token id, no learned choice (DeepSeek-V4's first layers).
        fused_experts: checkpoint stores all experts of a layer in one tensor, gate and up together (gpt-oss, Llama 4).
        correction_bias_name: its name when it is not the router's own.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    shared_intermediate_size: int = 0
    shared_gate: bool = False
    router_bias: bool = False
    correction_bias: bool = False
    expert_bias: bool = False
    gated: bool = True
    latent_size: int | None = None
    hash_routed: bool = False
    fused_experts: bool = False
    prefix: str = "mlp"
    router_name: str = "gate"
    experts_name: str = "experts"
    shared_name: str = "shared_experts"
    correction_bias_name: str | None = None
    gate_name: str = "gate_proj"
    up_name: str = "up_proj"
    down_name: str = "down_proj"
    activation: str = "silu"
    extras: tuple[ExtraTensor, ...] = ()


FeedForward = Union[DenseFFN, MoEFFN]


# --------------------------------------------------------------------------------------------------------------- model


class HyperConnections(Frozen):
    """Residual streams: ``num_streams`` copies of the hidden state, mixed by learned maps (DeepSeek-V4).

    ``prefixes``: one map around each block of the layer, under these checkpoint names.
    """

    num_streams: int
    prefixes: tuple[str, ...] = ("hc_attn", "hc_ffn")


class Layer(Frozen):
    """One decoder layer. Most have one mixer and one feed-forward block; a hybrid's layer may have either, or two.

    Equal layers are equal values, so that work per kind of layer is done once.
    """

    mixers: tuple[Mixer, ...]
    ffns: tuple[FeedForward, ...]
    norms: tuple[Norm, ...]
    residual: HyperConnections | None = None
    extras: tuple[ExtraTensor, ...] = ()


class MtpModule(Frozen):
    """One multi-token-prediction module: a layer with its own norms and projection, counted apart.

    ``shares_embedding``/``shares_head``: nothing of its own is loaded for them by engines, although a checkpoint may
    hold copies (``stores_embedding``, ``stores_head``). ``prefix``: what its tensors' names begin with, dot included;
    None: the next decoder layer's number.
    """

    layer: Layer
    norms: tuple[Norm, ...] = ()
    extras: tuple[ExtraTensor, ...] = ()
    shares_embedding: bool = True
    shares_head: bool = True
    stores_embedding: bool = False
    stores_head: bool = False
    prefix: str | None = None


class Tower(Frozen):
    """A vision or audio tower with its projector, as a list of tensors; counted apart from the decoder.

    ``num_layers``, ``hidden_size``, ``num_heads`` of its transformer, 0 where they do not apply: engines go by them.
    """

    name: str
    tensors: tuple[ExtraTensor, ...]
    copies: int = 1
    num_layers: int = 0
    hidden_size: int = 0
    num_heads: int = 0


class QuantRule(Frozen):
    """The first rule whose ``pattern`` (a regular expression, searched in the full parameter name) hits, decides.

    An empty pattern means every linear layer, experts included; it leaves embeddings, heads, routers and convolutions
    alone. Tensors of one axis are never quantised, but may be given another plain dtype. ``format`` None: the tensor
    stays in the model's own dtype.
    """

    pattern: str
    format: WeightFormat | None


class Quantization(Frozen):
    """How a checkpoint's linear weights are stored. Norms, embeddings and biases stay unless a rule names them."""

    method: str
    rules: tuple[QuantRule, ...]
    kv_cache_dtype: str | None = None


class Model(Frozen):
    """A decoder.

    Attributes:
        name: for people.
        architecture: the ``architectures`` entry or model type it was read from.
        dtype: of the parameters that are not quantised.
        layers: in order.
        tied_embeddings: the output head is the embedding.
        extra_embedding_rows: rows of the embedding beyond the vocabulary, which the head lacks (Llama 3.2 Vision).
        learned_positions: rows of a learned position table, 0 for none.
        final_norms: norms after the last layer.
        extras: tensors of the whole model (embedding norms, hyper-connection head, ...).
        max_position_embeddings: the context the config declares.
        source: where each fact is from.
        assumed: sentences on what was not understood and assumed on the user's word.
        ignored_keys: config keys read over knowingly or with ``--assume``.
    """

    name: str
    architecture: str
    hidden_size: int
    vocab_size: int
    dtype: str
    layers: tuple[Layer, ...]
    final_norms: tuple[Norm, ...]
    tied_embeddings: bool = False
    lm_head_bias: bool = False
    embedding_size: int | None = None
    extra_embedding_rows: int = 0
    learned_positions: int = 0
    max_position_embeddings: int = 0
    mtp: tuple[MtpModule, ...] = ()
    towers: tuple[Tower, ...] = ()
    extras: tuple[ExtraTensor, ...] = ()
    quantization: Quantization | None = None
    embedding_name: str = "model.embed_tokens"
    layers_name: str = "model.layers"
    head_name: str = "lm_head"
    positions_name: str = "position_embeddings"
    source: str = ""
    assumed: tuple[str, ...] = ()
    ignored_keys: tuple[str, ...] = ()
