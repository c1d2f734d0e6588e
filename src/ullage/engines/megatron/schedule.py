"""Forward and backward passes of one pipeline rank in the order in which they run.

Source: Megatron-LM@adc69db:megatron/core/pipeline_parallel/schedules.py: get_schedule_table, get_pp_rank_microbatches,
forward_backward_pipelining_without_interleaving; DualPipe README (deepseek-ai/DualPipe); zero bubble: Qi et al. 2024,
arXiv:2401.10241, sec. 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from operator import sub
from typing import NamedTuple

from ullage.numeric import smaller
from ullage.units import cdiv


class Pass(NamedTuple):
    """A forward or backward pass of one micro-batch through the rank's chunk ``virtual``."""

    forward: bool
    virtual: int


#: Micro-batches after which a schedule repeats itself; more change no peak.
SETTLED = 3


def passes(
    *, schedule: str, pipeline: int, virtual: int, rank: int, num_micro_batches: int, group: int, ahead: int = 0
) -> list[Pass]:
    """Return the passes of pipeline rank ``rank``; a long run is cut once the steady state is reached.

    Zero bubble (ZB-H1): rank p holds P - p micro-batches and p more whose weight gradients wait, each counted whole
    (they need 32/34 of it); with several chunks a rank it is walked as interleaved.
    """
    limit = SETTLED * max(2 * pipeline, group) * 2
    number = min(num_micro_batches, limit)
    if schedule == "gpipe":
        return [Pass(True, 0)] * number + [Pass(False, 0)] * number
    if both_ways(schedule):
        return _dual(pipeline * (2 if schedule == "dualpipev" else 1), rank, number)
    if virtual > 1:
        return _interleaved(pipeline, virtual, rank, number, group, ahead)
    warmup = min(pipeline - 1 if schedule == "zero_bubble" else pipeline - rank - 1, number)
    return _one_forward_one_backward([0] * number, [0] * number, warmup)


class Load(NamedTuple):
    """A fullest moment of the passes: a forward or backward of chunk ``virtual`` with ``live`` micro-batches held."""

    forward: bool
    virtual: int
    live: tuple[int, ...]


@lru_cache(maxsize=4096)
def loads(
    *, schedule: str, pipeline: int, virtual: int, rank: int, num_micro_batches: int, group: int, ahead: int = 0
) -> tuple[Load, ...]:
    """Return the moments of a rank's passes that can be the fullest, in the order in which they come.

    What walking :func:`passes` would find, without the walk: of moments between which what is held changes evenly only
    the first and the last, and none that holds no more of any chunk than another of its kind. ``ahead``: more forward
    passes before the first backward than the schedule needs.
    """
    least = settled(
        schedule=schedule,
        pipeline=pipeline,
        virtual=virtual,
        num_micro_batches=num_micro_batches,
        group=group,
        ahead=ahead,
    )
    if schedule == "gpipe" or (virtual == 1 and not both_ways(schedule)):
        ahead_of_it = 0 if schedule == "zero_bubble" else rank
        most = least if schedule == "gpipe" else min(pipeline - ahead_of_it, least)
        live = (most, *[0] * (virtual - 1))
        return Load(True, 0, live), Load(False, 0, live)
    if both_ways(schedule):
        stages = pipeline * (2 if schedule == "dualpipev" else 1)
        first, second = min(stages - rank, least), min(rank + 1, least)
        alone, together = (first, 0), (first, second)
        return Load(True, 0, alone), Load(True, 1, together), Load(False, 1, together), Load(False, 0, alone)
    if least < num_micro_batches:
        return loads(
            schedule=schedule,
            pipeline=pipeline,
            virtual=virtual,
            rank=rank,
            num_micro_batches=least,
            group=group,
            ahead=ahead,
        )
    warmup = warmup_passes(pipeline, virtual, rank, group) + ahead
    return fullest(tuple(dict.fromkeys(_turns(virtual, num_micro_batches, group, warmup))))


def both_ways(schedule: str) -> bool:
    """Micro-batches enter at both ends; else a rank never holds more than the ranks before it."""
    return schedule in ("dualpipe", "dualpipev")


def warmup_passes(pipeline: int, virtual: int, rank: int, group: int) -> int:
    """Forward passes of a rank before its first backward under the interleaved schedule: 2*(P-p-1) + (V-1)*group."""
    return (pipeline - rank - 1) * 2 + (virtual - 1) * group


