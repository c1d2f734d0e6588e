"""Norms and pointwise layers over rows, written out and as one kernel.

Symbols: n = rows x size values of w bytes; P rows of partial sums, one per multiprocessor.
"""

from __future__ import annotations

from collections.abc import Sequence

from ullage.account.kernels import ops
from ullage.account.kernels.tape import Tape, Tensor, passed, viewed


def rms_norm(t: Tape, x: Tensor, weight: Tensor, num_rows: int) -> Tensor:
    """RMSNorm written out: fp32 copy, its square, mean and root, product, cast back, product with the weight.

    Formula: kept: fp32 copy 4n, cast nw (for a trained weight), roots; backward: the squares' gradient with its two
        factors 4 x 4n.
    Source: transformers@5.23.0:models/llama/modeling_llama.py:LlamaRMSNorm.
    """
    wide = ops.cast(t, x, ops.WIDE)
    root = _root(t, ops.shift(t, ops.reduce(t, ops.square(t, wide), num_rows, divided=True)))
    unit = ops.mul(t, wide, root)
    del wide, root
    return ops.mul(t, weight, ops.cast(t, unit, x.width))


def _root(t: Tape, x: Tensor) -> Tensor:
    """Reciprocal root: keeps its result, whose cube backward makes."""
    return ops.pointwise(t, x, keeps_result=True, grad_work=2 * x.num_bytes)


