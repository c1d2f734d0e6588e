"""Bytes and number formats: exact integers inside, units only at the border.

``GiB`` is 2**30 and is what the program prints; ``GB`` (10**9) only where a vendor or a user says so. A number format
that packs several values (block scales, nibbles) is a :class:`WeightFormat`, whose :meth:`~WeightFormat.stored_bytes`
counts scales and padding too.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from functools import lru_cache

from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _

KiB, MiB, GiB, TiB = 2**10, 2**20, 2**30, 2**40
KB, MB, GB, TB = 10**3, 10**6, 10**9, 10**12

_SIZE_UNITS = {
    "": 1,
    "b": 1,
    "kib": KiB,
    "mib": MiB,
    "gib": GiB,
    "tib": TiB,
    "kb": KB,
    "mb": MB,
    "gb": GB,
    "tb": TB,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)
_COUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kKmM]?)\s*")
MAX_SIZE_BYTES = 2**60
MAX_COUNT = 2**48

#: Bytes of one element. Formats below one byte are exact fractions.
DTYPE_BYTES: dict[str, Fraction] = {
    "float64": Fraction(8),
    "int64": Fraction(8),
    "float32": Fraction(4),
    "int32": Fraction(4),
    "tf32": Fraction(4),
    "float16": Fraction(2),
    "bfloat16": Fraction(2),
    "int16": Fraction(2),
    "float8_e4m3": Fraction(1),
    "float8_e5m2": Fraction(1),
    "float8_e8m0": Fraction(1),
    "int8": Fraction(1),
    "uint8": Fraction(1),
    "bool": Fraction(1),
    "float4_e2m1": Fraction(1, 2),
    "int4": Fraction(1, 2),
    "int2": Fraction(1, 4),
    "int3": Fraction(3, 8),
    "int5": Fraction(5, 8),
    "int6": Fraction(3, 4),
}
DTYPE_ALIASES = {
    "fp64": "float64",
    "double": "float64",
    "fp32": "float32",
    "float": "float32",
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp8": "float8_e4m3",
    "fp8_e4m3": "float8_e4m3",
    "fp8_e5m2": "float8_e5m2",
    "float8_e4m3fn": "float8_e4m3",
    "e4m3": "float8_e4m3",
    "e5m2": "float8_e5m2",
    "f64": "float64",
    "f32": "float32",
    "f16": "float16",
    "f8_e4m3": "float8_e4m3",
    "f8_e5m2": "float8_e5m2",
    "f8_e8m0": "float8_e8m0",
    "i64": "int64",
    "i32": "int32",
    "i16": "int16",
    "i8": "int8",
    "u8": "uint8",
    "fp4": "float4_e2m1",
    "nf4": "int4",
    "f4": "float4_e2m1",
}


def canonical_dtype(name: str) -> str:
    """Return the canonical name of a dtype: ``bf16``, ``torch.bfloat16``, ``BF16`` are ``bfloat16``.

    Raises:
        InputError: the name is not known.
    """
    key = name.strip().lower().removeprefix("torch.")
    key = DTYPE_ALIASES.get(key, key)
    if key not in DTYPE_BYTES:
        raise InputError(
            _("unknown number format {name!r}").format(name=name),
            remedy=_("known are {known}").format(known=", ".join(DTYPE_BYTES)),
        )
    return key


def dtype_bytes(name: str) -> Fraction:
    """Return the bytes of one element of ``name`` as an exact fraction."""
    return DTYPE_BYTES[canonical_dtype(name)]


def tensor_bytes(num_elements: int, dtype: str) -> int:
    """Return the bytes of ``num_elements`` packed elements, rounded up to a whole byte."""
    numerator, denominator = _ratio(dtype)
    return -(-num_elements * numerator // denominator)


@lru_cache(maxsize=256)
def _ratio(dtype: str) -> tuple[int, int]:
    return dtype_bytes(dtype).as_integer_ratio()


def parse_size(text: str, *, default_unit: str = "") -> int:
    """Parse ``24GiB``, ``80 GB``, ``512MiB`` into bytes.

    Raises:
        InputError: not a size, or absurdly large.
    """
    match = _SIZE.fullmatch(text)
    unit = (match.group(2) or default_unit).lower() if match else None
    if match is None or unit not in _SIZE_UNITS:
        raise InputError(
            _("{text!r} is not a size").format(text=text[:80]), remedy=_("write for example 24GiB, 80GB or 512MiB")
        )
    value = int(Fraction(match.group(1)) * _SIZE_UNITS[unit])
    if value > MAX_SIZE_BYTES:
        raise InputError(_("{text!r} is larger than any memory").format(text=text[:80]))
    return value


def parse_count(text: str) -> int:
    """Parse a count as vLLM types it: ``32k`` is 32,000, ``32K`` is 32,768, ``25.6k`` is 25,600 (``25.6K`` is refused).

    Source: vllm@0.33.0:vllm/engine/arg_utils.py:human_readable_int.

    Raises:
        InputError: not a count, not whole, or absurdly large.
    """
    match = _COUNT.fullmatch(text)
    scale = {"": 1, "k": 1000, "K": 1024, "m": 10**6, "M": 2**20}
    if match is not None and not (match.group(2).isupper() and "." in match.group(1)):
        value = Fraction(match.group(1)) * scale[match.group(2)]
        if value > MAX_COUNT:
            raise InputError(_("{text!r} is more than can be counted with").format(text=text[:80]))
        if value.denominator == 1:
            return int(value)
    raise InputError(
        _("{text!r} is not a whole number").format(text=text[:80]),
        remedy=_("write for example 32768, 32k (32,000) or 32K (32,768)"),
    )


def format_bytes(num_bytes: float) -> str:
    """Format bytes for reading, in binary units: ``24.31 GiB``, ``512.0 MiB``, ``17 B``."""
    size = abs(num_bytes)
    for unit, digits, factor in (("TiB", 2, TiB), ("GiB", 2, GiB), ("MiB", 1, MiB), ("KiB", 1, KiB)):
        if size >= factor * (1000 if unit == "TiB" else 1):
            return f"{num_bytes / factor:,.{digits}f} {unit}"
    return f"{num_bytes:,.0f} B"


def cdiv(numerator: int, denominator: int) -> int:
    """Return the integer quotient rounded up."""
    return -(-numerator // denominator)


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is not below ``value``."""
    return cdiv(value, multiple) * multiple


