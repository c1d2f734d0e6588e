"""A model as data: a list of layers, each made of typed parts.

What a part *is* decides its parameters, its cache and its activations; nothing downstream looks at a model's name.
Names of sizes are those of Hugging Face configs. Where a part has several tensors, their names are those of the
published checkpoints, because quantisation rules and GGUF conversion go by name.

Sizes are elements, not bytes. Legend: H hidden_size, V vocab_size, I intermediate_size, E num_experts.
"""

from __future__ import annotations

from typing import Union

from ullage.frozen import Frozen
from ullage.spec.mixers import (
    Attention,
    CompressedAttention,
    ExtraTensor,
    GatedDeltaNet,
    Indexer,
    KimiDeltaAttention,
    LatentAttention,
    LightningAttention,
    Mamba,
    Mamba2,
    Mixer,
    Norm,
    ShortConvolution,
)
from ullage.units import WeightFormat

__all__ = [
    "Attention",
    "CompressedAttention",
    "DenseFFN",
    "ExtraTensor",
    "FeedForward",
    "GatedDeltaNet",
    "HyperConnections",
    "Indexer",
    "KimiDeltaAttention",
    "LatentAttention",
    "Layer",
    "LightningAttention",
    "Mamba",
    "Mamba2",
    "Mixer",
    "MoEFFN",
    "Model",
    "MtpModule",
    "Norm",
    "QuantRule",
    "Quantization",
    "ShortConvolution",
    "Tower",
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

    Equal layers are equal values, so that work per kind of layer is done once. ``parallel``: attention and feed-forward
    block both read the layer's input, each through a norm of its own (GPT-NeoX); a layer with one norm is so anyway.
    """

    mixers: tuple[Mixer, ...]
    ffns: tuple[FeedForward, ...]
    norms: tuple[Norm, ...]
    residual: HyperConnections | None = None
    extras: tuple[ExtraTensor, ...] = ()
    parallel: bool = False


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
        rotary_sections: positions rotate by time, height and width (``mrope_section``): engines keep longer tables.
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
    rotary_sections: bool = False
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
