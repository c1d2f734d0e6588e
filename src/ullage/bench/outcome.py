"""What a bench answers, in values: the phases with their curves, the break point, what changing load does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ullage.bench.curves import Sample, Stability, StepRow
from ullage.bench.search import BreakPoint

PHASES = ("idle", "full_load", "changing_load")


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Memory of one rank, or of one device, over a phase; ``marks`` are named instants of it."""

    rank: int
    curve: tuple[Sample, ...] = ()
    peak_used_bytes: int = 0
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    num_alloc_retries: int = 0
    num_ooms: int = 0
    marks: tuple[tuple[str, Sample], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One load.

    Attributes:
        name: idle, full_load or changing_load.
        steps: of training, rank 0's.
        waves: of serving: what was asked and what came back, as plain values.
        figures: medians and such by name: ``step_seconds``, ``tokens_per_second``, ``ttft_p50_seconds`` ...
        died: cause and sentence when the load could not be carried to its end.
    """

    name: str
    seconds: float = 0.0
    ranks: tuple[RankMemory, ...] = ()
    steps: tuple[StepRow, ...] = ()
    waves: tuple[dict[str, Any], ...] = ()
    figures: dict[str, float | int | None] = field(default_factory=dict)
    died: dict[str, str] | None = None

    @property
    def peak_used_bytes(self) -> int | None:
        """The most used on any rank, None where no memory was seen."""
        return max((rank.peak_used_bytes for rank in self.ranks), default=None)


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """A whole bench. ``memory`` says what the curves are of: ``cuda``, ``rss``, ``nvml``, ``recording`` or ``none``."""

    kind: str
    started: str
    memory: str
    job: dict[str, Any]
    machine: dict[str, Any]
    phases: tuple[Phase, ...]
    break_point: BreakPoint | None
    stability: Stability | None
    warnings: tuple[str, ...] = ()

    def phase(self, name: str) -> Phase | None:
        """Return the phase of that name, None where it was not reached."""
        return next((phase for phase in self.phases if phase.name == name), None)
