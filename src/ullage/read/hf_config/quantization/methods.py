"""Quantisation methods with one format for all linear layers and a list of those left out.

Each function reads one ``quant_method`` and returns rules; the sources of the formats stand in
:mod:`ullage.read.hf_config.quantization.formats`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from ullage.errors import InputError, UnknownArchitectureError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.read.hf_config.keys import Keys
from ullage.read.hf_config.quantization import formats
from ullage.read.hf_config.quantization.patterns import MAX_NAMES, TOWERS, fold_modules
from ullage.spec.model import QuantRule
from ullage.units import WeightFormat

Rules = tuple[QuantRule, ...]

#: Linear layers of DeepSeek-style checkpoints that no fp8 checkpoint quantises: the projection of an MTP module, the
#: indexer's head weights, V4's compressors. Source: the checkpoint headers of DeepSeek-R1, V3.2 and V4-Pro;
#: vllm@0.33.0:vllm/model_executor/models/deepseek_mtp.py, deepseek_v2.py (built without a quantisation config).
_PLAIN_IN_DEEPSEEK = r"\.(?:eh_proj|weights_proj|compressor)\."


class Context(Frozen):
    """What a quantisation config needs of the config around it."""

    model_type: str = ""
    num_layers: int = 0
    expert_dtype: str | None = None


def names(part: Keys, *keys: str) -> list[str]:
    """Return the strings of the first of several list keys that is there."""
    for key in keys:
        found = part.raw(key)
        if found is None:
            continue
        if not isinstance(found, list) or len(found) > MAX_NAMES or not all(isinstance(name, str) for name in found):
            raise InputError(_("{value} is not a list of names").format(value=repr(found)[:60]), where=part.at(key))
        for name in found:
            check_pattern(name, part.at(key))
        return found
    return []


_NESTED_REPEAT = re.compile(r"\([^()]*[*+}][^()]*\)[*+{]")


def check_pattern(name: str, where: str) -> None:
    """Refuse names and expressions whose matching could take unbounded time."""
    expression = name.startswith("re:")
    if len(name) > 4096 or name.count("*") > 8 or (expression and _NESTED_REPEAT.search(name)):
        raise InputError(_("{name!r} is too long or too intricate a pattern").format(name=name[:60]), where=where)


def unknown(what: str, where: str) -> UnknownArchitectureError:
    """Return the error for a quantisation that is not understood."""
    return UnknownArchitectureError(
        _("the quantisation {what!r} is not understood").format(what=what[:80]), where=where, keys=(what[:80],)
    )


def table(part: Keys, key: str) -> dict[str, Any]:
    """Take an object of free names; a missing one is empty."""
    found = part.raw(key)
    if found is None:
        return {}
    if not isinstance(found, dict) or len(found) > MAX_NAMES or not all(isinstance(name, str) for name in found):
        raise InputError(_("{value} is not an object").format(value=repr(found)[:60]), where=part.at(key))
    return found


def keep(patterns: Iterable[str]) -> Rules:
    """Return rules that leave tensors in the model's dtype."""
    return tuple(QuantRule(pattern=pattern, format=None) for pattern in patterns)


def all_linear(format_: WeightFormat | None, skipped: Iterable[str] = ()) -> Rules:
    """Return the usual rules: skipped modules and towers stay, every other linear layer has ``format_``."""
    return (*keep((*skipped, TOWERS)), QuantRule(pattern="", format=format_))


def _fp8(part: Keys, context: Context) -> Rules:
    """fp8: per block when ``weight_block_size`` is there, else per tensor; static activations add a scale.

    DeepSeek-V4 stores e8m0 scales and, when ``expert_dtype`` says fp4, its routed experts as mxfp4.
    """
    skipped = fold_modules(names(part, "modules_to_not_convert", "ignored_layers"), num_layers=context.num_layers)
    block = part.items("weight_block_size", None, length=2)
    is_v4 = context.model_type.startswith("deepseek_v4") or context.expert_dtype is not None
    if block is None:
        format_ = formats.fp8_per_tensor(static=part.text("activation_scheme", "dynamic") == "static")
    else:
        format_ = formats.fp8_block(*_block(part, block), scale_dtype="float8_e8m0" if is_v4 else "float32")
    rules = all_linear(format_, (*skipped, _PLAIN_IN_DEEPSEEK))
    if context.expert_dtype == "fp4":
        return (QuantRule(pattern=r"\.experts\.", format=formats.mxfp4()), *rules)
    if context.expert_dtype not in (None, "fp8"):
        raise unknown(f"expert_dtype {context.expert_dtype}", part.where)
    return rules


