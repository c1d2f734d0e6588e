"""A change of a job: what it does, how it is typed, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ullage.frozen import Frozen

#: What a cost that is not time weighs beside the share of a step's time, so that all changes stand in one order:
#: accuracy that has to be measured, hardware that has to be had, and a job that is no longer the one asked for.
#: A judgement: a user who has the GPUs or can do with shorter requests reads on to the later changes.
WEIGHTS = {"time": 0.0, "accuracy": 0.25, "hardware": 1.0, "function": 2.0}


class Cost(Frozen):
    """What a change costs.

    Attributes:
        words: for a person.
        slower: rough share of a step's time that is added; 0 is free, below 0 faster.
        kind: ``time``; ``accuracy``, ``hardware`` or ``function`` where something else than time is given up.
        source: where the share is from.
    """

    words: str
    slower: float = 0.0
    kind: str = "time"
    source: str = ""

    @property
    def weight(self) -> float:
        """Place in the order of costs."""
        return self.slower + WEIGHTS[self.kind]


class Change(Frozen):
    """One change.

    Attributes:
        key: which change of the catalogue; of several sizes of one (half the micro-batch, a quarter), the mildest that
            is enough is told.
        change: for a person. ``flags``: of ``ullage fit``. ``typed``: in the engine's own words.
        apply: the job changed; raises an error of ullage where the change does not apply to it.
    """

    key: str
    change: str
    cost: Cost
    flags: str
    typed: str
    apply: Callable[[Any], Any]
