"""Dynamic batches by tokens: cut a window where the next sample would exceed a budget of tokens.

No torch: works on lengths. The order of the samples is kept, so that the data order and the sum of the window's
gradients do not depend on the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from ullage.errors import InputError
from ullage.guard.plan import Plan
from ullage.i18n import _

Sample = TypeVar("Sample")
#: Knob that holds the budget of tokens of a micro-batch.
KNOB = "micro_tokens"


def pack(lengths: Sequence[int], budget: int, *, padded: bool = True) -> list[tuple[int, int]]:
    """Return (start, stop) of runs of samples within a budget of tokens.

    ``padded``: a run costs its longest sample times its samples; otherwise (packed sequences) the sum of its lengths.
    A sample that alone exceeds the budget is a run of its own: it cannot be cut here.
    """
    if budget < 1:
        raise InputError(_("{name} must be at least {least}").format(name="budget", least=1))
    found, start, longest, total = [], 0, 0, 0
    for at, length in enumerate(lengths):
        cost = max(longest, length) * (at - start + 1) if padded else total + length
        if at > start and cost > budget:
            found.append((start, at))
            start, longest, total = at, 0, 0
        longest, total = max(longest, length), total + length
    if lengths:
        found.append((start, len(lengths)))
    return found


class TokenBatches:
    """Batches of samples of about ``budget`` tokens, whose budget shrinks with the plan.

    >>> batches = TokenBatches(samples, budget=16384, length=len)
    >>> for batch in batches: ...

    ``plan`` is asked before each batch: its knob ``micro_tokens``, if smaller, is the budget.
    """

    def __init__(
        self,
        samples: Iterable[Sample],
        budget: int,
        *,
        length: Callable[[Any], int] = len,
        padded: bool = True,
        plan: Callable[[], Plan] | None = None,
        max_samples: int = 0,
    ) -> None:
        if budget < 1:
            raise InputError(_("{name} must be at least {least}").format(name="budget", least=1))
        self.samples, self.budget, self.length = samples, budget, length
        self.padded, self.plan, self.max_samples = padded, plan, max_samples
        self.position = 0

    def current_budget(self) -> int:
        """Return the budget under the plan as it is now."""
        return min(self.budget, int(self.plan().get(KNOB, self.budget))) if self.plan else self.budget

    def __iter__(self) -> Iterator[list[Any]]:
        batch: list[Any] = []
        longest = total = 0
        for sample in self.samples:
            length = self.length(sample)
            cost = max(longest, length) * (len(batch) + 1) if self.padded else total + length
            full = self.max_samples and len(batch) >= self.max_samples
            if batch and (cost > self.current_budget() or full):
                self.position += len(batch)
                yield batch
                batch, longest, total = [], 0, 0
            batch.append(sample)
            longest, total = max(longest, length), total + length
        if batch:
            self.position += len(batch)
            yield batch
