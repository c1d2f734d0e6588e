"""Losses on a linear head, on whole logits: likelihood, preference, policy gradient, distillation.

Symbols: r rows (tokens), h hidden size, V vocabulary, n = rV logits.
"""

from __future__ import annotations

from ullage.account.kernels import ops
from ullage.account.kernels.losses import cross_entropy, jensen_shannon, pointwise_divergence
from ullage.account.kernels.tape import Tape, Tensor


def cross_entropy_head(t: Tape, x: Tensor, weight: Tensor, num_rows: int) -> Tensor:
    """A head and PyTorch's cross entropy in the same format.

    Formula: logits nw, log-softmax nw (kept), its gradient nw, that of the logits nw; the head's gradient and the
        product that is added to it 2hVw.
    Source: torch@2.13.0:tools/autograd/derivatives.yaml (_log_softmax, nll_loss_forward, mm).
    """
    logits = ops.linear(t, x, weight, num_rows)
    return cross_entropy(t, logits, num_rows)


def token_log_probabilities(t: Tape, logits: Tensor, labels: Tensor) -> Tensor:
    """Log-softmax of all logits and its values at the labels."""
    return ops.gather(t, ops.log_softmax(t, logits), labels)


def preference_head(t: Tape, x: Tensor, weight: Tensor, labels: Tensor, num_rows: int) -> Tensor:
    """A preference loss (ORPO, CPO, SimPO) with the likelihood of the chosen half, on whole logits.

    Formula: logits 2n and 4n, log-softmax of all 4n (kept) and of the chosen half 2n (kept); backward: the gradient of
        the first log-softmax 2 x 4n, the chosen half's 2 x 2n laid into zeros of the whole 4n, and 2n.
    Source: liger-kernel@0.4.1:test/utils.py:HFAlignmentLoss.concatenated_forward, get_batch_logps.
    """
    narrow = ops.linear(t, x, weight, num_rows)
    logits = ops.cast(t, narrow, ops.WIDE)
    chosen = cross_entropy(t, t.view(logits, logits.num_elements // 2), num_rows // 2)
    each = token_log_probabilities(t, logits, labels)
    return ops.add(t, chosen, ops.reduce(t, each, 1))


def policy_head(
    t: Tape, x: Tensor, weight: Tensor, reference_x: Tensor, reference: Tensor, labels: Tensor, num_rows: int
) -> Tensor:
    """A policy-gradient loss (GRPO) with a reference model's head, on whole logits.

    Formula: logits 2n, fp32 4n, log-softmax 4n (all held by variables, the last kept), the reference's 2n + 4n + 4n
        beside them without a graph; backward: zeros of the gather 4n, the log-softmax's gradient 4n, its cast 2n.
    Source: liger-kernel@0.6.2:test/chunked_loss/test_grpo_loss.py:TorchLMHeadGRPO.forward.
    """
    logits = ops.linear(t, x, weight, num_rows)
    probabilities = ops.log_softmax(t, ops.cast(t, logits, ops.WIDE))
    each = ops.gather(t, probabilities, labels)
    reference_logits = ops.linear(t, reference_x, reference.detach(), num_rows)
    reference_probabilities = ops.log_softmax(t, ops.cast(t, reference_logits, ops.WIDE))
    loss = ops.reduce(t, each, 1)
    del logits, reference_logits, reference_probabilities
    return loss


def distillation_head(
    t: Tape,
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    num_rows: int,
) -> Tensor:
    """Cross entropy and Jensen-Shannon divergence from a teacher's head, on whole logits in fp32.

    Formula: kept: log-softmax of the labels' loss and of both models 3 x 4n, exponential, mean, its logarithm, two
        pointwise divergences with their exponentials = 7 x 4n more.
    Source: liger-kernel@0.5.3:test/utils.py:HFDistillationLoss.concatenated_forward, get_batch_loss_metrics;
        test/chunked_loss/test_jsd_loss.py:HFJSDLoss.distillation_loss.
    """
    logits = ops.cast(t, ops.linear(t, *student, num_rows), ops.WIDE)
    teacher_logits = ops.cast(t, ops.linear(t, teacher[0], teacher[1].detach(), num_rows), ops.WIDE)
    hard = cross_entropy(t, logits, num_rows)
    scaled = t.view(logits)
    soft = _mixture_divergence(t, ops.scale_in_place(t, scaled), teacher_logits)
    return ops.add(t, hard, soft)


def _mixture_divergence(t: Tape, logits: Tensor, teacher_logits: Tensor) -> Tensor:
    own, other = ops.log_softmax(t, logits), ops.log_softmax(t, teacher_logits)
    mean = ops.add(
        t,
        ops.scale(t, ops.pointwise(t, own, keeps_result=True)),
        ops.scale(t, ops.pointwise(t, other, keeps_result=True)),
    )
    logarithm = ops.pointwise(t, mean)
    one = ops.reduce(t, pointwise_divergence(t, logarithm, own), 1)
    return ops.add(t, one, ops.reduce(t, pointwise_divergence(t, logarithm, other), 1))


def jensen_shannon_head(
    t: Tape, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], num_rows: int
) -> Tensor:
    """Jensen-Shannon divergence of two heads in the compute dtype and fp32.

    Formula: per head logits nw, scaled nw and log-softmax nw (kept); then :func:`jensen_shannon` of both.
    Source: liger-kernel@0.8.0:benchmark/scripts/benchmark_fused_linear_jsd.py:TorchLMHeadJSD.
    """
    logits = ops.linear(t, *student, num_rows)
    teacher_logits = ops.linear(t, *teacher, num_rows)
    own = ops.log_softmax(t, ops.scale(t, logits))
    other = ops.log_softmax(t, ops.scale(t, teacher_logits))
    return jensen_shannon(t, own, other, num_rows)
