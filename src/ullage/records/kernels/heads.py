"""Scripts of losses on a linear head.

Source: liger-kernel@0.4.2, @0.8.0:benchmark/scripts/benchmark_fused_linear_cross_entropy.py,
    benchmark_fused_linear_jsd.py, benchmark_orpo_loss.py; @0.5.10:benchmark_distill_cosine_loss.py;
    @0.6.2:benchmark_grpo_loss.py.
"""

from __future__ import annotations

from ullage.account.kernels import chunked, heads
from ullage.account.kernels.tape import Tape, Tensor
from ullage.i18n import _
from ullage.records.compare import NotComparableError
from ullage.records.kernels.case import Case, Trial

#: First version that has the kernel as it is counted; a table of an earlier one was measured on a draft.
FIRST_DISTILLATION = (0, 5, 3)
#: Sequence length of rows that were published while the reference left its logits in 16 bits.
DRAFT_SEQUENCE, DRAFT_VERSION = 4096, (0, 4, 0)
#: Tokens of a chunk of the distillation losses. Source: liger-kernel@0.5.10:chunked_loss/cosine_similarity_loss.py.
DISTILLATION_CHUNK = 1024


def _workspaces(case: Case, t: Tape) -> list[Tensor]:
    """Workspaces of cuBLAS for the main thread and the backward thread."""
    return [t.empty(case.workspace, 1), t.empty(case.workspace, 1)]


def _module_count(case: Case) -> int:
    return 1 if case.shared else 2