class WeightFormat(Frozen):
    """How one weight matrix is stored.

    Attributes:
        name: for people, such as ``fp8 128x128`` or ``nvfp4``.
        dtype: element format, a key of :data:`DTYPE_BYTES`.
        block: (rows, columns) that share one scale; 0 means the whole axis. ``None``: no scales.
        scale_dtype: format of a scale.
        zero_point_dtype: format of the zero point that each block also has, or ``None``.
        scales_per_scale: scales that share a further fp32 scale (bitsandbytes double quantisation: 256); 0: none.
        tensor_scales: number of further fp32 scalars of the whole tensor (NVFP4 has its second-level scale, static
            activation scales come on top).
        column_index_bytes: bytes of an index kept per input column (GPTQ ``g_idx``: int32).
        kept_of: ``(2, 4)`` for 2:4 sparse storage: values kept, out of how many. The position metadata is counted as
            ceil(log2(of)) bits for each kept value: 2 bits in 2:4 (half a byte per group of 4), 3 bits in 4:8.
        pad_columns_to: the engine or format pads the input axis to this multiple.
        packed: (values in a block, bytes of a block, further bytes per row), for formats whose blocks interleave
            values and scales (GGUF); then nothing above but ``name`` counts.
    """

    name: str
    dtype: str
    block: tuple[int, int] | None = None
    scale_dtype: str = "float32"
    zero_point_dtype: str | None = None
    scales_per_scale: int = 0
    tensor_scales: int = 0
    column_index_bytes: int = 0
    kept_of: tuple[int, int] | None = None
    pad_columns_to: int = 1
    packed: tuple[int, int, int] | None = None

    def stored_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a tensor of ``shape`` (rows = first axis, columns = the rest), scales included."""
        if self.packed is not None:
            values_per_block, block_bytes, row_bytes = self.packed
            length = shape[-1] if shape else 1
            return math.prod(shape[:-1]) * (row_bytes + cdiv(length, values_per_block) * block_bytes)
        rows = shape[0] if shape else 1
        columns = round_up(math.prod(shape[1:]), self.pad_columns_to)
        values = Fraction(rows * columns)
        total = Fraction(0)
        if self.kept_of is not None:
            kept, of = self.kept_of
            values = values * kept / of
            total += values * math.ceil(math.log2(of)) / 8
        total += values * dtype_bytes(self.dtype)
        if self.block is not None:
            total += self._scale_bytes(rows, columns)
        total += 4 * self.tensor_scales + self.column_index_bytes * columns
        return math.ceil(total)

    def _scale_bytes(self, rows: int, columns: int) -> Fraction:
        """Return the bytes of scales and zero points of ``rows`` x ``columns`` values."""
        assert self.block is not None
        num_blocks = cdiv(rows, self.block[0] or rows or 1) * cdiv(columns, self.block[1] or columns or 1)
        total = num_blocks * dtype_bytes(self.scale_dtype)
        if self.zero_point_dtype is not None:
            total += num_blocks * dtype_bytes(self.zero_point_dtype)
        if self.scales_per_scale:
            total += 4 * cdiv(num_blocks, self.scales_per_scale)
        return total


def plain(dtype: str) -> WeightFormat:
    """Return the format of unquantised storage in ``dtype``."""
    canonical = canonical_dtype(dtype)
    return WeightFormat(name=canonical, dtype=canonical)
