"""Routed experts: one after another, and as one grouped kernel.

Symbols: r rows (tokens), h hidden size, I intermediate size, E experts, k experts a token, w bytes a value.
"""

from __future__ import annotations

from collections.abc import Sequence

from ullage.account.activations.embedding import embedding_gradient_tables
from ullage.account.kernels import ops
from ullage.account.kernels.tape import Backward, Tape, Tensor


def experts_in_a_loop(
    t: Tape, x: Tensor, gate_up: Tensor, down: Tensor, routing: Tensor, sizes: tuple[int, int, int, int]
) -> Tensor:
    """Routed experts one after another.

    Args:
        t: the tape.
        x, gate_up, down, routing: tokens, the experts' weights, the routing weights (tokens x k).
        sizes: tokens, experts, hidden size, intermediate size.

    Formula: the mask of the choice 8rkE; kept per routed row: input h, gate and up 2I, activation I, product I, output
        h; backward of every expert lays its weights' gradients into zeros of all experts' weights, 2 x 3EhIw, and its
        input's into zeros of all tokens rhw.
    Source: transformers@4.57.0:models/mixtral/modeling_mixtral.py:MixtralExperts.forward; liger-kernel@0.8.0:
        benchmark/scripts/benchmark_fused_moe.py:_huggingface_moe_forward.
    Known error: routing is taken as balanced.
    """
    _tokens, num_experts, hidden, inner = sizes
    rows = max(1, routing.num_elements // num_experts)
    made = t.empty(x.num_elements, x.width)
    mask = t.empty(routing.num_elements * num_experts, 8)
    index: Tensor | None = None
    for _expert in range(num_experts):
        index = t.empty(rows, 8)
        position = t.empty(rows, 8)
        current = _taken(t, x, rows * hidden, index)
        product = ops.linear(t, current, t.view(gate_up, 2 * inner * hidden), rows)
        gate, up = ops.halves(t, product)
        current = ops.mul(t, ops.pointwise(t, gate), up)
        current = ops.linear(t, current, t.view(down, inner * hidden), rows)
        current = ops.mul(t, current, _taken(t, routing, rows, index, position))
        made = _added_rows(t, made, current, index)
        del product
    del mask
    return made


def _taken(t: Tape, x: Tensor, num_elements: int, *indices: Tensor) -> Tensor:
    """Rows at an index; the gradient is laid into zeros of the whole."""
    made = t.op([x], num_elements, x.width, keeps=indices, backward=_rows_into(x.num_elements, x.width))
    made.per_row = True
    return made


def _rows_into(num_elements: int, width: float) -> Backward:
    def backward(t: Tape, kept: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [t.empty(num_elements, width)]

    return backward


def _added_rows(t: Tape, total: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """Rows added in place at an index: the whole's gradient passes, the rows' is taken from it."""

    def backward(t: Tape, kept: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        grad = grads[0]
        assert grad is not None
        return [Tensor(grad.storage, grad.num_elements, grad.width), t.empty(size, width)]

    size, width = rows.num_elements, rows.width
    return t.record([total, rows], Tensor(total.storage, total.num_elements, total.width), [index, rows], backward)


def fused_experts(
    t: Tape, x: Tensor, gate_up: Tensor, down: Tensor, routing: Tensor, sizes: tuple[int, int, int, int]
) -> Tensor:
    """Liger's grouped experts.

    Formula: R = rk rows: gate and up 2RIw (kept), product RIw, outputs Rhw, sum rhw; backward: gradient of gate and up
        2RIw, weighted product RIw, expanded gradient of the input Rhw, its sum rhw, gradients of the weights 3EhIw.
    Source: liger-kernel@0.8.0:ops/fused_moe.py:LigerFusedMoEFunction.
    """
    tokens, num_experts, hidden, inner = sizes
    rows, width = routing.num_elements, x.width
    indices = t.empty(3 * rows + 4 * num_experts, 4)
    both = t.empty(2 * rows * inner, width)
    product = t.empty(rows * inner, width)
    outputs = t.empty(rows * hidden, width)
    made = t.empty(tokens * hidden, width)
    del product, outputs

    def backward(t: Tape, kept: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        before = t.empty(2 * rows * inner, width)
        weighted = t.empty(rows * inner, width)
        scores = t.empty(rows, width)
        down_grad = t.empty(down_size, width)
        expanded = t.empty(rows * hidden, width)
        x_grad = t.empty(tokens * hidden, width)
        gate_up_grad = t.empty(gate_up_size, width)
        del before, weighted, expanded
        return [x_grad, gate_up_grad, down_grad, scores]

    gate_up_size, down_size = gate_up.num_elements, down.num_elements
    return t.record([x, gate_up, down, routing], made, [x, gate_up, down, both, indices], backward)


def embedding(t: Tape, weight: Tensor, ids: Tensor, hidden_size: int, *, fused: bool = False) -> Tensor:
    """Rows of a table; ``fused``: Liger's, which adds to the gradient in place.

    Formula: output rhw; backward: a gradient of the whole table Vhw, and for a moment PyTorch's tables of indices and
        partial sums (:func:`embedding_gradient_tables`).
    Source: torch@2.9.0:aten/src/ATen/native/cuda/Embedding.cu:embedding_dense_backward_cuda; liger-kernel@0.8.0:
        ops/experimental/embedding.py.
    """
    rows = ids.num_elements
    size, width = weight.num_elements, weight.width

    def backward(t: Tape, kept: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        made = t.empty(size, width)
        tables = () if fused else embedding_gradient_tables(rows, size // hidden_size, hidden_size)
        t.brief(sum(tables))
        return [made]

    return t.op([weight], rows * hidden_size, width, keeps=[ids], backward=backward)
