"""The largest micro-batch and the longest sequence that still fit, by a few further runs of the training fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ullage.errors import UllageError
from ullage.frozen import Frozen
from ullage.plan.advice.weigh import SUMMED_UP
from ullage.spec.training import TrainingJob
from ullage.training_fit import TrainingFit, Walker, judge

#: Runs of the fit for one answer; use grows almost in a line, so that two points foretell the third.
MOST_RUNS = 7
#: Where every tensor of a step is placed, a run takes a hundred times as long: the micro-batch alone is looked for.
RUNS_PLACED, LAYERS_PLACED = 3, 40
MOST_MICRO_BATCH = 4096
MOST_TOKENS = 2**22
SEQ_UNIT = 256


class Largest(Frozen):
    """The largest that was seen to fit; ``None``: not looked for. ``surely``: the next larger one does not fit."""

    micro_batch_size: int | None = None
    micro_batch_surely: bool = False
    seq_len: int | None = None
    seq_len_surely: bool = False


def largest(result: TrainingFit, job: TrainingJob, reserve: str, walker: Walker) -> Largest:
    """Return the largest micro-batch at the length asked for, and the longest sequence at the micro-batch asked for."""

    def room(**fields: Any) -> float | None:
        try:
            return _room(judge(walker(replace(job, **fields)), reserve))
        except UllageError:
            return None

    now, placed = _room(result), job.engine not in SUMMED_UP
    if placed and len(job.model.layers) > LAYERS_PLACED:
        return Largest()
    micro, micro_surely = largest_value(
        lambda value: room(micro_batch_size=value), job.micro_batch_size, now,
        unit=1, most=MOST_MICRO_BATCH, runs=RUNS_PLACED if placed else MOST_RUNS,
    )  # fmt: skip
    if placed or job.rlhf is not None:  # prompts and completions have lengths of their own
        return Largest(micro_batch_size=micro, micro_batch_surely=micro_surely)
    most = job.model.max_position_embeddings or MOST_TOKENS
    length, length_surely = largest_value(
        lambda value: room(seq_len=value), job.seq_len, now,
        unit=SEQ_UNIT, most=max(job.seq_len, most // SEQ_UNIT * SEQ_UNIT), runs=MOST_RUNS,
    )  # fmt: skip
    return Largest(
        micro_batch_size=micro, micro_batch_surely=micro_surely, seq_len=length, seq_len_surely=length_surely
    )


def _room(result: TrainingFit) -> float:
    """Return what is left beside the reserve, and beside the margin of error; a job fits where it is not negative."""
    used, total = result.ledger.device_used, result.total_bytes
    return min(total.value - result.reserve_bytes - used.bytes, total.low - used.high_bytes)


def largest_value(
    room: Callable[[int], float | None], start: int, now: float, *, unit: int, most: int, runs: int
) -> tuple[int, bool]:
    """Return the largest multiple of ``unit`` (or ``start``) with room, and whether the next has none.

    Args:
        room: what is left at a value; falls as the value grows. None: the value is refused.
        start: where ``now`` is left.
        unit, most: the step, and the largest value of interest.
        runs: calls of ``room`` that may be spent.
    """
    seen = {start: now}
    fits, misses = (start, most + unit) if now >= 0 else (0, start)
    for _run in range(runs):
        if misses - fits <= unit:
            break
        value = _guess(seen, fits, misses, unit)
        left = room(value)
        if left is not None:
            seen[value] = left
        fits, misses = (value, misses) if left is not None and left >= 0 else (fits, value)
    return fits, misses - fits <= unit


def _guess(seen: dict[int, float], fits: int, misses: int, unit: int) -> int:
    """Return the value to look at next, strictly between the largest that fits and the smallest that does not."""
    low, high = fits // unit + 1, -(-misses // unit) - 1
    if len(seen) == 1:
        guess = 2 * fits // unit if fits else misses // (2 * unit)
    else:
        (one, left), (two, right) = sorted(seen.items(), key=lambda item: abs(item[1]))[:2]
        slope = (left - right) / (two - one)
        guess = int((one + left / slope) // unit) if slope > 0 else (low + high) // 2
    return unit * min(max(guess, low), max(high, low))
