"""Whole numbers, or arrays of whole numbers: what formulas need beyond ``+ - * //`` to work on both alike.

A formula that is written with these explains one layout with ints and weighs a hundred thousand with NumPy arrays. An
array stands wherever ``int`` is written; NumPy is never imported here: whoever hands over an array has imported it.
"""

from __future__ import annotations

import math
import sys
from typing import Any


def _numpy() -> Any:
    return sys.modules["numpy"]


def larger(one: int, other: int) -> int:
    """Return the larger of two numbers, element by element."""
    if isinstance(one, int) and isinstance(other, int):
        return one if one >= other else other
    found: int = _numpy().maximum(one, other)
    return found


def smaller(one: int, other: int) -> int:
    """Return the smaller of two numbers, element by element."""
    if isinstance(one, int) and isinstance(other, int):
        return one if one <= other else other
    found: int = _numpy().minimum(one, other)
    return found


def where(condition: bool, one: int, other: int) -> int:
    """Return ``one`` where the condition holds, else ``other``."""
    if isinstance(condition, bool):
        return one if condition else other
    found: int = _numpy().where(condition, one, other)
    return found


def some(value: int) -> bool:
    """Say whether a number, or any of several, is not 0."""
    return bool(value) if isinstance(value, (int, bool)) else bool(_numpy().any(value))


def both(one: bool, other: bool) -> bool:
    """Logical and, element by element."""
    return (one and other) if isinstance(one, bool) and isinstance(other, bool) else one & other


def whole(value: Any) -> int:
    """Cut the decimals off."""
    if isinstance(value, (int, float)):
        return int(value)
    found: int = value.astype("int64")
    return found


def lcm(one: int, other: int) -> int:
    """Return the least common multiple."""
    if isinstance(one, int) and isinstance(other, int):
        return math.lcm(one, other)
    found: int = _numpy().lcm(one, other)
    return found


def share(value: int, part: int, of: int) -> int:
    """Return ``value * part // of``; the product may pass 64 bits."""
    if isinstance(value, int) and isinstance(part, int) and isinstance(of, int):
        return value * part // of
    numpy = _numpy()
    wide = numpy.asarray(value).astype(object) * numpy.asarray(part).astype(object)
    found: int = (wide // of).astype("int64")
    return found


def shown(value: int) -> str:
    """Return the number for a formula in words; of an array, that it is one."""
    return str(value) if isinstance(value, int) else "n"
