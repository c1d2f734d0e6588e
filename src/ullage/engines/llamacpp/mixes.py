"""Which ggml type each tensor gets in a file type (``Q4_K_M``, ``IQ4_XS``, ...), as the quantiser decides it.

Rules go by tensor category, position of the layer, grouped-query factor and number of experts.
Source: llama.cpp@007dbbf3:src/llama-quant.cpp:llama_tensor_get_type_impl, tensor_type_fallback,
tensor_allows_quantization (the file types that ik_llama.cpp adds start from their plain type:
ik_llama.cpp@8337e4cd:src/llama-quantize.cpp:llama_tensor_get_type).
"""

from __future__ import annotations

from ullage.account.gguf_types import BY_NAME, ggml_type
from ullage.engines.llamacpp.gguf_names import GgufTensor
from ullage.frozen import Frozen
from ullage.spec.model import Attention, LatentAttention, Model, MoEFFN

#: file type → the type that a tensor without a rule of its own gets
_BASES = {
    "Q2_K_S": "Q2_K",
    "Q3_K_S": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_L": "Q3_K",
    "Q4_K_S": "Q4_K",
    "Q4_K_M": "Q4_K",
    "Q5_K_S": "Q5_K",
    "Q5_K_M": "Q5_K",
    "IQ2_S": "IQ2_XS",
    "IQ2_M": "IQ2_S",
    "IQ3_XS": "IQ3_S",
    "IQ3_M": "IQ3_S",
    "IQ3_KL": "IQ3_K",
    "MXFP4_MOE": "MXFP4",
}
_VERY_LOW = ("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ2_S", "IQ2_M", "IQ1_M")
#: type whose blocks of 256 do not fill a row → type with blocks of 32
_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1"} | {
    "Q6_K": "Q8_0"
}


class MixFacts(Frozen):
    """What the rules look at. ``more_value_bits``: the 70B model's rule for attn_v."""

    num_layers: int
    num_experts: int
    gqa: int
    tied: bool
    more_value_bits: bool
    has_latent: bool


