"""NVIDIA ModelOpt checkpoints: one algorithm, or one per module, and globs of what is left out.

The description stands in ``quantization_config`` (newer) or in ``hf_quant_config.json`` beside ``config.json`` (older).
Source: vllm@0.33.0:vllm/model_executor/layers/quantization/modelopt.py:LINEAR_ALGOS, ModelOptQuantConfigBase.
"""

from __future__ import annotations

from typing import Any

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.hf_config.keys import Keys
from ullage.read.hf_config.quantization import compressed_tensors, formats
from ullage.read.hf_config.quantization.methods import (
    Context,
    Rules,
    all_linear,
    check_pattern,
    keep,
    names,
    unknown,
)
from ullage.read.hf_config.quantization.patterns import MAX_NAMES, TOWERS, fold_modules
from ullage.spec.model import QuantRule
from ullage.units import WeightFormat


def algorithm(name: str, group_size: int | None, where: str) -> WeightFormat | None:
    """Return the format of a ``quant_algo``; None for an algorithm that leaves weights alone.

    Raises:
        UnknownArchitectureError: not understood.
    """
    found: dict[str, WeightFormat] = {
        "FP8": formats.fp8_per_tensor(static=True),
        "FP8_PER_CHANNEL_PER_TOKEN": formats.fp8_per_row(),
        "FP8_PB_WO": formats.fp8_block(),
        "FP8_PB_REAL": formats.fp8_block(),
        "NVFP4": formats.nvfp4(group_size or 16),
        "NVFP4_AWQ": formats.nvfp4(group_size or 16),
        "W4A16_NVFP4": formats.nvfp4(group_size or 16, activations=False),
        "MXFP8": formats.mxfp8(),
        "MXFP4": formats.mxfp4(),
        "W4A8_MXFP4_FP8": formats.mxfp4(),
        "W4A16_AWQ": formats.awq(4, group_size or 128, zero_point=False),
        "INT4_AWQ": formats.awq(4, group_size or 128, zero_point=False),
        "W4A8_AWQ": formats.awq(4, group_size or 128, zero_point=False),
        "W8A16": formats.int8_per_row("float16"),
        "W8A8_SQ_PER_CHANNEL": formats.int8_per_row("float32"),
    }
    key = name.upper()
    if key in ("", "NONE", "NO_QUANT"):
        return None
    if key not in found:
        raise unknown(f"quant_algo {name}", where)
    return found[key]


def read(part: Keys, context: Context, *, base: Rules = ()) -> Rules:
    """Read the newer or the older form. ``base``: rules for what is not listed in a mixed checkpoint.

    Raises:
        UnknownArchitectureError: an algorithm that is not understood.
    """
    name = part.text("quant_algo", "")
    excluded = fold_modules(names(part, "exclude_modules", "ignore"), num_layers=context.num_layers)
    group = part.integer("group_size", None, high=2**20)
    if name.upper() == "MIXED_PRECISION" or part.raw("quantized_layers"):
        listed = _quantized_layers(part, context, group)
        return (*listed, *(base or (*keep(excluded), QuantRule(pattern="", format=None))))
    if not name:
        return compressed_tensors.read(part, context)
    if group is None:
        group = _group_of(part)
    return (*keep((*excluded, TOWERS)), *all_linear(algorithm(name, group, part.where)))


def _group_of(part: Keys) -> int | None:
    for _name, group in compressed_tensors.groups(part):
        weights: Any = group.raw("weights")
        if isinstance(weights, dict) and isinstance(weights.get("group_size"), int):
            return int(weights["group_size"])
    return None


def _quantized_layers(part: Keys, context: Context, group: int | None) -> Rules:
    listed = part.raw("quantized_layers") or {}
    if not isinstance(listed, dict) or len(listed) > MAX_NAMES:
        raise InputError(
            _("{value} is not an object").format(value=repr(listed)[:60]), where=part.at("quantized_layers")
        )
    by_format: dict[WeightFormat | None, list[str]] = {}
    known: dict[tuple[str, int | None], WeightFormat | None] = {}
    for module, values in listed.items():
        where = part.at("quantized_layers")
        check_pattern(module, where)
        own = Keys(values if isinstance(values, dict) else {}, where)
        key = (own.text("quant_algo", ""), own.integer("group_size", group, high=2**20))
        if key not in known:
            known[key] = algorithm(*key, where)
        by_format.setdefault(known[key], []).append(module)
    return tuple(
        QuantRule(pattern=pattern, format=format_)
        for format_, modules in by_format.items()
        for pattern in fold_modules(modules, num_layers=context.num_layers)
    )
