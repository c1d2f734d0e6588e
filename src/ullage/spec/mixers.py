"""What mixes tokens in a layer: attention of every kind, linear attention and state-space layers.

What a part *is* decides its parameters, its cache and its activations. Names of sizes are those of Hugging Face
configs; sizes are elements, not bytes. Legend: H hidden_size.
"""

from __future__ import annotations

from typing import Literal, Union

from ullage.frozen import Frozen


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

    ``gate_rank``: of the forget gate, None for one projection (Ling 2.5); ``output_gate_rank``: of the output gate,
    None for one projection (Kimi K3).
    """

    num_heads: int
    head_dim: int
    conv_kernel: int
    gate_rank: int | None
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
