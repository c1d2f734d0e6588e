"""What all families share: attention, feed-forward and norm builders, patterns over layers, the frame of a decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar

from ullage.errors import InputError, UnknownArchitectureError
from ullage.i18n import _
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import (
    Attention,
    DenseFFN,
    ExtraTensor,
    LatentAttention,
    Layer,
    Model,
    MoEFFN,
    MtpModule,
    Norm,
)
from ullage.units import canonical_dtype

NormKind = Literal["rms", "layer"]
Kind = TypeVar("Kind")

SLIDING, FULL, CHUNKED = "sliding_attention", "full_attention", "chunked_attention"


def only(keys: Keys, **understood: Any) -> None:
    """Take keys of which one value alone is understood; a missing key passes, another value is an error naming it."""
    for key, wanted in understood.items():
        value = keys.raw(key)
        if value is not None and value != wanted:
            raise UnknownArchitectureError(
                _("{key} {value} is not understood here, only {wanted} is").format(
                    key=key, value=repr(value)[:60], wanted=repr(wanted)
                ),
                where=keys.where,
                keys=[key],
            )


# -------------------------------------------------------------------------------------------------------------- norms


def norms(
    hidden: int, *names: str, kind: NormKind = "rms", weight: bool = True, bias: bool = False
) -> tuple[Norm, ...]:
    """Return norms of ``hidden`` under these checkpoint names."""
    return tuple(Norm(name=name, size=hidden, kind=kind, weight=weight, bias=bias) for name in names)


def pre_norms(hidden: int, kind: NormKind = "rms", *, weight: bool = True, bias: bool = False) -> tuple[Norm, ...]:
    """Return the two norms of a pre-norm block under their Llama names."""
    return norms(hidden, "input_layernorm", "post_attention_layernorm", kind=kind, weight=weight, bias=bias)


# ---------------------------------------------------------------------------------------------------------- attention


def gqa(
    keys: Keys,
    hidden: int,
    *,
    heads: str = "num_attention_heads",
    heads_default: int | None = None,
    kv_heads: str = "num_key_value_heads",
    kv_default: int | None = None,
    head_dim: str = "head_dim",
    head_dim_default: int | None = None,
    qkv_bias: bool = False,
    **settings: Any,
) -> Attention:
    """Read multi-head or grouped-query attention.

    ``heads``, ``kv_heads`` and ``head_dim`` are the names of the keys. KV heads default to all heads (so does null),
    head_dim to hidden / heads: the defaults of nearly every family, others are given. ``settings`` go to
    :class:`Attention`.
    """
    num_heads = keys.integer(heads) if heads_default is None else keys.integer(heads, heads_default)
    num_kv_heads = keys.nullable_integer(kv_heads, kv_default or num_heads) or num_heads
    if num_heads % num_kv_heads:
        raise InputError(
            _("{kv} KV heads do not divide {heads} attention heads").format(kv=num_kv_heads, heads=num_heads),
            where=keys.at(kv_heads),
        )
    dim = keys.nullable_integer(head_dim, head_dim_default)
    if dim is None:
        if hidden % num_heads:
            raise InputError(
                _("{heads} attention heads do not divide hidden_size {hidden}").format(heads=num_heads, hidden=hidden),
                where=keys.at(heads),
                remedy=_("give head_dim"),
            )
        dim = hidden // num_heads
    biases = dict.fromkeys(("q_bias", "k_bias", "v_bias"), qkv_bias)
    return Attention(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=dim, **{**biases, **settings})


def mla(keys: Keys, *, q_lora_rank: int | None, **settings: Any) -> LatentAttention:
    """Read multi-head latent attention. Its KV heads and head_dim keys say nothing: one latent is cached for all."""
    keys.skip("num_key_value_heads", "head_dim", "qk_head_dim")
    if "v_head_dim" not in settings:
        settings["v_head_dim"] = keys.integer("v_head_dim")
    return LatentAttention(
        num_heads=keys.integer("num_attention_heads"),
        q_lora_rank=q_lora_rank,
        kv_lora_rank=keys.integer("kv_lora_rank"),
        qk_nope_head_dim=keys.integer("qk_nope_head_dim"),
        qk_rope_head_dim=keys.integer("qk_rope_head_dim"),
        bias=keys.flag("attention_bias", False),
        **settings,
    )


# ------------------------------------------------------------------------------------------------------- feed-forward


def dense(keys: Keys, *, size: str = "intermediate_size", **settings: Any) -> DenseFFN:
    """Read a feed-forward block whose width stands under ``size``."""
    return DenseFFN(intermediate_size=keys.integer(size), **settings)


def moe(
    keys: Keys,
    *,
    num_experts: tuple[str, ...] = ("num_experts", "num_local_experts", "n_routed_experts"),
    top_k: tuple[str, ...] = ("num_experts_per_tok",),
    size: str = "moe_intermediate_size",
    **settings: Any,
) -> MoEFFN:
    """Read a mixture of experts; the keys that only change routing (groups, scaling, scoring) are taken along."""
    keys.skip(
        "n_group", "topk_group", "topk_method", "scoring_func", "norm_topk_prob", "routed_scaling_factor", "ep_size"
    )
    keys.skip("moe_router_dtype")
    experts = keys.first_integer(*num_experts)
    used = keys.first_integer(*top_k)
    if used > experts:
        raise InputError(
            _("{top_k} experts per token are more than the {experts} there are").format(top_k=used, experts=experts),
            where=keys.at(top_k[0]),
        )
    return MoEFFN(num_experts=experts, top_k=used, intermediate_size=keys.integer(size), **settings)


# -------------------------------------------------------------------------------------------------- patterns of layers


def by_kind(kinds: Iterable[Kind], make: Callable[[Kind], Layer]) -> tuple[Layer, ...]:
    """Return one layer per entry of ``kinds``; equal kinds share one value."""
    made: dict[Kind, Layer] = {}
    layers = []
    for kind in kinds:
        if kind not in made:
            made[kind] = make(kind)
        layers.append(made[kind])
    return tuple(layers)


def layer_types(
    keys: Keys,
    num_layers: int,
    known: Iterable[str],
    default: Callable[[int], str],
    *,
    key: str = "layer_types",
    spare: int = 0,
) -> list[str]:
    """Take a per-layer list of kinds, each one of ``known``; ``default`` gives a layer's kind where the key is missing.

    ``spare``: further entries that belong to multi-token-prediction layers; they are cut off.
    """
    kinds: list[str] | None = keys.texts(key, None)
    if kinds is None:
        return [default(index) for index in range(num_layers)]
    strange = sorted(set(kinds) - set(known))
    if strange:
        raise UnknownArchitectureError(
            _("these kinds of layer are not understood: {kinds}").format(kinds=", ".join(strange)[:200]),
            where=keys.where,
            keys=[key],
        )
    if len(kinds) not in (num_layers, num_layers + spare):
        raise InputError(
            _("has {got} entries, {want} are needed").format(got=len(kinds), want=num_layers), where=keys.at(key)
        )
    return kinds[:num_layers]


def windows(keys: Keys, num_layers: int, window: int | None, default: Callable[[int], bool]) -> list[int | None]:
    """Return each layer's sliding window, None for full attention; ``default`` says which layers slide."""
    kinds = layer_types(keys, num_layers, (SLIDING, FULL), lambda index: SLIDING if default(index) else FULL)
    if window is None and SLIDING in kinds and "layer_types" in keys:
        raise InputError(
            _("the key is missing, though layer_types has sliding layers"), where=keys.at("sliding_window")
        )
    return [window if kind == SLIDING else None for kind in kinds]


