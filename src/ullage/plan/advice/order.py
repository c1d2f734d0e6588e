"""In which order advice is told: the cheapest that is enough, then pairs that are, then most memory for the cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.plan.advice.change import Change, Cost

VERDICTS = {"fits": 0, "tight": 1, "does_not_fit": 2}
#: Changes from which pairs are made when none is enough alone, and most changes in one advice.
IN_PAIRS = 6
MOST_TOGETHER = 4
#: Runs of the fit that are kept for combinations.
KEPT_FOR_PAIRS = 4
#: Least weight in gain per cost: a free change is not infinitely good.
LEAST_WEIGHT = 0.01


class Tried(Frozen):
    """A change with what it did: the room won per GPU and the verdict after it. ``result``: what the caller keeps."""

    change: Change
    gain_bytes: int
    verdict: str
    result: Any = None

    @property
    def rank(self) -> int:
        """0 fits, 1 tight, 2 does not fit."""
        return VERDICTS[self.verdict]

    @property
    def worth(self) -> float:
        """Gain per cost."""
        return self.gain_bytes / (LEAST_WEIGHT + max(0.0, self.change.cost.weight))


class Search:
    """Runs the fit on changed jobs, as often as it may.

    Args:
        trial: runs the fit on a changed job; None where the engine refuses the change.
        before: the verdict without any change.
        least_bytes: gains below this are not worth a change.
        needed_bytes: what has to be gained; pairs whose gains add up to less are tried last.
        most_trials: runs of the fit that may be spent.
    """

    def __init__(
        self,
        trial: Callable[[Change], Tried | None],
        *,
        before: str,
        least_bytes: float,
        needed_bytes: float,
        most_trials: int,
    ) -> None:
        self._trial, self._left = trial, most_trials - KEPT_FOR_PAIRS
        self._before, self._least, self._needed = VERDICTS[before], least_bytes, needed_bytes

    def advice(self, changes: Iterable[Change]) -> list[Tried]:
        """Return what helps.

        First what mends the verdict (fits before tight), the cheapest first; where no single change makes it fit,
        a few together that do; then the rest by gain per cost.
        """
        families: dict[str, list[Change]] = {}
        for change in changes:
            families.setdefault(change.key, []).append(change)
        single = [tried for sizes in families.values() if (tried := self._of_family(sizes)) is not None]
        enough = sorted(
            (tried for tried in single if tried.rank < self._before),
            key=lambda tried: (tried.rank, tried.change.cost.weight, -tried.gain_bytes),
        )
        rest = sorted((tried for tried in single if tried.rank >= self._before), key=lambda tried: -tried.worth)
        best = enough[0].rank if enough else self._before
        together = [tried for tried in self._together(single) if tried.rank < best] if best else []
        return sorted([*enough, *together], key=lambda tried: tried.rank) + rest

    def _try(self, change: Change) -> Tried | None:
        if self._left <= 0:
            return None
        tried = self._trial(change)
        self._left -= tried is not None  # what the engine refuses at once costs nothing
        return tried

    def _helpful(self, change: Change) -> Tried | None:
        tried = self._try(change)
        if tried is None or tried.rank > self._before or tried.gain_bytes <= 0:
            return None
        return tried if tried.gain_bytes >= self._least or tried.rank < self._before else None

    def _of_family(self, sizes: list[Change]) -> Tried | None:
        """Return the mildest size of one change that does as much for the verdict as the strongest, which is last."""
        strongest: Tried | None = None
        for change in sorted(sizes, key=lambda change: -change.cost.weight):
            tried = self._helpful(change)
            if strongest is None or (tried is not None and tried.gain_bytes > strongest.gain_bytes):
                strongest = tried or strongest
            if tried is not None and tried.rank < self._before:
                break
            if tried is not None and change.cost.weight > min(size.cost.weight for size in sizes):
                return strongest  # a milder size does not mend what this one leaves
        if strongest is None or strongest.rank >= self._before:
            return strongest
        for change in sorted(sizes, key=lambda change: change.cost.weight):
            if change.cost.weight >= strongest.change.cost.weight:
                break
            tried = self._helpful(change)
            if tried is not None and tried.rank <= strongest.rank:
                return tried
        return strongest

    def _together(self, single: list[Tried]) -> list[Tried]:
        """Return combinations that mend it where one alone does not: pairs, else a few of the best."""
        self._left += KEPT_FOR_PAIRS
        best = sorted(single, key=lambda tried: -tried.worth)[:IN_PAIRS]
        found: list[Tried] = []
        pairs = [(one.gain_bytes + two.gain_bytes, joined([one.change, two.change])) for one, two in _pairs(best)]
        for _gain, pair in sorted(pairs, key=lambda pair: (pair[0] < self._needed, pair[1].cost.weight)):
            tried = self._try(pair) if self._left > 1 else None  # one is left for more than two
            if tried is not None:
                found.append(tried)
            if sum(one.rank == 0 for one in found) == 2:
                break
        for count in range(MOST_TOGETHER, 2, -1) if self._left == 1 else range(3, MOST_TOGETHER + 1):
            if any(one.rank == 0 for one in found) or len(best) < count:
                break
            tried = self._try(joined([one.change for one in best[:count]]))
            if tried is not None:
                found.append(tried)
        return sorted(found, key=lambda tried: (tried.rank, tried.change.cost.weight))[:2]


def _pairs(best: list[Tried]) -> Iterator[tuple[Tried, Tried]]:
    for at, one in enumerate(best):
        for two in best[at + 1 :]:
            yield one, two


def joined(changes: list[Change]) -> Change:
    """Return several changes as one."""
    applied: list[Callable[[Any], Any]] = [change.apply for change in changes]

    def apply(job: Any) -> Any:
        for step in applied:
            job = step(job)
        return job

    flags = [change.flags for change in changes]
    kinds = sorted((change.cost for change in changes), key=lambda cost: -cost.weight)
    words = "; ".join(dict.fromkeys(change.cost.words for change in changes))
    return Change(
        key="+".join(change.key for change in changes),
        change=_(" and ").join(change.change for change in changes),
        cost=Cost(words=words, slower=sum(change.cost.slower for change in changes), kind=kinds[0].kind),
        flags=merged_flags(*flags) if all(flags) else "",  # half of what was weighed would mislead
        typed=" ".join(change.typed for change in changes if change.typed),
        apply=apply,
    )


def merged_flags(*lines: str) -> str:
    """Return flags of several lines as one; a flag that is said twice is told as it was said last."""
    found: dict[str, str] = {}
    for line in lines:
        name = ""
        for word in line.split():
            if word.startswith("--"):
                name = word if word != "--offload" else f"{word} "  # may be given several times
                found[name] = found.get(name, "") if name.endswith(" ") else ""
            elif name.endswith(" "):
                found[name] = f"{found[name]} --offload {word}".removeprefix(" --offload ")
            else:
                found[name] = word
    return " ".join(f"{name.strip()} {value}".strip() for name, value in found.items())
