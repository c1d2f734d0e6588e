"""In which order advice is told: the cheapest that is enough, then pairs that are, then most memory for the cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.plan.advice.change import Change, Cost

VERDICTS = {"fits": 0, "tight": 1, "does_not_fit": 2}
#: Changes from which pairs are made when none is enough alone, and most changes in one advice.
IN_PAIRS = 6
MOST_TOGETHER = 4
#: Least weight in gain per cost: a free change is not infinitely good.
LEAST_WEIGHT = 0.01


class Tried(Frozen):
    """A change with what it did: the room won per GPU and the verdict after it. ``context``: of the caller."""

    change: Change
    gain_bytes: int
    verdict: str
    context: Any = None


class Trial(Protocol):
    """Run the fit on a changed job; None where the engine refuses it."""

    def __call__(self, change: Change) -> Tried | None: ...


def ordered(changes: Iterable[Change], trial: Trial, *, before: str, least_bytes: float) -> list[Tried]:
    """Try the changes and return those that help.

    First those that mend the verdict (fits before tight), the cheapest first; where no single one makes it fit, pairs
    or more that do together; then the rest by gain per cost. Of several sizes of one change, one is told.

    Args:
        changes: the catalogue for this job.
        trial: runs the fit on a changed job.
        before: the verdict without any.
        least_bytes: gains below this are not worth a change.
    """
    helpful = []
    for change in changes:
        tried = trial(change)
        if tried is not None and _helps(tried, before, least_bytes):
            helpful.append(tried)
    single = _one_of_each(helpful)
    enough = [tried for tried in single if VERDICTS[tried.verdict] < VERDICTS[before]]
    together: list[Tried] = []
    if before != "fits" and not any(tried.verdict == "fits" for tried in enough):
        best = min((VERDICTS[tried.verdict] for tried in enough), default=VERDICTS[before])
        together = [tried for tried in _together(helpful, trial) if VERDICTS[tried.verdict] < best]
    rest = [tried for tried in single if tried not in enough]
    enough.sort(key=lambda tried: (VERDICTS[tried.verdict], tried.change.cost.weight, -tried.gain_bytes))
    rest.sort(key=lambda tried: -_worth(tried))
    return sorted([*enough, *together], key=lambda tried: VERDICTS[tried.verdict]) + rest


def _helps(tried: Tried, before: str, least_bytes: float) -> bool:
    if VERDICTS[tried.verdict] > VERDICTS[before]:
        return False
    return tried.gain_bytes >= least_bytes or (tried.gain_bytes > 0 and VERDICTS[tried.verdict] < VERDICTS[before])


def _worth(tried: Tried) -> float:
    return tried.gain_bytes / max(LEAST_WEIGHT, LEAST_WEIGHT + tried.change.cost.weight)


def _one_of_each(helpful: Iterable[Tried]) -> list[Tried]:
    """Return one size of each change: the cheapest of those with the best verdict, else the one that gains most."""
    kept: dict[str, Tried] = {}
    for tried in helpful:
        other = kept.get(tried.change.key)
        if other is None or _mildness(tried) < _mildness(other):
            kept[tried.change.key] = tried
    return list(kept.values())


def _mildness(tried: Tried) -> tuple[float, ...]:
    rank = VERDICTS[tried.verdict]
    return (rank, -tried.gain_bytes) if rank == VERDICTS["does_not_fit"] else (rank, tried.change.cost.weight)


def _together(helpful: list[Tried], trial: Trial) -> list[Tried]:
    """Return combinations that mend it where one alone does not: pairs, else a few of the best, one on another."""
    strongest: dict[str, Tried] = {}
    for tried in sorted(helpful, key=lambda tried: -_worth(tried)):
        strongest.setdefault(tried.change.key, tried)
    best = list(strongest.values())[:IN_PAIRS]
    pairs = [joined([one.change, two.change]) for at, one in enumerate(best) for two in best[at + 1 :]]
    found = [tried for pair in pairs if (tried := trial(pair)) is not None]
    fits = sorted((t for t in found if t.verdict == "fits"), key=lambda tried: tried.change.cost.weight)
    if fits:
        return fits[:2]
    for count in range(3, MOST_TOGETHER + 1):
        tried = trial(joined([one.change for one in best[:count]])) if len(best) >= count else None
        if tried is not None and tried.verdict == "fits":
            return [tried]
    return sorted((t for t in found if t.verdict == "tight"), key=lambda tried: tried.change.cost.weight)[:2]


def joined(changes: list[Change]) -> Change:
    """Return several changes as one."""
    applied: list[Callable[[Any], Any]] = [change.apply for change in changes]

    def apply(job: Any) -> Any:
        for step in applied:
            job = step(job)
        return job

    kinds = sorted((change.cost for change in changes), key=lambda cost: -cost.weight)
    words = "; ".join(dict.fromkeys(change.cost.words for change in changes))
    return Change(
        key="+".join(change.key for change in changes),
        change=_(" and ").join(change.change for change in changes),
        cost=Cost(words=words, slower=sum(change.cost.slower for change in changes), kind=kinds[0].kind),
        flags=" ".join(change.flags for change in changes if change.flags),
        typed=" ".join(change.typed for change in changes if change.typed),
        apply=apply,
    )
