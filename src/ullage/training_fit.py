"""Model + machine + framework → :class:`TrainingFit`: the fullest rank at its worst moment, and whether it fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ullage.account.calibrated import calibrated_ledger
from ullage.account.parameters import Counts, count
from ullage.catalog.calibration import with_calibration
from ullage.engines.routing import RoutingFit, uneven
from ullage.engines.serving import Amount
from ullage.engines.training import TrainingRank, TrainingStep, step
from ullage.fitting import EXIT_CODES, reserve_of
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.ledger import Ledger
from ullage.spec.training import TrainingJob

if TYPE_CHECKING:
    from ullage.plan.largest import Largest

DEFAULT_RESERVE = "20%"
Walker = Callable[[TrainingJob], TrainingStep]


class TrainingAdvice(Frozen):
    """One change of the job, the memory it frees on the fullest rank, its cost, and what to type.

    ``flags`` are of ``ullage fit``, ``typed`` is in the framework's own words; ``slower`` is the rough share of a
    step's time that the change adds, ``source`` where that is from; ``key`` names the change in the catalogue.
    """

    change: str
    gain_bytes: int
    cost: str
    flags: str
    verdict: str
    key: str = ""
    typed: str = ""
    slower: float = 0.0
    source: str = ""


class TrainingFit(Frozen):
    """The answer, in values; :mod:`ullage.report` prints it."""

    step: TrainingStep
    counts: Counts
    verdict: str
    reason: str
    total_bytes: Amount
    reserve_bytes: int
    worst: TrainingRank
    advice: tuple[TrainingAdvice, ...] = ()
    largest: Largest | None = None
    routing: RoutingFit | None = None
    next_command: str = ""

    @property
    def job(self) -> TrainingJob:
        """The job with its defaults filled in."""
        return self.step.job

    @property
    def ledger(self) -> Ledger:
        """The fullest rank at its worst moment."""
        return self.worst.peak

    @property
    def exit_code(self) -> int:
        """0 fits, 4 tight, 3 does not fit."""
        return EXIT_CODES[self.verdict]


def fit_training(
    job: TrainingJob,
    *,
    reserve: str = DEFAULT_RESERVE,
    advise: bool = True,
    calibrated: bool = True,
    walker: Walker = step,
) -> TrainingFit:
    """Judge a training job by the device used of its fullest rank.

    ``calibrated``: use what ``ullage calibrate`` measured on this kind of GPU, if anything.

    Raises:
        InputError: impossible settings, or a framework whose rules are not written.
    """
    job = with_calibration(job) if calibrated else job
    result = judge(walker(job), reserve)
    result = replace(result, routing=uneven(result.step, job, lambda other: judge(walker(other), reserve).step))
    if advise:
        from ullage.plan.advice.weigh import training_advice
        from ullage.plan.largest import largest

        advice = training_advice(result, job, reserve, walker)
        result = replace(result, advice=advice, largest=largest(result, job, reserve, walker))
    return result


def judge(answer: TrainingStep, reserve: str) -> TrainingFit:
    """Return the verdict: device used against what the runtime reports, the reserve kept free."""
    gpu = answer.job.machine.gpu
    answer = _calibrated(answer) if gpu.calibration is not None else answer
    total = Amount(value=gpu.total_bytes, low=gpu.total_low_bytes, high=gpu.total_high_bytes)
    reserve_bytes = reserve_of(reserve, gpu.total_bytes)
    worst = max(answer.ranks, key=lambda rank: rank.peak.device_used.bytes)
    used = worst.peak.device_used
    if used.bytes > total.value:
        verdict, reason = "does_not_fit", _("more is needed than the device has")
    elif used.high_bytes > total.low:
        verdict, reason = "tight", _("it fits only inside the margin of error")
    elif used.bytes + reserve_bytes > total.value:
        verdict, reason = "tight", _("it fits only inside the reserve")
    else:
        verdict, reason = "fits", _("it fits, with the reserve to spare")
    return TrainingFit(
        step=answer,
        counts=count(answer.job.model),
        verdict=verdict,
        reason=reason,
        total_bytes=total,
        reserve_bytes=reserve_bytes,
        worst=worst,
    )


def _calibrated(answer: TrainingStep) -> TrainingStep:
    """Return the step with measured amounts in the place of modelled ones."""
    machine, engine = answer.job.machine, answer.job.engine
    ranks = tuple(
        replace(
            rank,
            moments=tuple(calibrated_ledger(moment, machine, engine) for moment in rank.moments),
            after_step=calibrated_ledger(rank.after_step, machine, engine),
        )
        for rank in answer.ranks
    )
    return replace(answer, ranks=ranks)