def every(pattern: int) -> Callable[[int], bool]:
    """Return the rule "all layers slide but every ``pattern``-th" (Gemma 3, Olmo 3, Cohere 2)."""
    return lambda index: bool((index + 1) % pattern)


def sparse_after(keys: Keys, num_layers: int, default: int | None = None) -> list[bool]:
    """Return which layers have experts: ``mlp_layer_types``, else all after ``first_k_dense_replace``.

    ``moe_layer_freq`` above 1 makes experts of every such layer only (arXiv:2401.06066, DeepSeek's configs).
    """
    num_dense = keys.integer("first_k_dense_replace", default if default is not None else 0, low=0)
    frequency = keys.integer("moe_layer_freq", 1)
    sparse = [index >= num_dense and index % frequency == 0 for index in range(num_layers)]
    named = ("dense", "sparse")
    kinds = layer_types(keys, num_layers, named, lambda index: named[sparse[index]], key="mlp_layer_types")
    return [kind == "sparse" for kind in kinds]


def per_layer(keys: Keys, num_layers: int, *known: str) -> list[dict[str, int]]:
    """Take ``per_layer_config``: the sizes that some layers have apart, by layer number; ``known`` are understood.

    Source: transformers@5.23.0:configuration_utils.py (what newer files hold in place of a key per kind of layer).
    """
    part = keys.part("per_layer_config")
    found: list[dict[str, int]] = [{} for _index in range(num_layers)]
    for index in part.values if part is not None else ():
        if part is None or not index.isdecimal() or len(index) > 6 or int(index) >= num_layers:
            raise InputError(
                _("{index} is no number of a layer").format(index=repr(index)[:60]), where=keys.at("per_layer_config")
            )
        layer = part.part(index)
        if layer is not None:
            found[int(index)] = {name: layer.integer(name) for name in known if name in layer}
    return found


