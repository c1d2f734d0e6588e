"""What can be changed where an evaluation is fuller than the step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ullage.i18n import _
from ullage.plan.advice import costs
from ullage.plan.advice.change import Change
from ullage.plan.advice.typed import typed
from ullage.spec.training import Evaluation, TrainingJob


def changes_of_evaluation(job: TrainingJob) -> Iterator[Change]:
    """Yield smaller batches of an evaluation, and metrics on the host; nothing where there is none."""
    asked = job.evaluation
    if asked is None:
        return
    if asked.kept_batches > 1:
        yield _changed(
            job,
            replace(asked, kept_batches=1),
            change=_("logits of an evaluation moved to the host after every batch"),
            typed_as="evaluation.kept",
        )
    batch = asked.batch_size
    while batch > 1:
        batch //= 2
        yield _changed(
            job,
            replace(asked, batch_size=batch),
            change=_("{batch} sequences at a time in an evaluation").format(batch=batch),
            typed_as="evaluation",
        )


def _changed(job: TrainingJob, other: Evaluation, *, change: str, typed_as: str) -> Change:
    return Change(
        key="evaluation",
        change=change,
        cost=costs.SHORTER_EVALUATION,
        flags=_words(other),
        typed=typed(job, typed_as, batch=other.batch_size),
        apply=lambda job: replace(job, evaluation=other),
    )


def _words(asked: Evaluation) -> str:
    """Return the option as it would be typed."""
    parts = [str(asked.batch_size)]
    parts += [f"seq={asked.seq_len}"] if asked.seq_len else []
    parts += [f"kept={asked.kept_batches}"] if asked.kept_batches else []
    return "--evaluate " + ",".join(parts)
