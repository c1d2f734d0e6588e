"""Views of attributed memory: a timeline by category that keeps every peak, and who holds what at one moment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ullage.observe.attribution import CATEGORIES, Attribution
from ullage.observe.attribution_lives import NOBODY

MAX_COLUMNS = 500


@dataclass(kw_only=True)
class Timeline:
    """Allocated bytes by category, at the fullest moment of each stretch of events.

    Attributes:
        events: the event of each column. ``seconds``: since the first event, empty where no time was recorded.
        categories: category -> bytes in each column.
        reserved: reserved bytes in each column.
    """

    events: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    categories: dict[str, list[int]] = field(default_factory=dict)
    reserved: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one module, line or stack holds; ``category``: the one that most of it belongs to."""

    name: str
    bytes: int
    blocks: int
    category: str
    stack: int = 0


def timeline(found: Attribution, *, max_columns: int = MAX_COLUMNS) -> Timeline:
    """Return memory over time, the fullest moment of each column kept."""
    lives = found.lives
    events = _fullest_moments(found, max_columns)
    rows = sums_after(found, events)
    result = Timeline(events=events, reserved=[lives.reserved_at(event) for event in events])
    for code, name in enumerate(CATEGORIES):
        column = [row[code] for row in rows]
        if any(column):
            result.categories[name] = column
    return result


def sums_after(found: Attribution, events: Sequence[int]) -> list[list[int]]:
    """Return the bytes of each category after each of these events, which ascend; one pass over the recording."""
    lives = found.lives
    sums = [0] * len(CATEGORIES)
    for each in range(lives.num_older):
        sums[found.categories[each]] += lives.sizes[each]
    rows: list[list[int]] = []
    changes, owners, categories = lives.changes, lives.owners, found.categories
    at = 0
    for event in events:
        for change, owner in zip(changes[at : event + 1], owners[at : event + 1], strict=True):
            if owner != NOBODY:
                sums[categories[owner]] += change
        at = event + 1
        rows.append(list(sums))
    return rows


def _fullest_moments(found: Attribution, max_columns: int) -> list[int]:
    totals, number = found.lives.totals, found.lives.num_events
    if number <= max_columns:
        return list(range(number))
    edges = [number * column // max_columns for column in range(max_columns + 1)]
    moments = []
    for first, last in pairwise(edges):
        stretch = totals[first:last]
        moments.append(first + stretch.index(max(stretch)))
    return moments


def with_times(result: Timeline, times_us: object) -> Timeline:
    """Add the seconds since the first event, where all events have a time."""
    times: list[int] = [times_us[event] for event in result.events]  # type: ignore[index]
    if times and all(times) and times == sorted(times):
        first = times_us[0]  # type: ignore[index]
        result.seconds = [(time - first) / 1e6 for time in times]
    return result


def shares(found: Attribution, blocks: list[int], name_of: Callable[[int], str]) -> list[Share]:
    """Group blocks by what a stack is called; each distinct stack is named once."""
    lives = found.lives
    of_stack: dict[tuple[int, int], list[int]] = {}
    for each in blocks:
        amounts = of_stack.setdefault((lives.stacks[each], found.categories[each]), [0, 0])
        amounts[0] += lives.sizes[each]
        amounts[1] += 1
    named: dict[str, dict[tuple[int, int], list[int]]] = {}
    for key, amounts in of_stack.items():
        named.setdefault(name_of(key[0]), {})[key] = amounts
    result = [_share(name, parts) for name, parts in named.items()]
    return sorted(result, key=lambda each: (-each.bytes, each.name))


def _share(name: str, parts: dict[tuple[int, int], list[int]]) -> Share:
    by_category = [0] * len(CATEGORIES)
    for (_stack, category), amounts in parts.items():
        by_category[category] += amounts[0]
    largest = max(parts, key=lambda key: (parts[key][0], -key[0]))
    return Share(
        name=name,
        bytes=sum(amounts[0] for amounts in parts.values()),
        blocks=sum(amounts[1] for amounts in parts.values()),
        category=CATEGORIES[by_category.index(max(by_category))],
        stack=largest[0],
    )