# -------------------------------------------------------------------------------------------------------------- frame


def read_dtype(keys: Keys) -> str:
    """Take ``dtype`` or ``torch_dtype``, here or in the whole; bfloat16 when there is none (what engines load by)."""
    keys.skip("dtype", "torch_dtype")
    for name in ("dtype", "torch_dtype"):
        value = keys.holder(name).raw(name)
        if value is None:
            continue
        if not isinstance(value, str):
            raise InputError(_("{value} is not a number format").format(value=repr(value)[:60]), where=keys.at(name))
        try:
            return canonical_dtype(value)
        except InputError as error:
            raise InputError(error.what, where=keys.at(name), remedy=error.remedy) from None
    return "bfloat16"


def read_architecture(keys: Keys) -> str:
    """Take the first of ``architectures``, here or in the whole, else the model type."""
    named: list[str] | None = keys.holder("architectures").texts("architectures", None)
    model_type: str = keys.holder("model_type").text("model_type", "unnamed")
    return named[0] if named else model_type


def mtp_module(layer: Layer, hidden: int) -> MtpModule:
    """Return a DeepSeek-V3 style module: enorm, hnorm, eh_proj (H, 2H), one layer, and the shared head's norm.

    Source: DeepSeek-V3 technical report (arXiv:2412.19437) eq. 21-23; checkpoint tensors ``model.layers.61.*``.
    """
    return MtpModule(
        layer=layer,
        norms=tuple(Norm(name=name, size=hidden) for name in ("enorm", "hnorm", "shared_head.norm")),
        extras=(ExtraTensor(name="eh_proj.weight", shape=(hidden, 2 * hidden)),),
        stores_embedding=True,
        stores_head=True,
    )


def decoder(
    keys: Keys,
    hidden: int,
    layers: tuple[Layer, ...],
    *,
    tied_default: bool = False,
    norm_kind: NormKind = "rms",
    norm_weight: bool = True,
    norm_bias: bool = False,
    norm_name: str = "model.norm",
    context: tuple[str, ...] = ("max_position_embeddings",),
    mtp_layer: Layer | None = None,
    **frame: Any,
) -> Model:
    """Build the frame: vocabulary, tying, final norm, MTP modules, declared context, quantisation.

    ``mtp_layer`` is the layer of an MTP module; as many are made as ``num_nextn_predict_layers`` says.
    ``tied_default`` is the default of the family's config class. ``frame`` goes to :class:`Model` as it is.
    """
    from ullage.read.hf_config.quantization import read_quantization

    num_mtp = keys.integer("num_nextn_predict_layers", 0, low=0, high=64) if mtp_layer else 0
    keys.skip("tie_word_embeddings")
    settings: dict[str, Any] = {
        "vocab_size": 0 if "vocab_size" in frame else keys.integer("vocab_size"),
        "tied_embeddings": keys.holder("tie_word_embeddings").flag("tie_word_embeddings", tied_default),
        "final_norms": norms(hidden, norm_name, kind=norm_kind, weight=norm_weight, bias=norm_bias),
        "max_position_embeddings": keys.first_integer(*context, default=0, low=0),
        "mtp": (mtp_module(mtp_layer, hidden),) * num_mtp if mtp_layer else (),
    }
    return Model(
        name="",
        architecture=read_architecture(keys),
        hidden_size=hidden,
        dtype=read_dtype(keys),
        layers=layers,
        quantization=read_quantization(keys.holder("quantization_config")),
        **{**settings, **frame},
    )
