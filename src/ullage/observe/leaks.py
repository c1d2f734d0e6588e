"""Whether a recording grows from step to step, by how much, and which lines hold what it grows by.

Steps are found in the recording itself: a step of training ends where the optimizer last allocates before the next
forward pass (or where backward does, if the optimizer allocates nothing); where there is only forward, a step is what
the most regular stack of the recording returns with.

Formula: growth = (A(last) - A(first)) / steps between; held = bytes allocated between those ends by stacks that leave
    blocks behind in at least half of the steps, and never freed, / steps; leak = min(growth, held).
Symbols: A(i): bytes when step i ends, without gradients, activations and temporaries, which come and go. What the first
    step makes is left out: optimizer states, buffers.
Known error: what an engine keeps on purpose (a cache that fills up) grows as a leak does; the holders tell.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import mean, pstdev

from ullage.observe.attribution import CODES, Attribution
from ullage.observe.attribution_lives import NEVER
from ullage.observe.attribution_stacks import BACKWARD, FORWARD, OPTIMIZER
from ullage.observe.attribution_views import sums_after
from ullage.units import MiB

#: Ends of steps that are needed: one to warm up, and two to compare.
MIN_BOUNDARIES = 3
#: Steps compared before it is called a leak.
MIN_STEPS = 2
#: Steps from which a growth in each of them is no chance any more.
SURE_STEPS = 5
#: Spread of the gaps, as a share of their mean, up to which a stack returns regularly.
REGULAR_SHARE = 0.1
#: Less than this per step is noise of small tensors (a loss that is kept, say); it is told, and no verdict.
LEAST_LEAK_BYTES = MiB
MAX_HOLDERS = 10
#: Categories that come and go within a step.
_PASSING = frozenset(CODES[name] for name in ("gradients", "activations", "temporaries"))


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Blocks of one stack that stayed: ``steps`` of the steps looked at left some behind."""

    stack: int
    bytes: int
    blocks: int
    steps: int


@dataclass(kw_only=True)
class Leak:
    """What grew.

    Attributes:
        found_by: ``optimizer``, ``forward``, ``period`` or nothing: how steps were found.
        boundaries: the event before which each step ends.
        num_steps: steps that were compared; 0 when there are too few.
        growth_bytes: per step. ``bytes_per_step``: the leak, 0 when it is none.
        sure: ``likely`` or ``unsure``.
    """

    found_by: str = ""
    boundaries: list[int] = field(default_factory=list)
    num_steps: int = 0
    growth_bytes: int = 0
    bytes_per_step: int = 0
    sure: str = "unsure"
    holders: list[Holder] = field(default_factory=list)

    @property
    def is_one(self) -> bool:
        """Tell whether it is worth a verdict."""
        return self.num_steps >= MIN_STEPS and self.bytes_per_step >= LEAST_LEAK_BYTES


def find_leak(found: Attribution) -> Leak:
    """Compare the steps of a recording."""
    how, boundaries = steps_of(found)
    leak = Leak(found_by=how, boundaries=boundaries)
    if len(boundaries) < MIN_BOUNDARIES:
        return leak
    levels = [_lasting(row) for row in sums_after(found, [max(0, at - 1) for at in boundaries])]
    leak.num_steps = len(levels) - 1
    leak.growth_bytes = round((levels[-1] - levels[0]) / leak.num_steps)
    leak.holders = _holders(found, boundaries)
    held = sum(holder.bytes for holder in leak.holders) // leak.num_steps
    leak.bytes_per_step = max(0, min(leak.growth_bytes, held))
    rising = sum(later > earlier for earlier, later in pairwise(levels))
    if leak.num_steps >= SURE_STEPS and rising == leak.num_steps:
        leak.sure = "likely"
    leak.holders = leak.holders[:MAX_HOLDERS]
    return leak


def steps_of(found: Attribution) -> tuple[str, list[int]]:
    """Return how steps were found and the event before which each ends."""
    phases = [run.phase for run in found.runs]
    if phases.count(OPTIMIZER) >= 2:
        return "optimizer", _ends(found, OPTIMIZER)
    if FORWARD in phases and BACKWARD in phases:
        return "forward", _ends(found, BACKWARD)
    return _periodic(found)


def _ends(found: Attribution, closing: int) -> list[int]:
    """Return the ends of the phase that closes a step, the last one before each forward pass."""
    ends: list[int] = []
    fresh = True
    for run in found.runs:
        if run.phase == closing:
            ends[len(ends) - (not fresh) :] = [run.last + 1]
            fresh = False
        fresh = fresh or run.phase == FORWARD
    return ends


def _periodic(found: Attribution) -> tuple[str, list[int]]:
    """Return where the stack that returns most regularly asks, of those that return most rarely."""
    lives = found.lives
    stacks = lives.stacks[lives.num_older :]
    counts = Counter(stacks)
    counts.pop(0, None)
    best: tuple[float, list[int]] | None = None
    for stack, count in sorted(counts.items(), key=lambda pair: (pair[1], pair[0]))[:100]:
        if count < MIN_BOUNDARIES:
            continue
        starts = _events_of(lives.starts, stacks, stack, lives.num_older)
        gaps = [later - earlier for earlier, later in pairwise(starts)]
        spread = pstdev(gaps) / mean(gaps)
        covered = (starts[-1] - starts[0]) / max(1, lives.num_events)
        if spread <= REGULAR_SHARE and covered >= 0.5 and mean(gaps) > 2 and (best is None or spread < best[0]):
            best = (spread, starts)
            if spread == 0:
                break
    return ("period", best[1]) if best is not None else ("", [])


def _events_of(starts: array[int], stacks: array[int], stack: int, older: int) -> list[int]:
    """Return the events of one stack; ``index`` of arrays runs in C."""
    found: list[int] = []
    at = -1
    while True:
        try:
            at = stacks.index(stack, at + 1)
        except (ValueError, TypeError):
            return found
        found.append(starts[older + at])


def _lasting(row: list[int]) -> int:
    return sum(size for code, size in enumerate(row) if code not in _PASSING)


def _holders(found: Attribution, boundaries: Sequence[int]) -> list[Holder]:
    """Return the stacks that leave blocks behind in at least half of the steps."""
    lives, first, last = found.lives, boundaries[0], boundaries[-1]
    sums: dict[int, list[int]] = {}
    steps: dict[int, set[int]] = {}
    step = 0
    columns = (lives.starts, lives.ends, lives.sizes, lives.stacks, found.categories)
    for start, end, size, stack, category in zip(*columns, strict=True):
        if end != NEVER or start < first or start >= last or category in _PASSING:
            continue
        while step + 1 < len(boundaries) and boundaries[step + 1] <= start:
            step += 1
        amounts = sums.setdefault(stack, [0, 0])
        amounts[0] += size
        amounts[1] += 1
        steps.setdefault(stack, set()).add(step)
    num_steps = len(boundaries) - 1
    holders = [
        Holder(stack=stack, bytes=amounts[0], blocks=amounts[1], steps=len(steps[stack]))
        for stack, amounts in sums.items()
        if 2 * len(steps[stack]) >= num_steps
    ]
    return sorted(holders, key=lambda each: (-each.bytes, each.stack))
