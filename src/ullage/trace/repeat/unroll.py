"""Repeat the events of a middle layer: a trace of few layers becomes that of many. No torch here.

The stream is cut into runs: maximal stretches that belong to one unit (one layer, or one period of layers that
alternate) or to none. Every pass over the layers, up or down, touches each unit once, so that the n-th allocation of
one unit corresponds to the n-th of every other. A run that frees an allocation of another unit names it by distance;
so the runs of a middle unit can be repeated with numbers of their own. That this gives the stream of the larger model
is not believed but checked: the small trace, unrolled by one, must equal a real trace with one unit more
(:func:`grow`).
"""

from __future__ import annotations

import re
from array import array
from dataclasses import dataclass, replace

from ullage.trace.recorder.events import WORKSPACE, Allocation, Place, Trace


class CannotUnrollError(Exception):
    """The trace is not that of layers that repeat; all layers must be run."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Where the layers that repeat lie: from layer ``first`` on, ``units`` times ``period`` layers.

    ``path`` is that of the list of layers. The events of unit ``middle`` are repeated.
    """

    path: str
    first: int
    period: int
    units: int
    middle: int = 1


@dataclass(kw_only=True)
class _Run:
    """A stretch of events of one unit; ``unit`` -1: of none."""

    unit: int
    start: int
    end: int


@dataclass(kw_only=True)
class _Cut:
    """A trace in runs; where each allocation was made: (unit, its number in the unit), or (-1, number) outside."""

    runs: list[_Run]
    made: list[tuple[int, int]]


class _Labels:
    """Which unit a path belongs to, and what it is called when units are put in between."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.pattern = re.compile(re.escape(stack.path) + r"\.(\d+)(?=\.|$)")

    def layer(self, path: str) -> int | None:
        """Return which of the layers that repeat a path lies in, -1 for another layer, None for no layer."""
        found = self.pattern.match(path)
        if found is None:
            return None
        layer = int(found.group(1)) - self.stack.first
        return layer if 0 <= layer < self.stack.units * self.stack.period else -1

    def moved(self, path: str, layers: int) -> str:
        if not layers:
            return path
        found = self.pattern.match(path)
        if found is None:
            return path
        return f"{self.stack.path}.{int(found.group(1)) + layers}{path[found.end() :]}"

    def behind(self, path: str) -> bool:
        """Say whether a path lies in a layer behind the last unit."""
        found = self.pattern.match(path)
        return found is not None and int(found.group(1)) >= self.stack.first + self.stack.units * self.stack.period


def _cut(trace: Trace, stack: Stack) -> _Cut:
    runs: list[_Run] = []
    counts = [0] * stack.units
    made = [(-1, -1)] * len(trace.allocations)
    for index, (event, unit) in enumerate(zip(trace.events, _units(trace, _Labels(stack)), strict=True)):
        if runs and runs[-1].unit == unit:
            runs[-1].end = index + 1
        else:
            runs.append(_Run(unit=unit, start=index, end=index + 1))
        if event >= 0:
            made[event] = (unit, counts[unit]) if unit >= 0 else (-1, event)
            if unit >= 0:
                counts[unit] += 1
    if not all(counts):
        raise CannotUnrollError
    return _Cut(runs=runs, made=made)


def _units(trace: Trace, labels: _Labels) -> list[int]:
    """Return the unit of each event: that of the module that ran, else that of the parameter it is for."""
    by_place = [labels.layer(place.module) for place in trace.places]
    by_owner: dict[str, int | None] = {}
    found: list[int] = []
    for event, where in zip(trace.events, trace.where, strict=True):
        layer, one = by_place[where], trace.allocations[event if event >= 0 else ~event]
        if layer is None:
            if one.owner not in by_owner:
                by_owner[one.owner] = labels.layer(one.owner)
            layer = by_owner[one.owner]
        outside = layer is None or one.category == WORKSPACE  # taken by whichever layer runs first
        found.append(-1 if outside or layer is None else layer)
    period = labels.stack.period
    units = [layer // period if layer >= 0 else -1 for layer in _between(found)]
    return _together(trace, units, labels.stack.units)


def _together(trace: Trace, units: list[int], num_units: int) -> list[int]:
    """Give frees of what every unit made (casts of weights, when autocast is left) to the units that made it."""
    maker = {event: unit for event, unit in zip(trace.events, units, strict=True) if event >= 0}
    start = 0
    while start < len(units):
        end = start
        while end < len(units) and units[end] < 0:
            end += 1
        made = [maker[~event] if event < 0 else -1 for event in trace.events[start:end]]
        if len({unit for unit in made if unit >= 0}) == num_units:
            units[start:end] = made
        start = end + 1
    return units


def _between(layers: list[int]) -> list[int]:
    """Give what happens between a layer and its neighbour to the one before: a loop drops a layer's output there."""
    last, start = -1, 0
    for index, layer in enumerate(layers):
        if layer < 0:
            continue
        if last >= 0 and abs(layer - last) == 1 and index > start:
            layers[start:index] = [last] * (index - start)
        last, start = layer, index + 1
    return layers


#: What an allocation outside the units grows by with each of them: bytes, and elements of each axis.
Slope = tuple[int, tuple[int, ...]]


def unroll(trace: Trace, stack: Stack, copies: int, slopes: dict[int, Slope] | None = None) -> Trace:
    """Return the trace with the middle unit repeated ``copies`` times more.

    Args:
        slopes: how allocations outside the units grow for each copy, by their numbers.

    Raises:
        CannotUnrollError: the trace has no such structure.
    """
    return _Unroller(trace, stack, copies, slopes or {}).run()


