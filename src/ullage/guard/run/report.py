"""The values of a run's report."""

from __future__ import annotations

from dataclasses import dataclass

from ullage.guard.plan import Value
from ullage.guard.run.needs import Need


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of the command: what it ran with, how it ended, and what was changed after it.

    ``peaks``: (device name, highest use seen, total) while it ran; sampled, so a lower bound.
    """

    number: int
    words: tuple[str, ...]
    knobs: tuple[tuple[str, Value], ...]
    generation: int
    seconds: float
    exit_code: int
    kind: str
    sentence: str
    worker_exit_code: int | None = None
    changes: tuple[str, ...] = ()
    num_swept: int = 0
    num_left: int = 0
    peaks: tuple[tuple[str, int, int], ...] = ()
    dump: str = ""
    errno: int = 0


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """A whole run. ``need`` is what the ledger says of a job that could not be made to fit."""

    verdict: str
    exit_code: int
    sentence: str
    attempts: tuple[Attempt, ...]
    need: Need | None = None
    warnings: tuple[str, ...] = ()
    plan_store: str = ""