def added_rms_norm(t: Tape, x: Tensor, residual: Tensor, weight: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """RMSNorm of the sum with the residual, written out in fp32.

    Formula: fp32 copies of both 2 x 4n, their sum 4n (kept, as the square's input and a factor), unit 4n, and the cast,
        the product and the sum's cast 3nw.
    Source: liger-kernel@0.8.0:benchmark/scripts/benchmark_fused_add_rms_norm.py:NaiveAddRMSNorm.
    """
    wide = ops.add(t, ops.cast(t, x, ops.WIDE), ops.cast(t, residual, ops.WIDE))
    root = _root(t, ops.shift(t, ops.reduce(t, ops.square(t, wide), num_rows, divided=True)))
    unit = ops.mul(t, wide, root)
    return ops.mul(t, weight, ops.cast(t, unit, x.width)), ops.cast(t, wide, x.width)


def fused_norm(
    t: Tape,
    x: Tensor,
    weights: Sequence[Tensor],
    *,
    statistics: int,
    num_partials: int = 0,
    in_place: bool = False,
    contiguous_gradient: bool = False,
) -> Tensor:
    """A norm as one kernel: keeps its input and ``statistics`` bytes.

    ``contiguous_gradient``: the output's gradient is one value seen as many, which the kernel wants laid out.

    Formula: output nw; backward: the gradient of the input (written over the output's gradient where ``in_place``),
        partial sums of the weights' gradients 4 P size each, and their sums.
    Source: liger-kernel@0.8.0:ops/rms_norm.py:rms_norm_backward; ops/layer_norm.py:layer_norm_backward;
        ops/dyt.py:liger_dyt_bwd; ops/poly_norm.py:poly_norm_backward; torch@2.13.0:aten/src/ATen/native/cuda/
        layer_norm_kernel.cu (P = 0).
    """
    sizes = [(each.num_elements, each.width) for each in weights]

    def backward(t: Tape, kept: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        grad = grads[0]
        assert grad is not None
        whole = t.empty(grad.num_elements if contiguous_gradient else 0, grad.width)
        made = viewed(grad) if in_place else t.empty(grad.num_elements, grad.width)
        partials = [t.empty(num_partials * size, ops.WIDE) for size, _width in sizes if num_partials]
        sums = []
        for size, width in sizes:
            t.brief(t.device.sum_buffer_bytes(size, num_partials))
            sums.append(t.empty(size, width))
        del partials, whole
        return [made, *sums]

    return t.op([x, *weights], x.num_elements, x.width, keeps=[x, *weights], aside=statistics, backward=backward)


def fused_add_norm(
    t: Tape, x: Tensor, residual: Tensor, weight: Tensor, *, statistics: int, num_partials: int
) -> tuple[Tensor, Tensor]:
    """RMSNorm that adds the residual in the same kernel: output and sum; one gradient serves both inputs.

    Formula: output and sum 2nw, the sum is kept; backward: one new gradient nw, zeros for an output that no gradient
        comes for, partial sums 4 P size.
    Source: liger-kernel@0.8.0:ops/fused_add_rms_norm.py:fused_add_rms_norm_backward.
    """
    size, width = weight.num_elements, weight.width
    out, total = t.empty(x.num_elements, x.width), t.empty(x.num_elements, x.width)
    rows = t.empty(statistics, 1)

    def backward(t: Tape, kept: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        whole = kept[0]
        zeros = [t.empty(whole.num_elements, whole.width) for grad in (*grads, None)[:2] if grad is None]
        made = t.empty(whole.num_elements, whole.width)
        partials = t.empty(num_partials * size, ops.WIDE)
        total_grad = t.empty(size, width)
        del partials, zeros
        return [passed(made), passed(made), total_grad]

    made = t.record_all([x, residual, weight], [out, total], [total, weight, rows], backward)
    return made[0], made[1]


def dynamic_tanh(t: Tape, x: Tensor, alpha: Tensor, gamma: Tensor, beta: Tensor | None) -> Tensor:
    """DyT written out: gamma tanh(alpha x) + beta.

    Formula: kept: x, the tanh in its format; made: alpha x, tanh, the product, the sum.
    Source: liger-kernel@0.8.0:test/transformers/test_dyt.py:TorchDyT.
    """
    value = ops.mul(t, gamma, ops.pointwise(t, ops.mul(t, x, alpha), keeps_result=True))
    return value if beta is None else ops.add(t, value, beta)


def compiled_pointwise(t: Tape, x: Tensor, weights: Sequence[Tensor], *, width: float) -> Tensor:
    """A pointwise layer that ``torch.compile`` makes one kernel each way: keeps its input alone.

    Formula: output n x ``width``; backward: the gradient of the input nw, those of the weights.
    Source: torch@2.13.0:torch/_inductor/scheduler.py (fusion of pointwise nodes and reductions).
    Known error: partial sums of the weights' gradients are left out.
    """
    sizes = [(each.num_elements, each.width) for each in (x, *weights)]

    def backward(t: Tape, kept: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [t.empty(size, width) for size, width in sizes]

    return t.op([x, *weights], x.num_elements, width, keeps=[x, *weights], backward=backward)


def polynomial_norm(t: Tape, x: Tensor, weight: Tensor, bias: Tensor, num_rows: int) -> Tensor:
    """PolyNorm written out: three powers in fp32, each normed and weighted.

    Formula: fp32 copy 4n; kept per power: itself and its normed value 2 x 4n; sums of the weighted ones 4n each.
    Source: liger-kernel@0.8.0:benchmark/scripts/benchmark_poly_norm.py:NaivePolyNorm.
    """
    wide = ops.cast(t, x, ops.WIDE)
    powers = [ops.square(t, wide) for _power in range(3)]
    parts = []
    for power in powers:
        root = _root(t, ops.shift(t, ops.reduce(t, ops.square(t, power), num_rows, divided=True)))
        parts.append(ops.mul(t, power, root))
    total = ops.mul(t, t.view(weight, 1), parts[0])
    for part in parts[1:]:
        total = ops.add(t, total, ops.mul(t, t.view(weight, 1), part))
    return ops.cast(t, ops.add(t, total, bias), x.width)


def squared_relu(t: Tape, x: Tensor) -> Tensor:
    """ReLU and its square: both keep their results or inputs.

    Formula: ReLU nw, kept once, and its square nw; backward: the square's gradient with its factors 3nw.
    Source: liger-kernel@0.8.0:benchmark/scripts/benchmark_relu_squared.py:TorchReLUSquared.
    """
    return ops.square(t, ops.pointwise(t, x, keeps_result=True))


def fused_pointwise(t: Tape, x: Tensor, *, keeps_result: bool = False) -> Tensor:
    """One kernel over rows that keeps its input or its result: softmax, squared ReLU.

    Formula: result nw; backward: one gradient nw.
    Source: liger-kernel@0.8.0:ops/softmax.py:_softmax_forward; ops/relu_squared.py:relu_squared_forward.
    """
    return ops.pointwise(t, x, keeps_result=keeps_result)