def cross_entropy(case: Case, t: Tape) -> Trial:
    """A head and labels."""
    rows, vocab, hidden, width = case.tokens, case.vocab, case.size("hidden"), case.width()
    case.parts("vocab", vocab // hidden)
    x = t.leaf(rows * hidden, width)
    weights = [t.leaf(hidden * vocab, width) for _each in range(_module_count(case))]
    beside = [*_workspaces(case, t), *weights, t.empty(rows, 8)]
    head = weights[0]
    if not case.liger:
        forward = lambda: heads.cross_entropy_head(t, x, head, rows)  # noqa: E731
    elif case.cutile:
        forward = lambda: chunked.whole_gradient_head(t, x, head, rows, vocab)  # noqa: E731
    else:
        wide = case.provider.endswith("fp32-accum")
        forward = lambda: chunked.liger_cross_entropy_head(  # noqa: E731
            t, x, head, rows, vocab, version=case.version, wide_sum=wide
        )
    return Trial(forward, retain_graph=case.shared, beside=beside)


def jsd(case: Case, t: Tape) -> Trial:
    """A student's and a teacher's head, both trained; the scripts share their weights between providers."""
    rows, vocab, hidden, width = case.tokens, case.vocab, case.size("hidden"), case.width()
    case.parts("vocab", vocab // hidden)
    student = (t.leaf(rows * hidden, width), t.leaf(hidden * vocab, width))
    teacher = (t.empty(rows * hidden, width), t.leaf(hidden * vocab, width))
    beside = _workspaces(case, t)[: 1 if case.version < (0, 4) and case.liger else 2]
    if case.liger:
        wide = case.version >= (0, 4)
        return Trial(
            lambda: chunked.liger_jensen_shannon_head(t, student, rows, vocab, wide=wide),
            retain_graph=case.shared,
            beside=[*beside, *teacher],
        )
    return Trial(lambda: heads.jensen_shannon_head(t, student, teacher, rows), retain_graph=case.shared, beside=beside)


def preference(case: Case, t: Tape) -> Trial:
    """ORPO, CPO and SimPO: pairs of sequences.

    Liger's run comes first in the process. What its first compiled call closed over stays alive from then on: the
    head, the gradient it sums, and the input, its gradient, the chunk's input and gradient and the joined gradient of
    one pair. Source: torch@2.5.1:torch/_dynamo (a compiled closure keeps its cells).
    """
    batch, seq = case.parts("batch"), case.size("seq")
    rows, vocab, hidden, width = batch * seq, case.vocab, case.size("hidden"), case.width()
    x = t.leaf(rows * hidden, width)
    weights = [t.leaf(hidden * vocab, width) for _each in range(_module_count(case))]
    labels, head = t.empty(rows, 8), weights[0]
    pair = 2 * seq * hidden
    left = [] if case.shared else [t.empty(hidden * vocab, width) for _each in range(2)]
    left += [] if case.shared else [t.empty(pair, width) for _each in range(5)]
    beside = [*_workspaces(case, t), *weights, *left, labels]
    if case.liger:
        scaled, pairs = case.shared, max(1, batch // 2)
        return Trial(
            lambda: chunked.compiled_preference_head(t, x, head, rows, vocab, num_chunks=pairs, scaled=scaled),
            retain_graph=case.shared,
            beside=beside,
            high_bytes=2 * seq * vocab * width,
        )
    if seq == DRAFT_SEQUENCE and case.version <= DRAFT_VERSION:
        raise NotComparableError(_("the table's reference left its logits in 16 bits when this row was measured"))
    return Trial(lambda: heads.preference_head(t, x, head, labels, rows), retain_graph=case.shared, beside=beside)


def policy(case: Case, t: Tape) -> Trial:
    """GRPO and GSPO: sequences, and a reference model's head."""
    batch, seq = case.parts("batch"), case.size("seq")
    rows, vocab, hidden, width = batch * seq, case.vocab, case.size("hidden"), case.width()
    x, reference_x = t.leaf(rows * hidden, width), t.empty(rows * hidden, width)
    modules = [(t.leaf(hidden * vocab, width), t.leaf(hidden * vocab, width)) for _each in range(_module_count(case))]
    labels = t.empty(rows, 8)
    beside = [*_workspaces(case, t), *(each for pair in modules for each in pair), reference_x, labels]
    head, reference = modules[0]
    if not case.liger:
        forward = lambda: heads.policy_head(t, x, head, reference_x, reference, labels, rows)  # noqa: E731
    elif case.shared:
        forward = lambda: chunked.selective_policy_head(  # noqa: E731
            t, x, head, rows, num_chunks=batch, scaled=True
        )
    else:
        forward = lambda: chunked.compiled_policy_head(t, x, head, rows, vocab, num_chunks=batch)  # noqa: E731
    return Trial(forward, retain_graph=case.shared, beside=beside)


def distillation(case: Case, t: Tape) -> Trial:
    """A student of half the hidden size and its teacher; the scripts keep the input three times."""
    if case.version < FIRST_DISTILLATION:
        raise NotComparableError(_("measured before the kernel was released: its code is not known"))
    rows, vocab, hidden, width = case.tokens, case.vocab, case.size("hidden"), case.width()
    half = hidden // 2
    case.parts("tokens", rows // DISTILLATION_CHUNK)
    copies = [t.empty(rows * half, width) for _each in range(2)]
    student = (t.leaf(rows * half, width), t.leaf(half * vocab, width))
    teacher = (t.empty(rows * hidden, width), t.leaf(hidden * vocab, width))
    other = [t.leaf(half * vocab, width), t.leaf(hidden * vocab, width)]
    beside = [*_workspaces(case, t), *copies, *other, *teacher, t.empty(rows, 8)]
    cosine = case.kernel == "distill_cosine_loss"
    if case.liger and cosine:
        return Trial(
            lambda: chunked.compiled_distillation_head(t, *student, rows, vocab, chunk=DISTILLATION_CHUNK),
            retain_graph=False,
            beside=beside,
            high_bytes=DISTILLATION_CHUNK * vocab * width,
        )
    if case.liger or cosine:
        raise case.not_counted()
    return Trial(lambda: heads.distillation_head(t, student, teacher, rows), retain_graph=False, beside=beside)
