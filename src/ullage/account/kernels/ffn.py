"""Gated feed-forward blocks: written out, with a fused activation, in slices.

Symbols: r rows (tokens), h hidden size, I intermediate size, w bytes a value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ullage.account.kernels import ops
from ullage.account.kernels.tape import Tape, Tensor
from ullage.frozen import Frozen
from ullage.units import cdiv


class Weights(Frozen):
    """The weights of a gated block."""

    gate: Tensor
    up: Tensor
    down: Tensor


def gated(
    t: Tape, x: Tensor, weights: Weights, num_rows: int, *, fused: bool, folded: bool = True, held: bool = False
) -> Tensor:
    """down(act(gate x) * up x). ``held``: variables hold gate and up until the block returns.

    Formula: kept: input rhw, gate and up 2rIw, their product rIw; written out also the activation rIw. Backward: each
        linear the gradients of its input and its weight; the product two of rIw, or none where ``fused``: Liger's
        kernels write them over gate and up.
    Source: transformers@5.23.0:models/llama/modeling_llama.py:LlamaMLP; liger-kernel@0.8.0:ops/swiglu.py, ops/geglu.py.
    """
    gate = ops.linear(t, x, weights.gate, num_rows, folded=folded)
    if not fused:
        activated = ops.pointwise(t, gate)
        del gate
        up = ops.linear(t, x, weights.up, num_rows, folded=folded)
        inner = ops.mul(t, activated, up)
        del activated, up
        return ops.linear(t, inner, weights.down, num_rows)
    up = ops.linear(t, x, weights.up, num_rows, folded=folded)
    inner = fused_product(t, gate, up, in_place=True)
    if not held:
        del gate, up
    return ops.linear(t, inner, weights.down, num_rows)


def fused_product(t: Tape, gate: Tensor, up: Tensor, *, in_place: bool) -> Tensor:
    """The activated product as one kernel: keeps both factors, and writes their gradients over them."""

    def backward(t: Tape, kept: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [each.detach() if in_place else t.empty(each.num_elements, each.width) for each in kept]

    return t.op([gate, up], gate.num_elements, gate.width, keeps=[gate, up], backward=backward)


def in_slices(t: Tape, x: Tensor, weights: Weights, num_rows: int, num_slices: int, *, fused: bool) -> Tensor:
    """A block that runs over slices of the tokens without a graph, and again slice by slice in backward.

    Formula: forward: the slices' outputs beside the joined one 2rhw, one slice's block; backward: the gradient of the
        input rhw and one slice's block with its gradients; weights' gradients are added up slice by slice.
    Source: liger-kernel@0.8.0:ops/tiled_mlp.py:LigerTiledMLPFunction; deepspeed@0.18.2:runtime/sequence_parallel/
        ulysses_sp.py:TiledMLP.
    """
    rows = cdiv(num_rows, num_slices)
    hidden = x.num_elements // num_rows
    counts = [min(rows, num_rows - start) for start in range(0, num_rows, rows)]
    run = _slice_of(weights, hidden, fused=fused)
    recording, t.recording = t.recording, False
    parts = [run(t, x.detach(), count) for count in counts]
    made = t.empty(x.num_elements, x.width)
    t.recording = recording
    del parts

    def backward(t: Tape, kept: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        grad = grads[0]
        assert grad is not None
        whole = t.empty(x_elements, x_width)
        for count in counts:
            part = kept[0].detach()
            part.requires_grad = True
            part.grad = whole
            t.recording = True
            output = run(t, part, count)
            t.run_backward(output, Tensor(grad.storage, count * hidden, grad.width))
            t.recording = False
        return [whole]

    x_elements, x_width = x.num_elements, x.width
    return t.record([x], made, [x], backward)


def _slice_of(weights: Weights, hidden: int, *, fused: bool) -> Callable[[Tape, Tensor, int], Tensor]:
    def run(t: Tape, x: Tensor, count: int) -> Tensor:
        part = Tensor(x.storage, count * hidden, x.width, requires_grad=x.requires_grad)
        part.grad = x.grad
        return gated(t, part, weights, count, fused=fused, folded=False, held=fused)

    return run


def swiglu_of_halves(t: Tape, x: Tensor, *, kind: str) -> Tensor:
    """The activation alone, of one tensor with gate and up side by side (Megatron's first linear).

    Args:
        t, x: the tape, and gate and up, 2u bytes.
        kind: "torch" written out; "megatron" one compiled function each way; "liger" one kernel, which wants a
            contiguous gradient; "liger_in_place" writes the gradient over its input.

    Formula: written out: activation u (kept), product u, gradients of both u and of both halves laid into 2u. Else:
        product u, gradient 2u (in place none), and for a kernel the gradient made contiguous u.
    Source: megatron-core@0.16:fusions/fused_bias_swiglu.py:swiglu, swiglu_back; liger-kernel@0.8.1:megatron/swiglu.py.
    """
    half = x.num_elements // 2
    if kind == "torch":
        gate, up = ops.halves(t, x)
        return ops.mul(t, ops.pointwise(t, gate), up)

    def backward(t: Tape, kept: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        whole = t.empty(half, kept[0].width) if kind != "megatron" else None
        made = kept[0].detach() if kind == "liger_in_place" else t.empty(kept[0].num_elements, kept[0].width)
        del whole
        return [made]

    return t.op([x], half, x.width, keeps=[x], backward=backward)
