"""What a trace says: peaks, and which tensors of which modules make them. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ullage.allocator.run import Outcome
from ullage.trace.job import TraceJob
from ullage.trace.recorder.events import CATEGORIES, Allocation, Place, Trace


@dataclass(frozen=True, kw_only=True)
class PeakTensor:
    """Allocations at the peak that are alike: of one module, category, operator, shape and size."""

    category: str
    module: str
    owner: str
    op: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    count: int
    stack: int

    @property
    def total_bytes(self) -> int:
        """Bytes of all of them."""
        return self.size_bytes * self.count


@dataclass(kw_only=True)
class TraceResult:
    """A traced step and what the allocator made of it.

    Attributes:
        trace: the events.
        outcome: of the allocator; ``peak_event``: at which most was allocated.
        num_layers_traced: of how many layers the events were taken, the rest repeated; 0 where all were.
    """

    name: str
    job: TraceJob
    trace: Trace
    outcome: Outcome
    peak_event: int
    num_parameters: int
    num_trained: int
    seconds: float
    num_layers: int = 0
    num_layers_traced: int = 0
    warnings: list[str] = field(default_factory=list)

    @property
    def peak_allocated_bytes(self) -> int:
        """Most bytes in blocks in use at once (``torch.cuda.max_memory_allocated``)."""
        return self.outcome.peak_allocated_bytes

    @property
    def peak_reserved_bytes(self) -> int:
        """Most bytes taken from the driver at once (``torch.cuda.max_memory_reserved``)."""
        return self.outcome.peak_reserved_bytes

    @property
    def peak_place(self) -> Place:
        """Where the program was at the peak."""
        return self.trace.place(self.peak_event)

    def at_peak(self) -> list[tuple[int, Allocation]]:
        """Return (number, allocation) of all that was in use at the peak."""
        return [(number, self.trace.allocations[number]) for number in self.trace.alive_at(self.peak_event)]

    def categories(self) -> dict[str, int]:
        """Return the bytes of each category at the peak."""
        found = dict.fromkeys(CATEGORIES, 0)
        for _number, allocation in self.at_peak():
            found[allocation.category] += allocation.size_bytes
        return {name: size for name, size in found.items() if size}

    def peak_tensors(self) -> list[PeakTensor]:
        """Return what was in use at the peak, alike ones together, largest first."""
        counts: dict[tuple[Any, ...], int] = {}
        for _number, one in self.at_peak():
            module = self.trace.places[one.place].module
            module = one.owner.rpartition(".")[0] if one.owner else module
            key = (one.category, module, one.owner, one.op, one.dtype, one.shape, one.size_bytes, one.stack)
            counts[key] = counts.get(key, 0) + 1
        names = ("category", "module", "owner", "op", "dtype", "shape", "size_bytes", "stack")
        found = [PeakTensor(count=count, **dict(zip(names, key, strict=True))) for key, count in counts.items()]
        return sorted(found, key=lambda each: -each.total_bytes)
