"""Weigh the changes of a training job: the same fit run on the changed job, its fullest rank beside the one before."""

from __future__ import annotations

from collections.abc import Iterable

from ullage.errors import UllageError
from ullage.i18n import _
from ullage.plan.advice.change import Change
from ullage.plan.advice.costs import LESS_RESERVE
from ullage.plan.advice.order import Search, Tried, merged_flags
from ullage.plan.advice.training import changes_of_training
from ullage.spec.training import TrainingJob
from ullage.training_fit import TrainingAdvice, TrainingFit, Walker, judge
from ullage.units import format_bytes

#: Below this share of the device a gain is not worth a change, and what costs more than this is no advice for a job
#: that fits.
LEAST_SHARE = 0.01
ROOMY_WEIGHT = 0.06
#: Runs of the fit that are spent: some 10 ms each where a step is summed up. Where every tensor of it is placed, a
#: layer takes about as long, so that the layers of all runs are counted.
MOST_TRIALS = 60
LEAST_TRIALS = 8
LAYERS_PLACED = 400
#: What wins most as a rule: tried first where only a few runs may be spent.
STRONGEST = (
    "recompute", "micro_batch", "offload_optimizer", "offload_params", "zero", "fsdp", "loss", "optimizer", "tp",
    "base_quantization",
)  # fmt: skip
SUMMED_UP = ("megatron", "hf_trainer", "single", "ddp")


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
    used, most = result.ledger.device_used.bytes, _most_trials(job)
    if most <= LEAST_TRIALS:
        changes = sorted(changes, key=_strongest_first)

    def trial(change: Change) -> Tried | None:
        try:
            changed = change.apply(job)
            after = judge(walker(changed), reserve)
        except UllageError:  # this framework does not do it, or the layout forbids it
            return None
        gain = used - after.ledger.device_used.bytes
        return Tried(change=change, gain_bytes=gain, verdict=after.verdict, result=changed)

    search = Search(
        trial,
        before=result.verdict,
        least_bytes=LEAST_SHARE * result.total_bytes.value,
        needed_bytes=used + result.reserve_bytes - result.total_bytes.value,
        most_trials=most,
    )
    return (*(_told(tried) for tried in search.advice(changes)), *_less_reserve(result))


def _most_trials(job: TrainingJob) -> int:
    if job.engine in SUMMED_UP:
        return MOST_TRIALS
    return min(MOST_TRIALS, max(LEAST_TRIALS, LAYERS_PLACED // max(1, len(job.model.layers))))


def _strongest_first(change: Change) -> int:
    return STRONGEST.index(change.key) if change.key in STRONGEST else len(STRONGEST)


def _told(tried: Tried) -> TrainingAdvice:
    change = tried.change
    return TrainingAdvice(
        change=change.change,
        gain_bytes=tried.gain_bytes,
        cost=change.cost.words,
        flags=_flags(tried),
        verdict=tried.verdict,
        key=change.key,
        typed=change.typed,
        slower=round(change.cost.slower, 4),
        source=change.cost.source,
    )


def _flags(tried: Tried) -> str:
    """Return the flags, with the passes and replicas that all changes together leave."""
    job: TrainingJob = tried.result
    told = tried.change.flags
    now = {"--grad-accum": job.grad_accum, "--dp": job.parallel.data_parallel_size}
    return merged_flags(told, *(f"{name} {value}" for name, value in now.items() if name in told.split()))


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
