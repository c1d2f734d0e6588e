"""Values of engine flags as people type them: counts, fractions, sizes."""

from __future__ import annotations

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.shell_line import is_unset, unset_variable
from ullage.units import GiB, parse_count, parse_size


def whole(text: str, flag: str) -> int:
    """Return a whole number (``8k`` is understood).

    Raises:
        InputError: none, or a variable whose value is not said.
    """
    if "$" in text or is_unset(text):
        raise unset_variable(text, flag)
    try:
        return parse_count(text)
    except InputError as error:
        raise InputError(_("{text!r} is not a whole number").format(text=text[:40]), where=flag) from error


def length(text: str, flag: str) -> int:
    """Return a length in tokens, -1 for ``auto``."""
    return -1 if text in ("-1", "auto") else whole(text, flag)


def _number(text: str) -> float:
    """Return a number; -1 for what is none, which no flag here takes."""
    try:
        return float(text)
    except ValueError:
        return -1.0


def fraction(text: str, flag: str) -> float:
    """Return a fraction in (0, 1].

    Raises:
        InputError: none.
    """
    value = _number(text)
    if not 0 < value <= 1:
        raise InputError(_("{text!r} is not a fraction in (0, 1]").format(text=text[:40]), where=flag)
    return value


def gib(text: str, flag: str) -> int:
    """Return the bytes of a size in GiB.

    Raises:
        InputError: none.
    """
    value = _number(text)
    if not 0 <= value <= 1 << 30:
        raise InputError(_("{text!r} is not a size in GiB").format(text=text[:40]), where=flag)
    return int(value * GiB)


def count_of_bytes(text: str, flag: str) -> int:
    """Return bytes, written as a count (``4G``) or as a size (``4GiB``)."""
    try:
        return parse_count(text)
    except InputError:
        return parse_size(text)
