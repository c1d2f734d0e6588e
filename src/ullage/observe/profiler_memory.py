"""The memory of a trace: which operator allocated what, the peak, what was alive then, and what each step leaves."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator

from ullage.frozen import Frozen
from ullage.observe.measured import Curve
from ullage.observe.profiler_trace import Columns, Trace

NOBODY = -1
_STEP = "ProfilerStep#"
#: Ranges within other ranges that are phases all the same.
_TELLING = re.compile(r"forward|backward|loss|optimi[sz]er", re.IGNORECASE)


class Owners:
    """Who runs when: per operator its parent, its phase and its own time; per allocation the innermost operator."""

    def __init__(self, trace: Trace) -> None:
        count = len(trace.operators)
        self.parent = array("q", [NOBODY]) * count
        self.phase = array("l", [0]) * count
        self.inner_us = array("d", [0.0]) * count  # of children
        self.allocator = array("q", [NOBODY]) * len(trace.allocations)
        self.phases: list[str] = [""]
        self._phase_ids = {"": 0}
        self._trace = trace
        for operators, allocations in _by_thread(trace):
            self._sweep(operators, allocations)

    def _sweep(self, operators: list[int], allocations: list[int]) -> None:
        """Walk one thread in time, with the operators that are open as a stack."""
        columns, times = self._trace.operators, self._trace.allocations.time
        stack: list[int] = []
        at = 0
        for event in allocations:
            moment = times[event]
            while at < len(operators) and columns.start[operators[at]] <= moment:
                self._open(operators[at], stack)
                at += 1
            while stack and columns.end[stack[-1]] < moment:
                stack.pop()
            if stack:
                self.allocator[event] = stack[-1]
        for place in operators[at:]:
            self._open(place, stack)

    def _open(self, place: int, stack: list[int]) -> None:
        columns = self._trace.operators
        start, end = columns.start[place], columns.end[place]
        while stack and (columns.end[stack[-1]] <= start or columns.end[stack[-1]] < end):
            stack.pop()  # over, or ranges that cross: no parent
        if stack:
            parent = stack[-1]
            self.parent[place] = parent
            self.phase[place] = self.phase[parent]
            self.inner_us[parent] += end - start
        name = self._trace.names[columns.name[place]]
        found = self._phase(name, place in self._trace.annotations, bool(self.phase[place]))
        if found:
            self.phase[place] = self._id(found)
        stack.append(place)

    def _phase(self, name: str, annotation: bool, within: bool) -> str:
        """Return the phase that a name begins, empty when it begins none."""
        if name.startswith("Optimizer.step"):
            return "optimizer step"
        if name.startswith("Optimizer.zero_grad"):
            return "zero_grad"
        if name.startswith("autograd::engine::evaluate_function"):
            return "backward"
        if annotation and not name.startswith(_STEP) and (not within or _TELLING.search(name)):
            return name
        return ""

    def _id(self, phase: str) -> int:
        known = self._phase_ids.get(phase)
        if known is None:
            if len(self.phases) >= 10_000:
                return 0
            known = self._phase_ids[phase] = len(self.phases)
            self.phases.append(phase)
        return known

    def phase_of(self, place: int) -> str:
        """Return the phase of an operator; ``other`` outside of any."""
        return self.phases[self.phase[place]] or "other" if place != NOBODY else "other"

    def stack_of(self, place: int) -> list[int]:
        """Return an operator and those around it, the outermost first."""
        found: list[int] = []
        while place != NOBODY and len(found) < 200:
            found.append(place)
            place = self.parent[place]
        return found[::-1]


def _by_thread(trace: Trace) -> Iterator[tuple[list[int], list[int]]]:
    """Yield per thread the places of its operators and of its allocations, in time."""
    operators: dict[int, list[int]] = {}
    for place, thread in enumerate(trace.operators.thread):
        operators.setdefault(thread, []).append(place)
    allocations: dict[int, list[int]] = {}
    for place, thread in enumerate(trace.allocations.thread):
        allocations.setdefault(thread, []).append(place)
    start, end, times = trace.operators.start, trace.operators.end, trace.allocations.time
    for thread in operators.keys() | allocations.keys():
        yield (
            sorted(operators.get(thread, []), key=lambda place: (start[place], -end[place])),
            sorted(allocations.get(thread, []), key=times.__getitem__),
        )


class Usage(Frozen):
    """The memory of one device over the trace.

    Attributes:
        peak_bytes, peak_at: the largest total allocated, and which allocation reached it (a place in the trace).
        reserved_peak_bytes: 0 where the recorder does not say (the CPU has no pool).
        reserved_at_peak_bytes: what was reserved when the allocated peak was reached.
        alive: bytes that were alive at the peak by the operator that allocated them (``NOBODY``: none was open).
        before_bytes: alive at the peak and allocated before the recording began.
        steps: (number, bytes allocated at the end) of each ProfilerStep.
        left: (bytes, operator) of what lived at the end of the trace, allocated in it.
    """

    device: int
    peak_bytes: int
    peak_at: int
    reserved_peak_bytes: int
    reserved_at_peak_bytes: int
    alive: tuple[tuple[int, int], ...]
    before_bytes: int
    steps: tuple[tuple[int, int], ...]
    left: tuple[tuple[int, int], ...]
    curve: tuple[tuple[float, int], ...]
    reserved_curve: tuple[tuple[float, int], ...]
    num_events: int


def usage_of(trace: Trace, owners: Owners, device: int, begin: float) -> Usage:
    """Walk the allocations of one device in time; ``begin`` is the zero of its curve."""
    kept = trace.allocations
    order = sorted((place for place, each in enumerate(kept.device) if each == device), key=kept.time.__getitem__)
    totals = _totals(trace, order)
    peak = max(range(len(order)), key=lambda at: (totals[at], -at))
    curve, pool = Curve(), Curve()
    for place, total in zip(order, totals, strict=True):
        curve.add((kept.time[place] - begin) / 1e6, total)
        if kept.reserved[place] > 0:
            pool.add((kept.time[place] - begin) / 1e6, kept.reserved[place])
    alive = _alive(trace, owners, order[: peak + 1])
    known = sum(alive.values())
    return Usage(
        device=device,
        peak_bytes=totals[peak],
        peak_at=order[peak],
        reserved_peak_bytes=pool.peak[1] if pool.peak else 0,
        reserved_at_peak_bytes=max(0, kept.reserved[order[peak]]),
        alive=tuple(alive.items()),
        before_bytes=max(0, totals[peak] - known),
        steps=_steps(trace, order, totals),
        left=tuple(_alive(trace, owners, order).items()),
        curve=curve.points(),
        reserved_curve=pool.points(),
        num_events=len(order),
    )


def _totals(trace: Trace, order: list[int]) -> list[int]:
    """Return the total allocated after each event: as recorded, summed up where the recorder did not say."""
    kept, running, found = trace.allocations, 0, []
    for place in order:
        running += kept.bytes[place]
        if kept.total[place] >= 0:
            running = kept.total[place]
        found.append(running)
    return found


def _alive(trace: Trace, owners: Owners, order: list[int]) -> dict[int, int]:
    """Return the bytes that live after these events by operator."""
    kept = trace.allocations
    blocks: dict[int, tuple[int, int]] = {}
    for place in order:
        if kept.bytes[place] > 0:
            blocks[kept.address[place]] = (kept.bytes[place], owners.allocator[place])
        else:
            blocks.pop(kept.address[place], None)
    sums: dict[int, int] = {}
    for size, operator in blocks.values():
        sums[operator] = sums.get(operator, 0) + size
    return sums


def _steps(trace: Trace, order: list[int], totals: list[int]) -> tuple[tuple[int, int], ...]:
    """Return what is allocated when each ProfilerStep ends."""
    columns = trace.operators
    ends: dict[int, float] = {}
    for place in trace.annotations:
        name = trace.names[columns.name[place]]
        digits = name.removeprefix(_STEP)
        if name.startswith(_STEP) and digits.isascii() and digits.isdigit() and len(digits) < 16:
            number = int(digits)
            ends[number] = max(ends.get(number, columns.end[place]), columns.end[place])
    found: list[tuple[int, int]] = []
    at = 0
    for number, end in sorted(ends.items(), key=lambda pair: pair[1]):
        while at < len(order) and trace.allocations.time[order[at]] <= end:
            at += 1
        if at:
            found.append((number, totals[at - 1]))
    return tuple(found)


def open_names(trace: Trace, columns: Columns, thread: int, moment: float) -> list[str]:
    """Return the names of the intervals of a thread that are open at a moment, the outermost first."""
    found = [
        place
        for place, each in enumerate(columns.thread)
        if each == thread and columns.start[place] <= moment <= columns.end[place]
    ]
    found.sort(key=lambda place: (columns.start[place], -columns.end[place]))
    return [trace.names[columns.name[place]] for place in found]
