"""Stored tensors (safetensors headers) → the quantisation they show, tensor by tensor.

A config says how a checkpoint should be stored, its headers say how it is. The headers become rules like any others, so
that every engine and split counts with them; what they cannot explain is listed, never dropped in silence.
"""

from __future__ import annotations

import math
from functools import lru_cache

from ullage.account.parameters import Parameter
from ullage.account.sharding import rank_parameters, whole
from ullage.frozen import Frozen
from ullage.read.hf_config.quantization.patterns import fold_modules
from ullage.read.safetensors_header import StoredTensor, StoredTensors
from ullage.spec.model import Model, Quantization, QuantRule
from ullage.units import WeightFormat, cdiv, plain

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_PACKED_BITS = {2: "int2", 3: "int3", 4: "int4", 8: "int8"}
#: Where a module's values stand, by the makers of checkpoints.
_VALUES = ("weight", "weight_packed", "qweight", "W_q")
_GROUPS = (16, 32, 64, 128, 256, 512, 1024)
_SQUARES = (128, 64, 32, 256)


class StoredReading(Frozen):
    """What headers say of a model.

    Attributes:
        quantization: a rule for every tensor that was found and understood.
        missing: tensors of the model that are not stored under their names.
        unexplained: stored tensors that belong to none of the model's tensors, or in a layout not understood.
    """

    quantization: Quantization
    missing: tuple[str, ...]
    unexplained: tuple[str, ...]


def read_stored_quantization(model: Model, stored: StoredTensors) -> StoredReading:
    """Return how ``stored`` holds the tensors of ``model``, experts one by one checked against the first.

    With ``missing`` and ``unexplained`` empty, the stored bytes are exactly the model's checkpoint bytes.
    """
    modules: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in stored.tensors.items():
        module, _dot, ending = name.rpartition(".")
        modules.setdefault(module, {})[ending] = tensor
    by_format: dict[WeightFormat, list[str]] = {}
    missing: list[str] = []
    explained: set[str] = set()
    for held in rank_parameters(model, whole(model)):
        parameter = held.placed.parameter
        found = _explain(parameter, modules, stored, explained)
        if found is None:
            missing.append(parameter.name)
        elif parameter.dtype is None:
            by_format.setdefault(found, []).append(_rule_name(parameter.name))
    rules = [
        QuantRule(pattern=pattern, format=format_)
        for format_, names in by_format.items()
        for pattern in fold_modules(names, num_layers=len(model.layers))
    ]
    method = model.quantization.method if model.quantization else "as stored"
    return StoredReading(
        quantization=Quantization(
            method=method,
            rules=tuple(rules),
            kv_cache_dtype=model.quantization.kv_cache_dtype if model.quantization else None,
        ),
        missing=tuple(missing),
        unexplained=tuple(name for name in stored.tensors if name not in explained),
    )


def _rule_name(name: str) -> str:
    return name.replace("{e}", "*")


def _explain(
    parameter: Parameter, modules: dict[str, dict[str, StoredTensor]], stored: StoredTensors, explained: set[str]
) -> WeightFormat | None:
    """Return the format of a tensor, the same for all its copies, and note the names it explains."""
    formats: set[WeightFormat] = set()
    names: list[str] = []
    for copy in range(parameter.copies if "{e}" in parameter.name else 1):
        name = parameter.name.replace("{e}", str(copy))
        module, _dot, ending = name.rpartition(".")
        tensors = modules.get(module, {})
        if ending != "weight" or len(parameter.shape) < 2:
            tensor = stored.tensors.get(name)
            if tensor is None or math.prod(tensor.shape) != math.prod(parameter.shape):
                return None
            if tensor.dtype not in _DTYPES:
                return None
            formats.add(plain(_DTYPES[tensor.dtype]))
            names.append(name)
            continue
        own = {key: tensor for key, tensor in tensors.items() if key != "bias"}
        found = module_format(parameter.shape, tuple(sorted(own.items())))
        if found is None:
            return None
        formats.add(found)
        names += [f"{module}.{key}" for key in own]
    if len(formats) != 1:
        return None
    explained.update(names)
    return formats.pop()


@lru_cache(maxsize=65536)
def module_format(shape: tuple[int, ...], tensors: tuple[tuple[str, StoredTensor], ...]) -> WeightFormat | None:
    """Return the format of one linear layer from its stored tensors, None when they do not add up.

    Values are recognised by name; among the others a scalar counts as such, an int32 per input column is an index, and
    the largest is the scale, whose number of values tells the block.
    """
    rows, columns = shape[0], math.prod(shape[1:])
    by_name = dict(tensors)
    values = next((by_name.pop(name) for name in _VALUES if name in by_name), None)
    if values is None or values.dtype not in _DTYPES:
        return None
    if not by_name and math.prod(values.shape) == rows * columns:
        return plain(_DTYPES[values.dtype])
    bits, rest = divmod(values.num_bytes * 8, rows * columns)
    dtype = _DTYPES[values.dtype] if math.prod(values.shape) == rows * columns else _PACKED_BITS.get(bits)
    if dtype is None or rest:
        return None
    scalars, index, zeros, scale = _roles(by_name)
    block = _block(rows, columns, scale) if scale is not None else None
    if scale is not None and (block is None or scale.dtype not in _DTYPES):
        return None
    format_ = WeightFormat(
        name=_name(dtype, block),
        dtype=dtype,
        block=block,
        scale_dtype=_DTYPES[scale.dtype] if scale is not None else "float32",
        zero_point_dtype=_zero_dtype(zeros, scale, dtype),
        tensor_scales=sum(tensor.num_bytes for tensor in scalars) // 4,
        column_index_bytes=4 if index is not None else 0,
    )
    total = values.num_bytes + sum(tensor.num_bytes for tensor in by_name.values())
    return format_ if format_.stored_bytes(shape) == total else None


def _roles(
    by_name: dict[str, StoredTensor],
) -> tuple[list[StoredTensor], StoredTensor | None, StoredTensor | None, StoredTensor | None]:
    """Return scalars, column index, zero points and scale among what stands beside the values."""
    scalars = [tensor for tensor in by_name.values() if math.prod(tensor.shape) <= 2]
    index = by_name.get("g_idx") or by_name.get("weight_g_idx")
    zeros = next((tensor for name, tensor in by_name.items() if "zero" in name and tensor not in scalars), None)
    others = [tensor for tensor in by_name.values() if tensor not in (*scalars, index, zeros)]
    return scalars, index, zeros, max(others, key=lambda tensor: tensor.num_bytes, default=None)


def _zero_dtype(zeros: StoredTensor | None, scale: StoredTensor | None, dtype: str) -> str | None:
    """Return the format of the zero points: packed like the values, or plain."""
    if zeros is None or scale is None:
        return None
    return _DTYPES.get(zeros.dtype) if math.prod(zeros.shape) == math.prod(scale.shape) else dtype


def _block(rows: int, columns: int, scale: StoredTensor) -> tuple[int, int] | None:
    """Return the block that gives as many scales as are stored."""
    count = math.prod(scale.shape)
    if count == rows:
        return (1, 0)
    for group in _GROUPS:
        if count == rows * cdiv(columns, group):
            return (1, group)
    for side in _SQUARES:
        if scale.shape == (cdiv(rows, side), cdiv(columns, side)):
            return (side, side)
    return None


def _name(dtype: str, block: tuple[int, int] | None) -> str:
    if block is None:
        return f"{dtype} per tensor"
    if block == (1, 0):
        return f"{dtype} per row"
    return f"{dtype} {block[0]}x{block[1]}" if block[0] > 1 else f"{dtype} group {block[1]}"
