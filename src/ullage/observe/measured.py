"""What a recording holds besides a verdict: curves, tables and metrics, and whether a curve keeps rising.

The unit of a column, metric or curve stands at the end of its name: ``_bytes``, ``_us``, ``_share``, ``_flops``,
``_per_s``, ``_density`` (FLOPs per byte); what has none is a name or a count.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from ullage.frozen import Frozen

MAX_POINTS = 1024
#: Rows of a table that are kept; tables are sorted, the most important row first.
MAX_ROWS = 200
#: A curve rises when its floor does in every quarter, and by this share of its level in all.
RISING_SHARE = 0.01
#: Fewer points than these tell nothing: one to warm up, and one in each quarter.
MIN_POINTS = 5

Cell = str | int | float | None


class Series(Frozen):
    """One curve: ``x`` is seconds since the start (``s``) or a step number (``step``); ``y`` has the unit of the name.

    Of more than ``MAX_POINTS`` points the largest of each bucket is kept, so that peaks stay.
    """

    name: str
    x_unit: str = "s"
    points: tuple[tuple[float, int], ...] = ()


class Listing(Frozen):
    """One table: ``name`` for programs, ``title`` for people."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...] = ()

    def of(self, row: Sequence[Cell], column: str) -> Cell:
        """Return the cell of ``row`` in ``column``."""
        return row[self.columns.index(column)]


class Rise(Frozen):
    """A curve that keeps rising: ``per_x`` is its slope in bytes per step or second, ``total`` the whole rise."""

    per_x: float
    total: int


class Curve:
    """A curve as it is read, thinned out in bounded memory; the peak is exact."""

    def __init__(self) -> None:
        self._points: list[tuple[float, int]] = []
        self._every = 1
        self._left: tuple[float, int] | None = None
        self._in_bucket = 0
        self.count = 0
        self.peak: tuple[float, int] | None = None
        self.last: tuple[float, int] | None = None

    def add(self, x: float, y: int) -> None:
        """Take the next point."""
        point = (x, y)
        self.count += 1
        self.last = point
        if self.peak is None or y > self.peak[1]:
            self.peak = point
        self._left = point if self._left is None or y > self._left[1] else self._left
        self._in_bucket += 1
        if self._in_bucket >= self._every:
            self._points.append(self._left)
            self._left, self._in_bucket = None, 0
            if len(self._points) >= 2 * MAX_POINTS:
                self._thin()

    def _thin(self) -> None:
        pairs = zip(self._points[::2], self._points[1::2], strict=True)
        self._points = [first if first[1] >= second[1] else second for first, second in pairs]
        self._every *= 2

    def points(self) -> tuple[tuple[float, int], ...]:
        """Return at most ``2 * MAX_POINTS`` points, the peak and the last one among them."""
        found = list(self._points)
        if self._left is not None:
            found.append(self._left)
        if self.last is not None and (not found or found[-1] != self.last):
            found.append(self.last)
        return tuple(found)

    def series(self, name: str, x_unit: str = "s") -> Series:
        """Return the curve under a name."""
        return Series(name=name, x_unit=x_unit, points=self.points())


def rise_of(points: Sequence[tuple[float, int]]) -> Rise | None:
    """Return how a curve rises when its floor rises from quarter to quarter, after a warm-up of a quarter; else None.

    Floors (the least value of each quarter) are compared because batches of changing length move the peaks.
    """
    if len(points) < MIN_POINTS:
        return None
    rest = list(points[max(1, len(points) // 4) :])
    quarters = [rest[len(rest) * at // 4 : len(rest) * (at + 1) // 4] for at in range(4)]
    floors = [min(quarter, key=lambda point: point[1]) for quarter in quarters]
    rising = all(later[1] > earlier[1] for earlier, later in pairwise(floors))
    total, width = floors[-1][1] - floors[0][1], floors[-1][0] - floors[0][0]
    if not rising or width <= 0 or total < RISING_SHARE * max(1, floors[0][1]):
        return None
    return Rise(per_x=total / width, total=total)


def ranked(rows: Iterable[tuple[Cell, ...]], key: int, limit: int = MAX_ROWS) -> tuple[tuple[Cell, ...], ...]:
    """Return rows sorted by the number in column ``key``, the largest first, then by name."""

    def order(row: tuple[Cell, ...]) -> tuple[float, str]:
        value = row[key]
        return (-value if isinstance(value, int | float) else 0.0, str(row[0]))

    return tuple(sorted(rows, key=order)[:limit])
