"""Losses on logits or probabilities of n = tokens x vocabulary values, written out and as one kernel.

Symbols: n values, w bytes each. The closed form beside each is what the program makes beside its inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

from ullage.account.kernels import ops
from ullage.account.kernels.tape import Backward, Tape, Tensor


def ready_gradient(num_new: int = 1) -> Backward:
    """Return a backward that hands out a gradient made in forward, the first tensor kept.

    ``num_new``: tensors that are made of it on the way (the product with the loss's gradient, a division), each
    beside the one before it.
    """

    def backward(t: Tape, kept: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        made = [kept[0].detach(), *(t.empty(kept[0].num_elements, kept[0].width) for _each in range(num_new))]
        return [made[-1], None]

    return backward


def kl_divergence(t: Tape, x: Tensor, target: Tensor, num_rows: int) -> Tensor:
    """PyTorch's Kullback-Leibler loss.

    Formula: target log target, target x input, their difference = 3nw; backward: two gradients 2nw.
    Source: torch@2.13.0:aten/src/ATen/native/Loss.cpp:_kl_div_log_target, _kl_div_non_log_target.
    """
    entropy = t.empty(x.num_elements, x.width)
    difference = subtract(t, entropy, ops.mul(t, target, x))
    del entropy
    return ops.scale(t, ops.reduce(t, difference, 1))


def subtract(t: Tape, one: Tensor, other: Tensor) -> Tensor:
    """Difference: the second gradient is the first one's negative, a new tensor even where the first is expanded."""
    return t.op([one, other], one.num_elements, one.width, grads=("pass", "new"))


def liger_kl_divergence(t: Tape, x: Tensor, target: Tensor, num_rows: int, *, scaled: bool, in_place: bool) -> Tensor:
    """Liger's Kullback-Leibler loss.

    Formula: one sum per row; backward: the gradient nw, its product with the loss's where that is not 1, and the
        quotient by the rows = 2 or 3 nw. cuTile divides inside its kernel.
    Source: liger-kernel@0.8.0:ops/kl_div.py:kldiv_forward_triton, kldiv_backward_triton, LigerKLDivLossFunction.
    """

    def backward(t: Tape, kept: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        made = [t.empty(size, width) for _each in range(1 + scaled if in_place else 2 + scaled)]
        return [made[-1], None]

    size, width = x.num_elements, x.width
    return t.op([x, target], 1, ops.WIDE, keeps=[target], work=num_rows * ops.WIDE, backward=backward)


def jensen_shannon(t: Tape, log_q: Tensor, log_p: Tensor, num_rows: int) -> Tensor:
    """Generalised Jensen-Shannon divergence written out in fp32.

    Formula: two exponentials, their mean m, twice log m, two pointwise divergences = 7nw and temporaries.
    Source: liger-kernel@0.8.0:benchmark/scripts/benchmark_jsd.py:TorchJSD.
    """
    log_p, log_q = ops.cast(t, log_p, ops.WIDE), ops.cast(t, log_q, ops.WIDE)
    mean = _lerp(t, ops.pointwise(t, log_q, keeps_result=True), ops.pointwise(t, log_p, keeps_result=True))
    one = ops.scale(t, ops.reduce(t, pointwise_divergence(t, ops.pointwise(t, mean), log_p), num_rows))
    other = ops.scale(t, ops.reduce(t, pointwise_divergence(t, ops.pointwise(t, mean), log_q), num_rows))
    loss = ops.add(t, one, other)
    del one, other
    return ops.reduce(t, ops.scale(t, loss), 1)


def _lerp(t: Tape, one: Tensor, other: Tensor) -> Tensor:
    """Interpolation with a number as weight: keeps nothing."""
    grads = tuple("new" if each.requires_grad else "none" for each in (one, other))
    return t.op([one, other], one.num_elements, one.width, grads=grads)  # type: ignore[arg-type]


def pointwise_divergence(t: Tape, x: Tensor, target: Tensor) -> Tensor:
    """exp(target) (target - x): difference, exponential and product."""
    difference = subtract(t, target, x)
    return ops.mul(t, ops.pointwise(t, target, keeps_result=True), difference)


def liger_jensen_shannon(t: Tape, x: Tensor, target: Tensor, *, scaled: bool) -> Tensor:
    """Liger's generalised Jensen-Shannon divergence.

    Formula: a loss per value 4n, gone after its sum, and the gradient nw, kept; backward: its product with the loss's
        gradient nw where that is not 1.
    Source: liger-kernel@0.8.0:ops/jsd.py:jsd_forward, jsd_backward.
    """
    values = t.empty(x.num_elements, ops.WIDE)
    gradient = t.empty(x.num_elements, x.width)
    made = t.empty(1, ops.WIDE)
    del values
    return t.record([x, target], made, [gradient], ready_gradient(int(scaled)))


def total_variation(t: Tape, p: Tensor, q: Tensor) -> Tensor:
    """Total variation distance written out.

    Formula: difference (kept), its absolute value, the half of it = 3nw; backward as many.
    Source: liger-kernel@0.7.0:benchmark/scripts/benchmark_tvd.py:TorchTVDLoss.
    """
    distance = ops.scale(t, _absolute(t, subtract(t, p, q)))
    return ops.scale(t, ops.reduce(t, distance, 1))


def _absolute(t: Tape, x: Tensor) -> Tensor:
    """The gradient is the product with the sign, which is made for it."""
    return ops.pointwise(t, x, grad_work=x.num_bytes)


def liger_total_variation(t: Tape, p: Tensor, q: Tensor, num_rows: int, *, scaled: bool, divided: bool) -> Tensor:
    """Liger's total variation distance.

    Formula: the gradient nw, kept, and one sum per row; backward: its product with the loss's gradient nw where that
        is not 1. Before 0.8 (``divided``) the gradient is divided by the rows beside itself, in forward.
    Source: liger-kernel@0.6.1, @0.8.0:ops/tvd.py:tv_distance_forward_triton, tvd_backward_triton.
    """
    rows = t.empty(num_rows, ops.WIDE)
    gradient = t.empty(p.num_elements, p.width)
    if divided:
        quotient = t.empty(p.num_elements, p.width)
        gradient = quotient
        del quotient
    made = t.empty(1, ops.WIDE)
    del rows
    return t.record([p, q], made, [gradient], ready_gradient(int(scaled)))


def cross_entropy(t: Tape, logits: Tensor, num_rows: int) -> Tensor:
    """PyTorch's cross entropy.

    Formula: log-softmax nw, kept; backward: the gradient of the likelihood nw, that of the logits nw.
    Source: torch@2.13.0:torch/nn/functional.py:cross_entropy; aten/src/ATen/native/cuda/SoftMax.cu.
    """
    size, width = logits.num_elements, logits.width

    def backward(t: Tape, kept: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [t.empty(size, width)]

    values = ops.log_softmax(t, logits)
    return t.op([values], 1, width, keeps=[values], aside=int(width), backward=backward)


def liger_cross_entropy(t: Tape, logits: Tensor, num_rows: int, *, scaled: bool) -> Tensor:
    """Liger's cross entropy: the gradient is written over the logits.

    Formula: one loss per row; the logits themselves are the gradient; ``scaled`` (cuTile, a gradient of the loss that
        is not 1): its product with that, nw.
    Source: liger-kernel@0.8.0:ops/cross_entropy.py:cross_entropy_forward, cross_entropy_backward;
        @ead96b61:ops/cutile/ops/cross_entropy.py:cross_entropy_backward.
    """

    def backward(t: Tape, kept: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        if scaled:
            return [t.empty(kept[0].num_elements, kept[0].width)]
        return [kept[0].detach()]

    t.brief(int(num_rows * logits.width))
    return t.op([logits], 1, logits.width, keeps=[logits], backward=backward)


def vocab_parallel_cross_entropy(t: Tape, logits: Tensor, num_rows: int, *, kind: str) -> Tensor:
    """Megatron's cross entropy over a share of the vocabulary.

    Args:
        t, logits, num_rows: the tape, this rank's logits, its tokens.
        kind: "fused": compiled, so that exponentials and gradients get new tensors; "unfused": in place in the fp32
            copy; "liger": one kernel.

    Formula: fp32 exponentials 4n, kept; fused: beside the fp32 copy 4n, and in backward a new gradient 4n and its cast
        nw; else in place, and the cast.
    Source: megatron-core@0.16:tensor_parallel/cross_entropy.py:VocabParallelCrossEntropy,
        fusions/fused_cross_entropy.py (its note on in-place semantics); liger-kernel@0.8.0:
        ops/vocab_parallel_cross_entropy.py:LigerVocabParallelCEFunction.
    """
    size, width = logits.num_elements, logits.width

    def backward(t: Tape, kept: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        gradient = t.empty(size, ops.WIDE) if kind == "fused" else kept[0].detach()
        made = t.empty(size, width)
        del gradient
        return [made]

    wide = t.empty(size, ops.WIDE)
    values = t.empty(size, ops.WIDE) if kind == "fused" else wide
    del wide
    made = t.empty(num_rows, ops.WIDE)
    return t.record([logits], made, [values], backward)
