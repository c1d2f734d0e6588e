"""Curves of memory over time and what is read off them: peaks, drift, recovery."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

#: Points of a curve that are kept in an output; more are thinned, extremes stay.
MAX_POINTS = 600
#: After a burst, a step counts as recovered once it takes no more than this times the usual.
RECOVERED = 1.10


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Memory at one instant: ``used_bytes`` of the device (CUDA) or of the process (CPU: resident set)."""

    t: float
    used_bytes: int
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None

    @property
    def held_bytes(self) -> int:
        """What is held beyond what is in use: reserved - allocated; the resident set where no allocator is seen."""
        if self.reserved_bytes is None or self.allocated_bytes is None:
            return self.used_bytes
        return self.reserved_bytes - self.allocated_bytes


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """One training step, or one served request: what was asked, how long it took, the memory during and after it."""

    t: float
    label: str
    micro_batch: int
    seq: int
    seconds: float
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    peak_used_bytes: int = 0
    after: Sample | None = None


@dataclass(frozen=True, kw_only=True)
class Stability:
    """What changing load does to a process that had settled.

    Attributes:
        drift_bytes: growth of the held memory (reserved - allocated, or the resident set) between two steps of the
            same shape, before and after the changes; None where there are no two such steps.
        drift_bytes_per_step: the same for each step between them.
        recovery_seconds: from the last step of a burst to the first step that is as fast as before it (within 10 %),
            the longest of all bursts; None when one never got so fast again, or without a burst.
        recovered: every burst was recovered from.
        num_bursts: how many there were.
    """

    drift_bytes: int | None
    drift_bytes_per_step: float | None
    recovery_seconds: float | None
    recovered: bool | None
    num_bursts: int


def median(values: Sequence[float]) -> float:
    """Return the median; 0 of nothing."""
    ordered = sorted(values)
    if not ordered:
        return 0.0
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least ``share`` of all do not exceed; 0 of nothing."""
    ordered = sorted(values)
    if not ordered:
        return 0.0
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


def stability(rows: Sequence[StepRow]) -> Stability:
    """Read drift and recovery off the steps of the changing phase (labels: steady, ramp, burst, settle, sawtooth)."""
    drift, per_step = _drift(rows)
    usual = median([row.seconds for row in rows if row.label == "steady"])
    waits = [_recovery(rows, at, usual) for at in _burst_ends(rows)]
    known = [wait for wait in waits if wait is not None]
    return Stability(
        drift_bytes=drift,
        drift_bytes_per_step=per_step,
        recovery_seconds=max(known) if waits and len(known) == len(waits) else None,
        recovered=(len(known) == len(waits)) if waits else None,
        num_bursts=len(waits),
    )


def _drift(rows: Sequence[StepRow]) -> tuple[int | None, float | None]:
    """Compare the last steady step before the first change with the last steady step of the same shape at the end."""
    steady = [at for at, row in enumerate(rows) if row.label == "steady" and row.after is not None]
    if not steady:
        return None, None
    settled = steady[0]
    while settled + 1 in steady:
        settled += 1
    last = steady[-1]
    first_row, last_row = rows[settled], rows[last]
    if last == settled or (first_row.micro_batch, first_row.seq) != (last_row.micro_batch, last_row.seq):
        return None, None
    assert first_row.after is not None and last_row.after is not None
    grown = last_row.after.held_bytes - first_row.after.held_bytes
    return grown, grown / (last - settled)


def _burst_ends(rows: Sequence[StepRow]) -> list[int]:
    labels = [row.label for row in rows]
    return [at for at in range(len(rows) - 1) if labels[at] == "burst" and labels[at + 1] != "burst"]


def _recovery(rows: Sequence[StepRow], end: int, usual: float) -> float | None:
    """Return the seconds from the end of a burst to the end of the first step as fast as usual."""
    finished = rows[end].t + rows[end].seconds
    for row in rows[end + 1 :]:
        if row.label == "burst":
            return None
        if row.label in ("settle", "steady") and row.seconds <= usual * RECOVERED:
            return row.t + row.seconds - finished
    return None


def thinned(samples: Sequence[Sample], limit: int = MAX_POINTS) -> list[Sample]:
    """Return at most about ``limit`` samples: of each stretch the one with the most used, and first and last."""
    if len(samples) <= limit:
        return list(samples)
    size = -(-len(samples) // max(1, limit - 2))
    inner = [max(samples[at : at + size], key=lambda one: one.used_bytes) for at in range(1, len(samples) - 1, size)]
    return [samples[0], *inner, samples[-1]]


def plain(value: Any) -> Any:
    """Return dataclasses and what is in them as plain JSON values."""
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value