def mix_facts(model: Model) -> MixFacts:
    """Return what the quantiser knows of the model."""
    parts = [mixer for layer in model.layers for mixer in layer.mixers]
    gqa = next((part.num_heads // part.num_kv_heads for part in parts if isinstance(part, Attention)), 1)
    moe = next((ffn for layer in model.layers for ffn in layer.ffns if isinstance(ffn, MoEFFN)), None)
    return MixFacts(
        num_layers=len(model.layers),
        num_experts=moe.num_experts if moe else 0,
        gqa=gqa,
        tied=model.tied_embeddings,
        # the loader calls a dense model of 80 layers with grouped queries "70B"
        more_value_bits=len(model.layers) == 80 and gqa == 8 and moe is None,
        has_latent=any(isinstance(part, LatentAttention) for part in parts),
    )


def base_type(file_type: str) -> str | None:
    """Return the plain ggml type of a file type, or None when the name is not one."""
    name = file_type.upper()
    name = {"F16": "F16", "BF16": "BF16"}.get(name, name)
    return _BASES.get(name, name if name in BY_NAME else None)


def more_bits(layer: int, num_layers: int) -> bool:
    """Whether a layer is one of those that the _M mixes give more bits: the first and last eighth, then every third.

    Source: llama.cpp@007dbbf3:src/llama-quant.cpp:use_more_bits.
    """
    return layer < num_layers // 8 or layer >= 7 * num_layers // 8 or (layer - num_layers // 8) % 3 == 2


def category(name: str) -> str:
    """Return the quantiser's category of a tensor name."""
    for kind, endings in _CATEGORIES.items():
        if any(ending in name for ending in endings):
            return kind
    return "other"


_CATEGORIES = {
    "token_embd": ("token_embd.weight",),
    "value": ("attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight"),
    "key": ("attn_k.weight",),
    "query": ("attn_q.weight",),
    "attn_output": ("attn_output.weight",),
    "up": ("ffn_up",),
    "gate": ("ffn_gate",),
    "down": ("ffn_down",),
    "output": ("output.weight",),
}


def tensor_type(tensor: GgufTensor, file_type: str, facts: MixFacts, *, imatrix: bool = False) -> str:
    """Return the ggml type of ``tensor`` in a file of ``file_type``.

    ``imatrix``: made with an importance matrix, as most published IQ files are: then IQ4_XS, IQ4_NL and IQ3_XXS leave
    ffn_down alone, and Q4_0 and Q5_0 raise its first eighth.
    """
    name = file_type.upper()
    if tensor.vector or not tensor.name.endswith("weight") or "_norm." in tensor.name or "ssm_conv1d" in tensor.name:
        return "F32"
    base = base_type(name)
    if base is None:
        raise KeyError(file_type)
    if base in ("F32", "F16", "BF16"):
        return base
    chosen = _by_rule(tensor, name, base, facts)
    if imatrix and category(tensor.name) == "down":
        if name in ("IQ4_XS", "IQ4_NL", "IQ3_XXS"):
            chosen = base
        elif name in ("Q4_0", "Q5_0") and tensor.layer < facts.num_layers // 8:
            chosen = {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}[name]
    return _fitting(chosen, tensor.shape[-1])


def _fitting(chosen: str, columns: int) -> str:
    """Return a type whose blocks fill a row of ``columns``."""
    if columns % ggml_type(chosen).block_size == 0:
        return chosen
    chosen = _FALLBACK.get(chosen, "IQ4_NL")
    return chosen if columns % ggml_type(chosen).block_size == 0 else "F16"


def _by_rule(tensor: GgufTensor, name: str, base: str, facts: MixFacts) -> str:
    kind = category(tensor.name)
    if kind == "output" or (kind == "token_embd" and facts.tied):
        if name == "MXFP4_MOE":
            return "Q8_0"
        if name in _VERY_LOW or name == "IQ3_XXS":
            return "Q5_K"
        return base if base in ("Q8_0", "Q8_0_R8", "IQ6_K", "Q6_K_R4") else "Q6_K"
    if name == "MXFP4_MOE":
        return "MXFP4" if tensor.experts else "Q8_0"
    if kind == "token_embd":
        if name in ("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"):
            return "Q2_K"
        if name in ("IQ2_S", "IQ2_M", "IQ3_XXS"):
            return "IQ3_S"
        return {"TQ1_0": "Q4_K", "TQ2_0": "Q4_K"}.get(name, plain_of(base))
    if name in _VERY_LOW:
        return _very_low(kind, tensor.layer, name, base, facts)
    rule = _RULES.get(kind)
    return rule(tensor.layer, name, base, facts) if rule else base


def plain_of(kind: str) -> str:
    """Return the type without row interleaving: token embeddings are never interleaved."""
    return kind.rsplit("_R", 1)[0] if kind.endswith(("_R4", "_R8", "_R16")) else kind


def _very_low(kind: str, layer: int, name: str, base: str, facts: MixFacts) -> str:
    s_or_m = name in ("IQ2_S", "IQ2_M")
    if kind == "value":
        return "Q4_K" if facts.gqa >= 4 or facts.num_experts >= 4 else "IQ3_S" if s_or_m else "Q2_K"
    if kind == "key" and facts.num_experts == 8:
        return "Q4_K"
    if kind == "down" and layer < facts.num_layers // 8:
        return "IQ3_S" if s_or_m else "Q2_K"
    if kind == "attn_output":
        if facts.num_experts == 8:
            return "Q5_K"
        return "IQ2_XXS" if name in ("IQ1_S", "IQ1_M") else "IQ3_S" if s_or_m else base
    return base


def _value(layer: int, name: str, base: str, facts: MixFacts) -> str:
    grouped = facts.gqa >= 4
    by_name = {
        "Q2_K": "Q4_K" if grouped else "Q3_K",
        "Q2_K_S": "Q4_K" if grouped else base,
        "IQ3_XXS": "Q4_K" if grouped else "IQ3_S",
        "IQ3_XS": "Q4_K" if grouped else base,
        "IQ3_S": "Q4_K" if grouped else base,
        "IQ3_M": "Q4_K",
        "Q3_K_M": "Q5_K" if layer < 2 else "Q4_K",
        "Q3_K_L": "Q5_K",
        "IQ4_NL": "Q5_K" if grouped else base,
        "IQ4_XS": "Q5_K" if grouped else base,
        "Q4_K_S": "Q5_K" if layer < 4 else base,
    }
    chosen = by_name.get(name, base)
    if name in ("Q4_K_M", "Q5_K_M") and more_bits(layer, facts.num_layers):
        chosen = "Q6_K"
    if facts.more_value_bits and chosen in ("Q3_K", "Q4_K"):
        chosen = "Q5_K"
    return "Q8_0" if facts.num_experts == 8 else chosen


def _key(layer: int, name: str, base: str, facts: MixFacts) -> str:
    if facts.num_experts == 8:
        return "Q8_0"
    return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(name, base)


def _query(layer: int, name: str, base: str, facts: MixFacts) -> str:
    return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(name, base)


def _down(layer: int, name: str, base: str, facts: MixFacts) -> str:
    count = facts.num_layers
    early, more = layer < count // 8, more_bits(layer, count)
    by_name = {
        "Q2_K": "Q3_K",
        "Q2_K_S": "Q4_K" if early else base,
        "IQ3_XXS": "Q4_K" if early else "Q3_K",
        "Q3_K_M": "Q5_K" if layer < count // 16 else "Q4_K",
        "IQ3_M": "Q4_K" if early or (facts.num_experts == 8 and more) else base,
        "Q3_K_L": "Q5_K",
        "Q4_K_M": "Q6_K" if more else base,
        "IQ4_NL": "Q5_K" if early else base,
        "IQ4_XS": "Q5_K" if early else base,
        "Q5_K_M": "Q6_K" if more else base,
        "Q4_K_S": "Q5_K" if early else base,
    }
    return by_name.get(name, base)


def _attn_output(layer: int, name: str, base: str, facts: MixFacts) -> str:
    if facts.num_experts == 8:
        raised = ("Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S", "IQ3_M")
        return "Q5_K" if name in (*raised, "IQ4_XS") else base
    by_name = {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}
    return by_name.get(name, base)


def _up_or_gate(layer: int, name: str, base: str, facts: MixFacts) -> str:
    middle = facts.num_layers // 8 <= layer < 7 * facts.num_layers // 8
    return "IQ3_XXS" if name == "IQ3_XS" and middle else base


_RULES = {
    "value": _value,
    "key": _key,
    "query": _query,
    "down": _down,
    "attn_output": _attn_output,
    "up": _up_or_gate,
    "gate": _up_or_gate,
}