def _block(part: Keys, block: list[Any]) -> tuple[int, int]:
    if not all(isinstance(size, int) and 0 < size <= 2**20 for size in block):
        raise InputError(_("{value} is not a block size").format(value=repr(block)[:60]), where=part.where)
    return block[0], block[1]


def _fbgemm_fp8(part: Keys, context: Context) -> Rules:
    skipped = fold_modules(names(part, "modules_to_not_convert"), num_layers=context.num_layers)
    return all_linear(replace(formats.fp8_per_row(), tensor_scales=1), skipped)


def _mxfp4(part: Keys, context: Context) -> Rules:
    """Quantised experts only (gpt-oss): vllm@0.33.0:vllm/model_executor/layers/quantization/mxfp4.py."""
    skipped = fold_modules(names(part, "modules_to_not_convert"), num_layers=context.num_layers)
    experts = QuantRule(pattern=r"\.experts\.", format=formats.mxfp4())
    return (*keep(skipped), experts, QuantRule(pattern="", format=None))


def _w4afp8(part: Keys, context: Context) -> Rules:
    """w4afp8: routed experts in 4 bit, every other linear layer in fp8 of 128 x 128 whatever the file says.

    Source: sglang@0.5.23:python/sglang/srt/layers/quantization/w4afp8.py:W4AFp8Config.
    """
    skipped = fold_modules(names(part, "modules_to_not_convert", "ignored_layers"), num_layers=context.num_layers)
    return mixed_experts(formats.w4afp8(), formats.fp8_block(), skipped)


def mixed_experts(experts: WeightFormat, others: WeightFormat, skipped: Iterable[str] = ()) -> Rules:
    """Return rules for routed experts in one format and every other linear layer of a DeepSeek-like file in another."""
    return (QuantRule(pattern=r"\.experts\.", format=experts), *all_linear(others, (*skipped, _PLAIN_IN_DEEPSEEK)))


def _bits(part: Keys, *keys: str, default: int | None = None) -> int:
    bits = part.first_integer(*keys, default=default, high=8) if default else part.first_integer(*keys, high=8)
    if formats.int_dtype(bits) is None:
        raise unknown(_("{bits} bits").format(bits=bits), part.where)
    return int(bits)


def _group(part: Keys, *keys: str, default: int) -> int:
    return int(part.first_integer(*keys, default=default, low=-1, high=2**20))


def _awq(part: Keys, context: Context) -> Rules:
    skipped = fold_modules(names(part, "modules_to_not_convert"), num_layers=context.num_layers)
    return all_linear(
        formats.awq(
            _bits(part, "bits", "w_bit", default=4),
            _group(part, "group_size", "q_group_size", default=128),
            zero_point=part.flag("zero_point", True),
        ),
        skipped,
    )


def _gptq(part: Keys, context: Context) -> Rules:
    """GPTQ, with GPTQModel's ``dynamic``: ``-:pattern`` leaves modules out, ``+:pattern`` changes bits and group."""
    bits, group = _bits(part, "bits", default=4), _group(part, "group_size", default=128)
    special: list[QuantRule] = []
    for name, change in table(part, "dynamic").items():
        check_pattern("re:" + name, part.at("dynamic"))
        pattern = compile_checked(name.removeprefix("-:").removeprefix("+:"), part.at("dynamic"))
        if name.startswith("-:"):
            special.append(QuantRule(pattern=pattern, format=None))
        else:
            own = Keys(change if isinstance(change, dict) else {}, part.at("dynamic"))
            own_format = formats.gptq(_bits(own, "bits", default=bits), _group(own, "group_size", default=group))
            special.append(QuantRule(pattern=pattern, format=own_format))
    skipped = fold_modules(names(part, "modules_to_not_convert"), num_layers=context.num_layers)
    if part.flag("lm_head", False):
        special.append(QuantRule(pattern=r"(?:^|\.)lm_head\.", format=formats.gptq(bits, group)))
    return (*special, *all_linear(formats.gptq(bits, group), skipped))


def compile_checked(pattern: str, where: str) -> str:
    """Return ``pattern`` if it is a regular expression.

    Raises:
        InputError: it is not.
    """
    try:
        re.compile(pattern)
    except re.error:
        raise InputError(_("{name!r} is not a regular expression").format(name=pattern[:60]), where=where) from None
    return pattern


