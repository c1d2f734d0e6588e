"""compressed-tensors checkpoints (llm-compressor): groups of modules, each with a scheme and a packing.

Source: vllm@0.33.0:vllm/model_executor/layers/quantization/compressed_tensors/compressed_tensors.py and schemes/;
compressed-tensors:src/compressed_tensors/quantization/quant_args.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.hf_config.keys import Keys
from ullage.read.hf_config.quantization import formats
from ullage.read.hf_config.quantization.methods import (
    Context,
    Rules,
    all_linear,
    compile_checked,
    keep,
    names,
    unknown,
)
from ullage.read.hf_config.quantization.patterns import TOWERS, fold_modules
from ullage.spec.model import QuantRule
from ullage.units import WeightFormat, plain

#: Classes that stand for every linear layer in a list of targets.
_EVERY_LINEAR = frozenset(("Linear", "LinearBase", "FusedMoE", "ParallelLMHead"))
_SPARSE_FORMATS = {"sparse-24-bitmask": (2, 4), "sparse-24": (2, 4), "marlin-24": (2, 4)}
MAX_GROUPS = 1000


def read(part: Keys, context: Context) -> Rules:
    """Read ``config_groups``, ``ignore`` and ``sparsity_config``.

    Raises:
        UnknownArchitectureError: a scheme that is not understood.
    """
    sparsity = _sparsity(part)
    ignored = keep(target_patterns(names(part, "ignore"), context, part))
    by_name: list[QuantRule] = []
    everywhere: WeightFormat | None = None
    for where, group in groups(part):
        own = _scheme(group, group.text("format", None) or part.text("format", "dense"), sparsity)
        targets = names(group, "targets") or ["Linear"]
        if any(target in _EVERY_LINEAR for target in targets):
            everywhere = own
        named = [target for target in targets if target not in _EVERY_LINEAR]
        by_name += [QuantRule(pattern=pattern, format=own) for pattern in target_patterns(named, context, group)]
        del where
    if everywhere is None and not by_name and sparsity is not None:
        everywhere = formats.sparse(plain("bfloat16"), *sparsity)
    if everywhere is None:
        return (*ignored, *by_name, QuantRule(pattern="", format=None))
    return (*ignored, *keep((TOWERS,)), *by_name, *all_linear(everywhere))


def groups(part: Keys) -> list[tuple[str, Keys]]:
    """Return the named groups of ``config_groups``."""
    found = part.raw("config_groups") or {}
    if not isinstance(found, dict) or len(found) > MAX_GROUPS:
        raise InputError(_("{value} is not an object of groups").format(value=repr(found)[:60]), where=part.where)
    for name, group in found.items():
        if not isinstance(group, dict):
            raise InputError(_("{value} is not an object").format(value=repr(group)[:60]), where=part.at(name))
    return [(name, Keys(group, part.at(name))) for name, group in found.items()]


def target_patterns(targets: list[str], context: Context, part: Keys) -> tuple[str, ...]:
    """Return patterns of module names; those that begin with ``re:`` are matched from the start of the name."""
    expressions = [target.removeprefix("re:") for target in targets if target.startswith("re:")]
    plain_names = [target for target in targets if not target.startswith("re:")]
    matched = [compile_checked("^(?:" + text + ")", part.where) for text in expressions]
    return (*matched, *fold_modules(plain_names, num_layers=context.num_layers))


def _sparsity(part: Keys) -> tuple[int, int] | None:
    """Return (kept, out of) of a sparse checkpoint, None for dense storage."""
    own_format = part.text("format", "")
    if own_format in _SPARSE_FORMATS:
        return _SPARSE_FORMATS[own_format]
    config = part.raw("sparsity_config")
    if not isinstance(config, dict):
        return None
    kind = Keys(config, part.at("sparsity_config")).text("format", "dense")
    if kind in ("dense", ""):
        return None
    if kind not in _SPARSE_FORMATS:
        raise unknown(str(kind), part.at("sparsity_config"))
    return _SPARSE_FORMATS[kind]


def _scheme(group: Keys, packing: str, sparsity: tuple[int, int] | None) -> WeightFormat | None:
    weights = group.raw("weights")
    if not isinstance(weights, dict):
        return formats.sparse(plain("bfloat16"), *sparsity) if sparsity else None
    activations: Any = group.raw("input_activations")
    static = isinstance(activations, dict) and activations.get("dynamic") is False
    own = weight_format(Keys(weights, group.at("weights")), packing, static=static)
    return formats.sparse(own, *sparsity) if sparsity else own


def weight_format(weights: Keys, packing: str, *, static: bool) -> WeightFormat:
    """Return the format of a quantisation scheme: type, bits, strategy and group decide.

    Raises:
        UnknownArchitectureError: a combination that is not understood.
    """
    bits, kind = weights.integer("num_bits", 8, high=16), weights.text("type", "int")
    group = weights.integer("group_size", 0, low=-1, high=2**20)
    default = "group" if group > 0 else "tensor"
    strategy = weights.text("strategy", default)
    if kind == "float" and bits == 4:
        if "mxfp4" in packing or "uint8" in str(weights.raw("scale_dtype")) or group == 32:
            return formats.mxfp4(group or 32)
        return formats.nvfp4(group or 16, activations=static)
    if kind == "float" and bits == 8:
        return _float8(weights, strategy, group, static=static)
    if kind == "int" and formats.int_dtype(bits) is not None:
        return _integer(weights, bits, strategy, group, packing)
    raise unknown(f"{kind}{bits} {strategy}", weights.where)


def _float8(weights: Keys, strategy: str, group: int, *, static: bool) -> WeightFormat:
    if strategy == "tensor":
        return formats.fp8_per_tensor(static=static)
    if strategy == "channel":
        return replace(formats.fp8_per_row("bfloat16"), tensor_scales=1 if static else 0)
    if strategy == "block":
        rows, columns = weights.items("block_structure", [128, 128], length=2)
        return formats.fp8_block(rows, columns, scale_dtype="bfloat16")
    if strategy == "group" and group == 32:
        return formats.mxfp8()
    if strategy == "group" and group > 0:
        return formats.fp8_block(1, group, scale_dtype="bfloat16")
    raise unknown(f"float8 {strategy}", weights.where)


def _integer(weights: Keys, bits: int, strategy: str, group: int, packing: str) -> WeightFormat:
    symmetric = weights.flag("symmetric", True)
    if bits == 8 and packing not in ("pack-quantized", "marlin-24"):
        if strategy == "tensor":
            return WeightFormat(name="int8 per tensor", dtype="int8", tensor_scales=1 if symmetric else 2)
        if strategy == "channel":
            return replace(formats.int8_per_row(), zero_point_dtype=None if symmetric else "int8")
    if strategy not in ("group", "channel"):
        raise unknown(f"int{bits} {strategy}", weights.where)
    reorder = weights.raw("actorder") in ("group", True)
    return formats.int_packed(bits, group if strategy == "group" else 0, symmetric=symmetric, reorder=reorder)
