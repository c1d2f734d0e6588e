"""The break point: the largest size that lives, found by doubling and then bisecting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

MAX_TRIES = 40


@dataclass(frozen=True, kw_only=True)
class Try:
    """One size that was tried.

    Attributes:
        size: micro-batch, or requests at a time.
        lives: it ran to its end within its limits.
        cause: why not: ``memory``, ``killed``, ``timeout``, ``errors``, ``latency``; empty when it lived.
        detail: a sentence from the one that died.
        seconds: how long the try took, its start included.
        peak_bytes: the most used during it; None when that is not known.
    """

    size: int
    lives: bool
    cause: str = ""
    detail: str = ""
    seconds: float = 0.0
    peak_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class BreakPoint:
    """What the search found.

    Attributes:
        largest: the largest size that lived; 0 when even the smallest died.
        smallest_failing: the smallest size that died; None when the cap was reached alive.
        limited_by: the cause at ``smallest_failing``; ``cap`` when nothing died.
        tries: all tries, in order.
    """

    unit: str
    largest: int
    smallest_failing: int | None
    limited_by: str
    tries: tuple[Try, ...]


def break_point(
    attempt: Callable[[int], Try], *, unit: str, first: int = 1, cap: int = 2**20, tolerance: float = 0.0
) -> BreakPoint:
    """Double from ``first`` until a size dies or ``cap`` is reached, then bisect between the two.

    Args:
        attempt: tries one size.
        unit: what the size counts.
        first: the smallest size.
        cap: no size above this is tried.
        tolerance: stop when the gap is at most this share of the largest that lives.
    """
    tries: list[Try] = []

    def lives(size: int) -> bool:
        tries.append(attempt(size))
        return tries[-1].lives

    largest, failing = 0, None
    size = min(first, cap)
    while failing is None and len(tries) < MAX_TRIES:
        if not lives(size):
            failing = size
        elif size >= cap:
            largest = size
            break
        else:
            largest, size = size, min(2 * size, cap)
    while failing is not None and failing - largest > max(1, int(largest * tolerance)) and len(tries) < MAX_TRIES:
        middle = (largest + failing) // 2
        if middle in (largest, failing):
            break
        if lives(middle):
            largest = middle
        else:
            failing = middle
    died = next((one for one in reversed(tries) if one.size == failing), None)
    return BreakPoint(
        unit=unit,
        largest=largest,
        smallest_failing=failing,
        limited_by=died.cause if died else "cap",
        tries=tuple(tries),
    )
