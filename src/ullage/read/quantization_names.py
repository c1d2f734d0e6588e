"""Quantisations by name: ``--quantization awq_int4``, ``fp8`` on the fly, ``nvfp4``, ``2:4``.

A name stands for what the usual tool makes by default: every linear layer of the decoder, experts included;
embeddings, output head, routers, norms, convolutions and towers stay in 16 bit. A checkpoint that is quantised that way
already keeps its own rules, which say more than the name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.read.hf_config.quantization import formats
from ullage.read.hf_config.quantization.methods import Rules, all_linear, mixed_experts
from ullage.spec.model import LatentAttention, Model, MoEFFN, Quantization, QuantRule
from ullage.units import plain

__all__ = ["MADE_AT_LOAD", "NAMES", "assumption", "named_quantization", "release"]


class _Named(Frozen):
    """``methods``: checkpoint methods that this name also stands for; ``assumed``: what the name leaves open."""

    rules: Callable[[Model], Rules]
    methods: tuple[str, ...] = ()
    assumed: str = ""


def _linear_mxfp4(model: Model) -> Rules:
    """mxfp4: the routed experts of a mixture (gpt-oss; vllm mxfp4.py leaves the rest), every linear layer otherwise."""
    if any(isinstance(block, MoEFFN) for layer in model.layers for block in layer.ffns):
        return (QuantRule(pattern=r"\.experts\.", format=formats.mxfp4()), QuantRule(pattern="", format=None))
    return all_linear(formats.mxfp4())


def _fbgemm(model: Model) -> Rules:
    """Per-row fp8 of Meta's Llama 3.1 405B: feed-forward only, first and last layer left out.

    Source: arXiv:2407.21783 sec. 6.2.
    """
    last = len(model.layers) - 1
    edges = rf"^{re.escape(model.layers_name)}\.(?:0|{last})\."
    skipped = (r"\.self_attn\.", edges)
    return all_linear(replace(formats.fp8_per_row(), tensor_scales=1), skipped)


def _nvfp4(model: Model) -> Rules:
    """NVFP4: every linear layer; latent attention keeps its projections to and from latents, the indexer whole.

    Source: hf_quant_config.json of nvidia/DeepSeek-V3.1-NVFP4 (q_a, q_b, kv_a, kv_b excluded in every layer) and
        nvidia/DeepSeek-V3.2-NVFP4 (indexer too). Releases for other models leave out more (all attention: Kimi-K2.6).
    """
    latent = any(isinstance(mixer, LatentAttention) for layer in model.layers for mixer in layer.mixers)
    skipped = (r"\.self_attn\.(?:q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|indexer\.)",) if latent else ()
    return all_linear(formats.nvfp4(), skipped)


def _experts_int8(_model: Model) -> Rules:
    """VLLM ``experts_int8``: routed experts only, one scale per row (experts_int8.py)."""
    experts = QuantRule(pattern=r"\.experts\.", format=formats.int8_per_row("float32"))
    return (experts, QuantRule(pattern="", format=None))


def _sparse(kept: int, of: int) -> Callable[[Model], Rules]:
    return lambda model: all_linear(formats.sparse(plain(model.dtype), kept, of))


_GROUP_128 = "group size 128, the usual default"

#: name -> what it stands for.
NAMES: dict[str, _Named] = {
    "fp8": _Named(rules=lambda model: all_linear(formats.fp8_per_tensor()), methods=("fp8", "fbgemm_fp8")),
    "fp8_block": _Named(rules=lambda model: all_linear(formats.fp8_block()), methods=("fp8",)),
    "fp8_dynamic": _Named(rules=lambda model: all_linear(formats.fp8_per_row("bfloat16")), methods=("compressed",)),
    "ptpc_fp8": _Named(rules=lambda model: all_linear(formats.fp8_per_row())),
    "fbgemm_fp8": _Named(rules=_fbgemm, methods=("fbgemm_fp8",)),
    "mxfp8": _Named(rules=lambda model: all_linear(formats.mxfp8())),
    "awq_int4": _Named(rules=lambda model: all_linear(formats.awq()), methods=("awq",), assumed=_GROUP_128),
    "gptq_int4": _Named(rules=lambda model: all_linear(formats.gptq()), methods=("gptq",), assumed=_GROUP_128),
    "gptq_int8": _Named(rules=lambda model: all_linear(formats.gptq(8)), methods=("gptq",), assumed=_GROUP_128),
    "autoround_int4": _Named(
        rules=lambda model: all_linear(formats.gptq()), methods=("auto-round",), assumed=_GROUP_128
    ),
    "int4": _Named(
        rules=lambda model: all_linear(formats.int_packed(4, 128)),
        methods=("compressed", "awq", "gptq", "auto-round"),
        assumed=_GROUP_128,
    ),
    "w8a8_int8": _Named(rules=lambda model: all_linear(formats.int8_per_row()), methods=("compressed",)),
    "nvfp4": _Named(rules=_nvfp4, methods=("modelopt", "compressed")),
    "mxfp4": _Named(rules=_linear_mxfp4, methods=("mxfp4",)),
    "bnb_nf4": _Named(rules=lambda model: all_linear(formats.bnb_4bit()), methods=("bitsandbytes",)),
    "bnb_fp4": _Named(rules=lambda model: all_linear(formats.bnb_4bit("fp4")), methods=("bitsandbytes",)),
    "bnb_int8": _Named(rules=lambda model: all_linear(formats.int8_per_row("float32")), methods=("bitsandbytes",)),
    "experts_int8": _Named(rules=_experts_int8),
    "w4afp8": _Named(rules=lambda model: mixed_experts(formats.w4afp8(), formats.fp8_block()), methods=("w4afp8",)),
    "2:4": _Named(rules=_sparse(2, 4)),
    "4:8": _Named(rules=_sparse(4, 8)),
}
#: What engines make of 16-bit weights while they load them -> their word for it.
#: Source: vllm@0.33.0:vllm/model_executor/layers/quantization/__init__.py; sglang@0.5.23:srt/layers/quantization.
MADE_AT_LOAD = {
    "fp8": "fp8", "mxfp8": "mxfp8", "ptpc_fp8": "ptpc_fp8", "experts_int8": "experts_int8", "bnb_nf4": "bitsandbytes",
}  # fmt: skip
_ALIASES = {
    "awq": "awq_int4",
    "awq_marlin": "awq_int4",
    "gptq": "gptq_int4",
    "gptq_marlin": "gptq_int4",
    "auto_round": "autoround_int4",
    "autoround": "autoround_int4",
    "int4_autoround": "autoround_int4",
    "int8": "w8a8_int8",
    "w8a8": "w8a8_int8",
    "w8a8_fp8": "fp8_dynamic",
    "fp8_e4m3": "fp8",
    "fp8_fbgemm": "fbgemm_fp8",
    "fp8_online": "fp8",
    "fp8_per_tensor": "fp8",
    "fp8_per_channel": "fp8_dynamic",
    "fp8_per_block": "fp8_block",
    "int8_per_channel_weight_only": "experts_int8",
    "fp8_compressed_tensors": "fp8_dynamic",
    "modelopt": "fp8",
    "modelopt_fp4": "nvfp4",
    "nvfp4_modelopt_fp4": "nvfp4",
    "deepseek_v4_fp8": "fp8_block",
    "fp8_deepseek_v4_fp8": "fp8_block",
    "nf4": "bnb_nf4",
    "bitsandbytes": "bnb_nf4",
    "bnb": "bnb_nf4",
    "int4_compressed_tensors": "int4",
    "w4a16": "int4",
    "moe_wna16": "int4",
    "int4_w4a16": "int4",
}
MAX_NAME = 200


def _canonical(name: str) -> str | None:
    """Return the key of :data:`NAMES`: whole, then with what stands in brackets, then without it."""
    text = name.strip().lower()[:MAX_NAME]
    inside = " ".join(re.findall(r"\(([^()]*)\)", text)).split(",")[0]
    bare = re.sub(r"\([^()]*\)", "", text)
    for candidate in (text, f"{bare} {inside.split(' from ')[0]}", bare):
        key = re.sub(r"[\s\-]+", "_", candidate.strip())
        key = _ALIASES.get(key, key)
        if key in NAMES:
            return key
    return None


def named_quantization(name: str, model: Model) -> Quantization:
    """Return the quantisation called ``name`` for ``model``.

    A checkpoint quantised by a method that the name stands for keeps its own rules. ``method`` of the result is the
    name as understood; what the name leaves open stands in :func:`assumption`.

    Raises:
        InputError: the name is not known.
    """
    key = _canonical(name)
    own = model.quantization
    if own is not None and (own.method in name.lower() if key is None else _own_words(name, own.method)):
        return own
    if key is None:
        raise InputError(
            _("unknown quantisation {name!r}").format(name=name[:80]),
            remedy=_("known are {known}; GGUF types are written gguf:Q4_K_M").format(known=", ".join(NAMES)),
        )
    named = NAMES[key]
    if own is not None and any(own.method.startswith(method) for method in named.methods):
        return own
    return Quantization(method=key, rules=named.rules(model))


def _own_words(name: str, method: str) -> bool:
    """Tell an engine's name for the checkpoint's own method: ``modelopt_fp4`` for ``modelopt``."""
    return re.fullmatch(rf"{re.escape(method)}(?:[_-](?:fp4|fp8|mixed|marlin))?", name.strip().lower()) is not None


def release(model: Model, name: str) -> tuple[Model, str | None]:
    """Return the model as people mean it who ask for weights in ``name``, and what is left for the engine to make.

    A checkpoint that is stored so stays, and so do 16-bit weights that engines quantise while they load them
    (:data:`MADE_AT_LOAD`); else a release that is stored so is meant: engines refuse to read a checkpoint by another
    method than its own (vllm@0.33.0:vllm/config/model.py:_verify_quantization).

    Raises:
        InputError: the name is not known.
    """
    found = named_quantization(name, model)
    if found == model.quantization:
        return model, None
    if model.quantization is None and found.method in MADE_AT_LOAD:
        return model, name
    said = [_("weights as a usual release in {name} stores them").format(name=name[:40])]
    if model.quantization is not None:
        said[0] += _("; {model} itself is in {own}").format(model=model.name, own=model.quantization.method)
    said += [assumption(name)] if assumption(name) else []
    return replace(model, quantization=found, assumed=(*model.assumed, *said)), name


def assumption(name: str) -> str:
    """Return what a quantisation's name leaves open, empty when nothing is."""
    key = _canonical(name)
    return NAMES[key].assumed if key else ""