def _bitsandbytes(part: Keys, context: Context) -> Rules:
    """bitsandbytes: transformers and vLLM leave lm_head and ``llm_int8_skip_modules`` out."""
    skipped = fold_modules(names(part, "llm_int8_skip_modules"), num_layers=context.num_layers)
    if part.flag("load_in_8bit", False) or part.flag("_load_in_8bit", False):
        return all_linear(formats.int8_per_row("float32"), skipped)
    kind = part.text("bnb_4bit_quant_type", "fp4")
    if kind not in ("nf4", "fp4"):
        raise unknown(kind, part.where)
    return all_linear(formats.bnb_4bit(kind, double_quant=part.flag("bnb_4bit_use_double_quant", False)), skipped)


def _auto_round(part: Keys, context: Context) -> Rules:
    """AutoRound in GPTQ or AWQ packing; ``extra_config`` names modules with bits of their own (16: left out)."""
    bits, group = _bits(part, "bits", default=4), _group(part, "group_size", default=128)
    packing = part.text("packing_format", "auto_round:auto_gptq")

    def packed(own_bits: int, own_group: int) -> WeightFormat:
        return formats.awq(own_bits, own_group) if "awq" in packing else formats.gptq(own_bits, own_group)

    by_format: dict[WeightFormat | None, list[str]] = {}
    for name, change in table(part, "extra_config").items():
        check_pattern(name, part.at("extra_config"))
        own = Keys(change if isinstance(change, dict) else {}, part.at("extra_config"))
        own_bits = own.integer("bits", bits, high=32)
        own_format = (
            None
            if own_bits >= 16
            else packed(_bits(own, "bits", default=bits), _group(own, "group_size", default=group))
        )
        by_format.setdefault(own_format, []).append(name)
    special = tuple(
        QuantRule(pattern=pattern, format=own_format)
        for own_format, modules in by_format.items()
        for pattern in fold_modules(modules, num_layers=context.num_layers)
    )
    skipped = fold_modules(names(part, "modules_to_not_convert"), num_layers=context.num_layers)
    return (*special, *all_linear(packed(bits, group), skipped))


_HQQ_KEYS = frozenset({"weight_quant_params", "scale_quant_params", "zero_quant_params", "offload_meta"})


def _bitnet(part: Keys, context: Context) -> Rules:
    """BitNet: four ternary weights to a byte and one scale per tensor; online, the file keeps plain weights.

    Source: transformers@5.23.0:integrations/bitnet.py:BitLinear, AutoBitLinear, replace_with_bitnet_linear.
    """
    skipped = fold_modules(names(part, "modules_to_not_convert"), num_layers=context.num_layers)
    mode = part.text("quantization_mode", "offline")
    if mode == "online":
        return all_linear(None, skipped)
    if mode != "offline":
        raise unknown(f"bitnet {mode}", part.where)
    return all_linear(formats.ternary(), skipped)


def _hqq(part: Keys, context: Context) -> Rules:
    """HQQ: packed integers, fp16 scale and zero point per group along the input axis."""
    inner = Keys(table(part, "quant_config"), part.at("quant_config"))
    by_layer = [name for name in inner.values if name not in _HQQ_KEYS]
    if by_layer:  # settings of their own for some modules, by their tags
        raise unknown(f"hqq {by_layer[0]}", part.at("quant_config"))
    weights = Keys(table(inner, "weight_quant_params"), part.at("quant_config"))
    bits, group = _bits(weights, "nbits", default=4), _group(weights, "group_size", default=64)
    skipped = fold_modules(names(part, "skip_modules"), num_layers=context.num_layers)
    base = formats.awq(bits, group)
    return all_linear(replace(base, name=f"hqq int{bits} group {group}", zero_point_dtype="float16"), skipped)


def _eetq(part: Keys, context: Context) -> Rules:
    skipped = fold_modules(names(part, "modules_to_not_convert"), num_layers=context.num_layers)
    return all_linear(formats.int8_per_row("float16"), skipped)


#: ``quant_method`` -> reader; compressed-tensors, modelopt, quark and torchao have files of their own.
SIMPLE: dict[str, Callable[[Keys, Context], Rules]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm_fp8,
    "mxfp4": _mxfp4,
    "w4afp8": _w4afp8,
    "awq": _awq,
    "gptq": _gptq,
    "bitnet": _bitnet,
    "bitsandbytes": _bitsandbytes,
    "auto-round": _auto_round,
    "intel/auto-round": _auto_round,
    "hqq": _hqq,
    "eetq": _eetq,
}
