"""What operators compute and move, from the shapes that were recorded, and the GPU's ridge (docs/metrics.md).

The bytes are the least that can be moved: every operand and the result once. A cache cannot save more than that, and
a kernel that reads its operands several times moves more, so a density is an upper bound of the real one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.spec.machine import Gpu

#: Types as torch.profiler records them ("Input type"), in bytes and as the catalogue names their FLOP/s.
_TYPES: dict[str, tuple[int, str]] = {
    "float": (4, "float32"),
    "double": (8, "float64"),
    "c10::Half": (2, "float16"),
    "c10::BFloat16": (2, "bfloat16"),
    "c10::Float8_e4m3fn": (1, "float8_e4m3"),
    "c10::Float8_e5m2": (1, "float8_e4m3"),
    "signed char": (1, "int8"),
}
#: Tensor cores run these at the same speed; the catalogue lists one of them.
_SAME_SPEED = {"float16": "bfloat16", "bfloat16": "float16"}
_MAX_SIZE = 1 << 40
#: Where the two matrices stand among the inputs.
_PRODUCTS = {
    "aten::mm": (0, 1),
    "aten::addmm": (1, 2),
    "aten::bmm": (0, 1),
    "aten::baddbmm": (1, 2),
    "aten::_scaled_mm": (0, 1),
}
_ATTENTION = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
)
#: Operators whose work is counted; all run within no other one of them.
COUNTED = frozenset((*_PRODUCTS, *_ATTENTION, "aten::conv2d"))


class Work(Frozen):
    """FLOPs and least bytes of one operator, and the number format it computes in."""

    flops: int
    moved_bytes: int
    dtype: str = ""


def work_of(name: str, dims: object, types: object, concrete: object = None) -> Work | None:
    """Return the work of an operator from its recorded shapes; None where they do not tell.

    Formula: products 2 b m n k; convolutions 2 N C_out H' W' C_in/g kh kw; attention 2 b h s_q s_k (d_qk + d_v).
    Symbols: b batches, m x k and k x n matrices; N images of C_in x H x W, g groups; h heads, s lengths, d widths.
    Source: pytorch@2.13.0:torch/csrc/profiler/util.cpp:computeFlops (products, convolutions) and
        torch/utils/flop_counter.py:sdpa_flop_count (attention).
    Known error: a causal mask halves attention's work and is not recorded; backward passes of convolutions and
        attention are not counted; bytes leave out what kernels read twice.
    """
    shapes = _shapes(dims)
    if shapes is None or name not in COUNTED:
        return None
    size, dtype = _type_of(types, _PRODUCTS.get(name, (0, 1))[0])
    if name in _PRODUCTS:
        return _product(name, shapes, size, dtype)
    if name in _ATTENTION:
        return _attention(shapes, size, dtype)
    return _convolution(shapes, concrete, size, dtype)


def _shapes(dims: object) -> list[list[int]] | None:
    """Return the shapes as lists of sane numbers; what is no tensor is an empty shape."""
    if not isinstance(dims, list) or len(dims) > 64:
        return None
    found = []
    for shape in dims:
        plain = shape if isinstance(shape, list) and len(shape) <= 8 else []
        if not all(isinstance(size, int) and not isinstance(size, bool) and 0 <= size <= _MAX_SIZE for size in plain):
            plain = []
        found.append(plain)
    return found


def _type_of(types: object, place: int) -> tuple[int, str]:
    name = types[place] if isinstance(types, list) and place < len(types) else ""
    return _TYPES.get(name, (4, "")) if isinstance(name, str) else (4, "")


def _product(name: str, shapes: Sequence[Sequence[int]], size: int, dtype: str) -> Work | None:
    first, second = _PRODUCTS[name]
    if len(shapes) <= second:
        return None
    left, right = shapes[first], shapes[second]
    rank = 3 if name in ("aten::bmm", "aten::baddbmm") else 2
    if len(left) != rank or len(right) != rank or left[-1] != right[-2]:
        return None
    batch = left[0] if rank == 3 else 1
    rows, inner, columns = left[-2], left[-1], right[-1]
    operands = rows * inner + inner * columns
    result = rows * columns * (2 if name == "aten::_scaled_mm" else 1)  # fp8 in, two bytes out
    return Work(flops=2 * batch * rows * inner * columns, moved_bytes=batch * size * (operands + result), dtype=dtype)


def _attention(shapes: Sequence[Sequence[int]], size: int, dtype: str) -> Work | None:
    if len(shapes) < 3 or any(len(shape) != 4 for shape in shapes[:3]):
        return None
    query, key, value = shapes[:3]
    products = query[0] * query[1] * query[2] * key[2]
    moved = math.prod(query) + math.prod(key) + math.prod(value) + query[0] * query[1] * query[2] * value[3]
    return Work(flops=2 * products * (query[3] + value[3]), moved_bytes=size * moved, dtype=dtype)


def _convolution(shapes: Sequence[Sequence[int]], concrete: object, size: int, dtype: str) -> Work | None:
    """Count aten::conv2d(input, weight, bias, stride, padding, dilation, groups)."""
    if len(shapes) < 2 or len(shapes[0]) != 4 or len(shapes[1]) != 4 or not isinstance(concrete, list):
        return None
    image, weight = shapes[0], shapes[1]
    stride, padding, dilation = (_pair(concrete, place, least) for place, least in ((3, 1), (4, 0), (5, 1)))
    if stride is None or padding is None or dilation is None:
        return None
    spread = [
        (image[2 + at] + 2 * padding[at] - dilation[at] * (weight[2 + at] - 1) - 1) // stride[at] + 1 for at in (0, 1)
    ]
    if min(spread) <= 0:
        return None
    pixels = image[0] * weight[0] * spread[0] * spread[1]
    moved = math.prod(image) + math.prod(weight) + pixels
    return Work(flops=2 * pixels * math.prod(weight[1:]), moved_bytes=size * moved, dtype=dtype)


def _pair(concrete: Sequence[object], place: int, least: int) -> tuple[int, int] | None:
    """Read ``"[2, 2]"``, the way that lists among the inputs are recorded."""
    text = concrete[place] if place < len(concrete) else ""
    parts = text.strip("[]").split(",") if isinstance(text, str) else []
    if not 1 <= len(parts) <= 2 or not all(part.strip().isdigit() and len(part) < 9 for part in parts):
        return None
    numbers = [int(part) for part in parts]
    pair = (numbers[0], numbers[-1])
    return pair if min(pair) >= least else None


def gpu_named(name: str) -> Gpu | None:
    """Return the card that a driver names so, None when the catalogue does not have it."""
    from ullage.read.machine import parse_gpu

    try:
        return parse_gpu(name)
    except InputError:
        return None


def ridge_of(gpu: Gpu | None, dtype: str) -> float | None:
    """Return the FLOPs per byte above which a card waits for arithmetic in ``dtype``, and not for its memory."""
    if gpu is None or not gpu.bandwidth_bytes_per_s:
        return None
    speeds = dict(gpu.flops)
    speed = speeds.get(dtype) or speeds.get(_SAME_SPEED.get(dtype, ""))
    return speed / gpu.bandwidth_bytes_per_s if speed else None
