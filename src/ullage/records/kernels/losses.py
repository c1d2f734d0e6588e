"""Scripts of losses on logits or probabilities.

Source: liger-kernel@0.3.1, @0.8.0:benchmark/scripts/benchmark_cross_entropy.py, benchmark_kl_div.py, benchmark_jsd.py,
    benchmark_tvd.py, benchmark_megatron_cross_entropy.py.
"""

from __future__ import annotations

from ullage.account.kernels import losses, ops
from ullage.account.kernels.tape import Tape, Tensor
from ullage.records.kernels.case import Case, Trial


def cross_entropy(case: Case, t: Tape) -> Trial:
    """fp32 logits that are a leaf, and labels."""
    rows = case.tokens
    logits = t.leaf(rows * case.vocab, 4)
    labels = t.empty(rows, 8)
    if case.liger:
        scaled = case.cutile and case.shared
        return Trial(
            lambda: losses.liger_cross_entropy(t, logits, rows, scaled=scaled),
            retain_graph=case.shared,
            beside=[labels],
        )
    if case.provider not in ("huggingface", "torch"):
        raise case.not_counted()
    return Trial(lambda: losses.cross_entropy(t, logits, rows), retain_graph=case.shared, beside=[labels])


def _log_probabilities(case: Case, t: Tape) -> tuple[Tensor, Tensor, int]:
    """Log-probabilities made of a leaf, and a target."""
    rows = case.tokens
    made = ops.log_softmax(t, t.leaf(rows * case.vocab, 4))
    return made, t.empty(rows * case.vocab, 4), rows


def kl_div(case: Case, t: Tape) -> Trial:
    """Log-probabilities against probabilities."""
    x, target, rows = _log_probabilities(case, t)
    if case.liger:
        return Trial(lambda: losses.liger_kl_divergence(t, x, target, rows, scaled=case.shared, in_place=case.cutile))
    return Trial(lambda: losses.kl_divergence(t, x, target, rows))


def jsd(case: Case, t: Tape) -> Trial:
    """Log-probabilities against log-probabilities."""
    x, target, rows = _log_probabilities(case, t)
    if case.liger:
        return Trial(lambda: losses.liger_jensen_shannon(t, x, target, scaled=case.shared))
    return Trial(lambda: losses.jensen_shannon(t, x, target, rows))


def tvd(case: Case, t: Tape) -> Trial:
    """Probabilities against probabilities."""
    rows = case.tokens
    p = ops.softmax(t, t.leaf(rows * case.vocab, 4))
    q = t.empty(rows * case.vocab, 4)
    if case.liger:
        shared = case.shared
        return Trial(lambda: losses.liger_total_variation(t, p, q, rows, scaled=shared, divided=not shared))
    return Trial(lambda: losses.total_variation(t, p, q))


def megatron_cross_entropy(case: Case, t: Tape) -> Trial:
    """Logits of one rank in 16 bits; the loss is summed, the gradient dropped before every iteration."""
    rows = case.size("seq") * case.size("batch")
    logits = t.leaf(rows * (case.vocab // (case.optional("tp") or 1)), 2)
    kinds = {"liger": "liger", "megatron-fused": "fused", "megatron-unfused": "unfused"}
    if case.provider not in kinds:
        raise case.not_counted()
    kind = kinds[case.provider]
    return Trial(
        lambda: losses.vocab_parallel_cross_entropy(t, logits, rows, kind=kind),
        retain_graph=False,
        summed=True,
        cleared=[logits],
        beside=[t.empty(rows, 8)],
    )
