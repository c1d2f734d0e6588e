"""Scoring: passes without gradients that make log-probabilities under the reference or the policy of before."""

from __future__ import annotations

from dataclasses import replace

from ullage.account.activations.decoder import Slice
from ullage.account.activations.inference import widest_layer
from ullage.account.activations.log_probs import LogProbPeak, log_probs_of
from ullage.engines.rlhf.models import with_terms
from ullage.engines.training import TrainingRank
from ullage.ledger import Ledger, Term, ranged, total
from ullage.spec.rlhf import ON_POLICY, Rlhf
from ullage.spec.training import TrainingJob

#: Terms of a moment of the loss that are gone, or smaller, while the reference runs.
LOSS_TERMS = ("loss", "logits", "logits_gradient", "logits_and_loss", "temporaries")


def with_scoring(rank: TrainingRank, policy: TrainingJob) -> TrainingRank:
    """Return the rank with the moments of scoring.

    Off-policy kinds run the reference while the policy's forward pass is kept; on-policy kinds score before it.
    Megatron's trainers run the reference first, which is never the fullest moment.
    Source: trl@1.16.0:trainer/dpo_trainer.py:DPOTrainer._compute_loss; ms-swift@3602360a:
        swift/megatron/trainers/dpo_trainer.py:MegatronDPOTrainer.forward_step.
    """
    asked = policy.rlhf
    assert asked is not None
    if policy.engine == "megatron" or not _scores(asked):
        return rank
    peak = log_probs_of(policy)
    scoring = (_layer(policy), _scoring(peak.scoring_bytes))
    if asked.kind in ON_POLICY:
        found = with_terms(replace(rank.after_step, moment="scoring"), scoring)
        return replace(rank, moments=(found, *rank.moments))
    losses = [ledger for ledger in rank.moments if ledger.moment.endswith("loss")]
    extra = [_while_policy_waits(ledger, peak, scoring) for ledger in losses]
    return replace(rank, moments=(*rank.moments, *extra))


def _scores(asked: Rlhf) -> bool:
    return asked.reference in ("copy", "adapter") or asked.kind in ON_POLICY


def _while_policy_waits(ledger: Ledger, peak: LogProbPeak, scoring: tuple[Term, ...]) -> Ledger:
    """Return the moment of the reference's pass: in the place of the loss what it kept, and the reference's own."""
    kept = tuple(term for term in ledger.allocated.children if term.name not in LOSS_TERMS)
    waits = ranged(
        "policy_log_probs",
        peak.loss.kept_bytes,
        low=peak.loss.kept_bytes,
        high=peak.loss.kept_bytes,
        formula="what the policy's log-probabilities keep",
        source=peak.loss.source,
    )
    allocated = total("allocated", (*kept, waits, *scoring))
    less = max(0, allocated.bytes - ledger.allocated.bytes)
    overhead = ledger.reserved_overhead
    overhead = replace(overhead, bytes=max(0, overhead.bytes - less), low_bytes=max(0, overhead.low_bytes - less))
    name = ledger.moment.removesuffix("loss") + "reference forward"
    return replace(ledger, moment=name, allocated=allocated, reserved_overhead=overhead)


def _scoring(num_bytes: int) -> Term:
    return ranged(
        "scoring",
        num_bytes,
        low=num_bytes,
        high=num_bytes,
        formula="log-probabilities without gradients",
        source="trl@1.16.0:trainer/utils.py:selective_log_softmax",
    )


def _layer(job: TrainingJob) -> Term:
    """Return what one layer takes in a pass without gradients."""
    slice_ = Slice(batch=job.micro_batch_size, seq_len=job.seq_len)
    found = widest_layer(job.model, slice_, dtype=job.precision.compute, attention=job.attention)
    return ranged(
        "scoring_layer",
        found.num_bytes,
        low=found.low_bytes,
        high=found.high_bytes,
        formula="the widest layer, nothing kept",
        source="torch@2.13.0:torch/autograd/grad_mode.py:no_grad",
    )