class _Unroller:
    def __init__(self, trace: Trace, stack: Stack, copies: int, slopes: dict[int, Slope]) -> None:
        self.trace, self.stack, self.copies, self.slopes = trace, stack, copies, slopes
        self.labels = _Labels(stack)
        self.cut = _cut(trace, stack)
        self.out = Trace(stacks=trace.stacks, assumed=trace.assumed)
        self.numbers: dict[tuple[int, int], int] = {}
        self.place_numbers: dict[Place, int] = {}
        self._paths: dict[tuple[int, int], int] = {}

    def run(self) -> Trace:
        middle, copies = self.stack.middle, self.copies
        for index, run in enumerate(self.cut.runs):
            if run.unit < 0:
                self._emit(run, -1)
            elif run.unit != middle:
                self._emit(run, run.unit if run.unit < middle else run.unit + copies)
            else:
                order = range(middle, middle + copies + 1)
                for unit in order if self._ascends(index) else reversed(order):
                    self._emit(run, unit)
        return self.out

    def _ascends(self, index: int) -> bool:
        """Say whether the pass that a run of the middle unit is in goes up."""
        middle, runs = self.stack.middle, self.cut.runs
        before = next((run.unit for run in reversed(runs[:index]) if run.unit >= 0), None)
        after = next((run.unit for run in runs[index + 1 :] if run.unit >= 0), None)
        if before == middle - 1 and after == middle + 1:
            return True
        if before == middle + 1 and after == middle - 1:
            return False
        raise CannotUnrollError

    def _emit(self, run: _Run, unit: int) -> None:
        """Write a run down for a unit of the larger model."""
        trace, out = self.trace, self.out
        moved = (unit - run.unit) * self.stack.period if run.unit >= 0 else 0
        for event, where in zip(trace.events[run.start : run.end], trace.where[run.start : run.end], strict=True):
            place = self._place(where, moved)
            if event >= 0:
                ordinal = self.cut.made[event][1]
                self.numbers[unit, ordinal] = number = len(out.allocations)
                out.allocations.append(self._allocation(event, place, moved))
                out.events.append(number)
            else:
                found = self.numbers.pop(self._target(~event, run, unit), None)
                if found is None:
                    raise CannotUnrollError
                out.events.append(~found)
            out.where.append(place)

    def _target(self, number: int, run: _Run, unit: int) -> tuple[int, int]:
        """Return which allocation a free stands for: by distance from unit to unit, else as it is."""
        made_in, ordinal = self.cut.made[number]
        if made_in < 0:
            return -1, ordinal
        if run.unit >= 0:
            return unit + made_in - run.unit, ordinal
        return made_in if made_in <= self.stack.middle else made_in + self.copies, ordinal

    def _allocation(self, number: int, place: int, moved: int) -> Allocation:
        old = self.trace.allocations[number]
        owner = self._moved(old.owner, moved) if old.owner else ""
        slope = self.slopes.get(number)
        if slope is not None:
            shape = tuple(size + self.copies * each for size, each in zip(old.shape, slope[1], strict=True))
            return replace(
                old, place=place, owner=owner, size_bytes=old.size_bytes + self.copies * slope[0], shape=shape
            )
        if place == old.place and owner == old.owner:
            return old
        return replace(old, place=place, owner=owner)

    def _moved(self, path: str, moved: int) -> str:
        if self.labels.behind(path):
            moved = self.copies * self.stack.period
        return self.labels.moved(path, moved)

    def _place(self, where: int, moved: int) -> int:
        found = self._paths.get((where, moved))
        if found is None:
            old = self.trace.places[where]
            place = replace(old, module=self._moved(old.module, moved))
            found = self.place_numbers.get(place)
            if found is None:
                found = self.place_numbers[place] = len(self.out.places)
                self.out.places.append(place)
            self._paths[where, moved] = found
        return found


def grow(small: Trace, larger: Trace, stack: Stack, copies: int) -> Trace:
    """Unroll ``small`` after it was checked against ``larger``, a real trace with one unit more.

    Raises:
        CannotUnrollError: unrolled by one, ``small`` is not ``larger``.
    """
    slopes = _slopes(unroll(small, stack, 1), small, larger, stack)
    return unroll(small, stack, copies, slopes)


def _slopes(grown: Trace, small: Trace, larger: Trace, stack: Stack) -> dict[int, Slope]:
    """Return how allocations outside the units grow with each unit.

    Raises:
        CannotUnrollError: more than sizes outside the units differs.
    """
    if grown.events != larger.events or len(grown.allocations) != len(larger.allocations):
        raise CannotUnrollError
    cut = _cut(small, stack)
    outside = array("q", (number for number, made in enumerate(cut.made) if made[0] < 0))
    place_of = _outside_numbers(grown, replace(stack, units=stack.units + 1))
    slopes: dict[int, Slope] = {}
    for number, (mine, real) in enumerate(zip(grown.allocations, larger.allocations, strict=True)):
        same = (mine.op, mine.category, mine.owner) == (real.op, real.category, real.owner)
        same = same and len(mine.shape) == len(real.shape)
        if not same or grown.places[mine.place] != larger.places[real.place]:
            raise CannotUnrollError
        if (mine.size_bytes, mine.shape) != (real.size_bytes, real.shape):
            if number not in place_of:
                raise CannotUnrollError
            grows = tuple(more - less for less, more in zip(mine.shape, real.shape, strict=True))
            slopes[outside[place_of[number]]] = (real.size_bytes - mine.size_bytes, grows)
    return slopes


def _outside_numbers(grown: Trace, stack: Stack) -> dict[int, int]:
    """Return allocation -> its rank among those outside the units."""
    cut = _cut(grown, stack)
    found = (number for number, made in enumerate(cut.made) if made[0] < 0)
    return {number: rank for rank, number in enumerate(found)}