def _turns(virtual: int, number: int, group: int, warmup: int) -> Iterator[Load]:
    """Yield the first and the last moment of every stretch in which one chunk runs forward and one backward."""
    total, last = number * virtual, number // group
    warmup = min(warmup, total)

    def before(at: int) -> tuple[int, tuple[int, ...]]:
        """Return the chunk of forward pass ``at``, and the passes of each chunk before it."""
        turn = min(at // (group * virtual), last)
        size = (group if turn < last else number % group) or 1
        chunk, more = divmod(at - turn * group * virtual, size)
        low = turn * group
        return chunk, (low + size,) * chunk + (low + more,) + (low,) * (virtual - chunk - 1)

    starts = {0, total}
    for start in range(0, number, group):
        starts.update(start * virtual + chunk * min(group, number - start) for chunk in range(virtual))
    for at in sorted({start + shift for start in starts for shift in (-1, 0, warmup - 1, warmup, warmup + 1)}):
        if 0 <= at < total:
            chunk, _done = before(at)
            _next, forward = before(at + 1)
            _next, backward = before(max(0, at - warmup))
            yield Load(True, chunk, tuple(map(sub, forward[:virtual], backward[virtual - 1 :: -1])))
    for at in sorted({start + shift for start in starts for shift in (-1, 0, -warmup - 2, -warmup - 1, -warmup)}):
        if 0 <= at < total:
            chunk, backward = before(at)
            _next, forward = before(min(at + warmup + 1, total))
            yield Load(False, virtual - 1 - chunk, tuple(map(sub, forward[:virtual], backward[virtual - 1 :: -1])))


def fullest(found: tuple[Load, ...]) -> tuple[Load, ...]:
    """Leave out every load that another of its kind is at least as full as, chunk by chunk."""
    by_kind: dict[tuple[bool, int], set[tuple[int, ...]]] = {}
    for load in found:
        by_kind.setdefault((load.forward, load.virtual), set()).add(load.live)
    kept = {kind: _undominated(lives) for kind, lives in by_kind.items()}
    return tuple(load for load in found if load.live in kept[load.forward, load.virtual])


def _undominated(lives: set[tuple[int, ...]]) -> set[tuple[int, ...]]:
    top = tuple(map(max, zip(*lives, strict=True)))
    if top in lives:
        return {top}
    kept: list[tuple[int, ...]] = []
    for live in sorted(lives, key=sum, reverse=True):
        if not any(all(map(int.__ge__, other, live)) for other in kept):
            kept.append(live)
    return set(kept)


def settled(*, schedule: str, pipeline: int, virtual: int, num_micro_batches: int, group: int, ahead: int = 0) -> int:
    """Return the fewest micro-batches whose passes hold the same as those of ``num_micro_batches`` (or of many).

    Formula: 1F1B P; both directions 2P, a rank's most; interleaved: whole groups beyond q = 3 + ceil(2(P-1) / (g V))
        repeat what was held a group before, so q g + n mod g.
    """
    number = smaller(num_micro_batches, SETTLED * max(2 * pipeline, group) * 2)
    if schedule == "gpipe":
        return number
    if both_ways(schedule):
        return smaller(number, 2 * pipeline)
    if virtual == 1:
        return smaller(number, pipeline)
    groups = 3 + cdiv(2 * (pipeline - 1) + ahead, group * virtual)
    return smaller(number // group, groups) * group + number % group


def _one_forward_one_backward(forward: list[int], backward: list[int], warmup: int) -> list[Pass]:
    found = [Pass(True, chunk) for chunk in forward[:warmup]]
    for at in range(len(forward) - warmup):
        found += [Pass(True, forward[warmup + at]), Pass(False, backward[at])]
    return found + [Pass(False, chunk) for chunk in backward[len(forward) - warmup :]]


def _interleaved(pipeline: int, virtual: int, rank: int, number: int, group: int, ahead: int) -> list[Pass]:
    """Chunks take turns in groups of micro-batches; warm-up is 2*(P-p-1) + (V-1)*group passes."""
    forward: list[int] = []
    for start in range(0, number, group):
        size = min(group, number - start)
        for chunk in range(virtual):
            forward += [chunk] * size
    backward = [virtual - 1 - chunk for chunk in forward]
    warmup = min(warmup_passes(pipeline, virtual, rank, group) + ahead, len(forward))
    return _one_forward_one_backward(forward, backward, warmup)


def _dual(stages: int, rank: int, number: int) -> list[Pass]:
    """Both directions at once: stage p (chunk 0) and stage S-1-p (chunk 1) hold S-p and p+1 micro-batches, S+1 in all.

    Source: DualPipe README, memory table: activations of S+1 micro-batches of S stages.
    """
    first, second = min(stages - rank, number), min(rank + 1, number)
    held = [Pass(True, 0)] * first + [Pass(True, 1)] * second
    return held + [Pass(False, 1)] * second + [Pass(False, 0)] * first
