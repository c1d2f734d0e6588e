"""Preference and reinforcement jobs: the policy walked by its framework's room, the other models laid beside it.

``step(job)`` decides what the framework's version does, walks the policy with its own loss, and adds frozen copies,
the pass that scores with them, and generation. The peak of a rank is the largest of all these moments.
"""

from __future__ import annotations

from dataclasses import replace

from ullage.engines import training
from ullage.engines.rlhf.models import beside, value_step
from ullage.engines.rlhf.moments import with_scoring
from ullage.engines.rlhf.resolve import policy_job, resolve
from ullage.engines.rlhf.rollout import with_generation
from ullage.engines.training import TrainingStep
from ullage.spec.rlhf import ON_POLICY
from ullage.spec.training import TrainingJob

__all__ = ["step"]


def step(job: TrainingJob) -> TrainingStep:
    """Walk one step of a preference or reinforcement job.

    Raises:
        InputError: a kind that the framework's rules do not cover, or settings that contradict each other.
    """
    filled = resolve(job)
    policy = policy_job(filled)
    walked = training.step(policy)
    policy = replace(policy, engine=walked.job.engine)  # ZeRO under the Trainer is walked by DeepSpeed's rules
    asked = filled.rlhf
    assert asked is not None
    value = value_step(policy) if asked.kind == "ppo" else None
    ranks = tuple(beside(rank, policy, value) for rank in walked.ranks)
    ranks = tuple(with_scoring(rank, policy) for rank in ranks)
    if asked.kind in ON_POLICY:
        ranks = tuple(with_generation(rank, policy) for rank in ranks)
    ranks = tuple(sorted(ranks, key=lambda rank: -rank.peak.device_used.bytes))
    answered = replace(
        walked.job,
        model=filled.model,
        micro_batch_size=filled.micro_batch_size,
        loss=filled.loss,
        flags=filled.flags,
        rlhf=asked,
    )
    return TrainingStep(job=answered, ranks=ranks, warnings=walked.warnings)
