"""Weigh the changes of a training job: the same fit run on the changed job, its fullest rank beside the one before."""

from __future__ import annotations

from collections.abc import Iterable

from ullage.errors import UllageError
from ullage.i18n import _
from ullage.plan.advice.change import Change
from ullage.plan.advice.costs import LESS_RESERVE
from ullage.plan.advice.order import Tried, ordered
from ullage.plan.advice.training import changes_of_training
from ullage.spec.training import TrainingJob
from ullage.training_fit import TrainingAdvice, TrainingFit, Walker, judge
from ullage.units import format_bytes

#: Below this share of the device a gain is not worth a change, and what costs more than this is no advice for a job
#: that fits.
LEAST_SHARE = 0.01
ROOMY_WEIGHT = 0.06


def training_advice(
    result: TrainingFit,
    job: TrainingJob,
    reserve: str,
    walker: Walker,
    changes: Iterable[Change] | None = None,
) -> tuple[TrainingAdvice, ...]:
    """Return the changes that help, in order. ``changes``: of the catalogue, when not all of it."""
    if changes is None:
        changes = changes_of_training(job, result.counts.active)
    if result.verdict == "fits":
        changes = [change for change in changes if change.cost.weight <= ROOMY_WEIGHT]
    used = result.ledger.device_used.bytes

    def trial(change: Change) -> Tried | None:
        try:
            after = judge(walker(change.apply(job)), reserve)
        except UllageError:  # this framework does not do it, or the layout forbids it
            return None
        return Tried(change=change, gain_bytes=used - after.ledger.device_used.bytes, verdict=after.verdict)

    least = LEAST_SHARE * result.total_bytes.value
    found = tuple(_told(tried) for tried in ordered(changes, trial, before=result.verdict, least_bytes=least))
    return (*found, *_less_reserve(result))


def _told(tried: Tried) -> TrainingAdvice:
    change = tried.change
    return TrainingAdvice(
        change=change.change,
        gain_bytes=tried.gain_bytes,
        cost=change.cost.words,
        flags=change.flags,
        verdict=tried.verdict,
        key=change.key,
        typed=change.typed,
        slower=round(change.cost.slower, 4),
        source=change.cost.source,
    )


def _less_reserve(result: TrainingFit) -> tuple[TrainingAdvice, ...]:
    """Return the reserve that would be kept, where nothing but the reserve is missing."""
    total, used = result.total_bytes, result.ledger.device_used
    left = total.low - used.high_bytes
    if result.verdict != "tight" or not 0 < left < result.reserve_bytes:
        return ()
    share = int(100 * left / total.value)
    return (
        TrainingAdvice(
            change=_("a reserve of {size} instead of {asked}").format(
                size=format_bytes(left), asked=format_bytes(result.reserve_bytes)
            ),
            gain_bytes=int(result.reserve_bytes - left),
            cost=LESS_RESERVE.words,
            flags=f"--reserve {share}%",
            verdict="fits",
            key="reserve",
        ),
    )
