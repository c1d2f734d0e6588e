"""Sparse distributions over scores.

Symbols: n = rows x size values of w bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from ullage.account.kernels import ops
from ullage.account.kernels.sorting import sort_scratch
from ullage.account.kernels.tape import Tape, Tensor


def sorted_rows(t: Tape, x: Tensor, row_size: int) -> tuple[Tensor, Tensor]:
    """Sorted values and their indices, which are kept.

    Formula: values nw, indices 8n; for a moment what :func:`sort_scratch` says.
    Source: torch@2.7.0:aten/src/ATen/native/cuda/Sort.cpp:sort_cuda_kernel.
    """
    values, indices = t.empty(x.num_elements, x.width), t.empty(x.num_elements, 8)
    t.brief(sum(sort_scratch(x.num_elements, row_size, x.width)))
    size, width = x.num_elements, x.width

    def backward(t: Tape, kept: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [t.empty(size, width)]

    return t.record([x], values, [indices], backward), indices


def sparsemax(t: Tape, x: Tensor, row_size: int) -> Tensor:
    """Sparsemax written out.

    Formula: sorted nw with indices 8n, sums nw, bound nw, support n, product nw (gone), x less its threshold nw (kept),
        result nw.
    Source: liger-kernel@0.8.0:benchmark/scripts/benchmark_sparsemax.py:torch_sparsemax.
    """
    rows = x.num_elements // row_size
    values, indices = sorted_rows(t, x, row_size)
    sums = t.op([values], x.num_elements, x.width)
    bound = ops.shift(t, ops.scale(t, values))
    support = t.empty(x.num_elements, 1)
    count = t.empty(rows, 8)
    total = ops.reduce(t, ops.mul(t, values, support), rows)
    threshold = ops.divide(t, ops.shift(t, total), count)
    threshold.width = x.width
    made = _clamped(t, ops.add(t, x, threshold))
    del sums, bound, indices
    return made


def _clamped(t: Tape, x: Tensor) -> Tensor:
    """Keeps its input, from which backward makes a mask."""
    return ops.pointwise(t, x, grad_work=x.num_elements)


def liger_sparsemax(t: Tape, x: Tensor, row_size: int) -> Tensor:
    """Liger's sparsemax: sorts fp32 values, one kernel for the rest.

    Formula: fp32 copy 4n, sorted 4n with indices 8n (all gone before the result is), result nw, kept.
    Source: liger-kernel@0.8.0:ops/sparsemax.py:_sparsemax_forward, _sparsemax_backward.
    """
    copy = x.detach() if x.width == ops.WIDE else t.empty(x.num_elements, ops.WIDE)
    values, indices = sorted_rows(t, copy, row_size)
    del copy, indices
    made = ops.pointwise(t, x, keeps_result=True)
    del values
    return made
