"""Rows of columns of whole numbers: which are distinct, and which go together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

#: Numbers up to this are told apart by a table instead of by sorting.
MAX_TABLE = 2**22


def numbers(length: int, value: int = 0) -> Any:
    """Return a column of one number."""
    return np.full(length, value, dtype=np.int64)


def _codes(column: Any) -> tuple[int, Any]:
    """Number the distinct values of a column from 0; return how many they are and each row's number."""
    low, high = int(column.min()), int(column.max())
    if high - low > MAX_TABLE:
        values, codes = np.unique(column, return_inverse=True)
        return len(values), codes.reshape(-1)
    shifted = column - low
    table = numbers(high - low + 1)
    table[shifted] = 1
    number = int(table.sum())
    table = np.cumsum(table) - 1
    return number, table[shifted]


def distinct(*columns: Any) -> tuple[Any, Any]:
    """Return one row for each distinct combination of values, and each row's number among them."""
    number, codes = _codes(columns[0])
    for column in columns[1:]:
        more, other = _codes(column)
        number, codes = _codes(codes * more + other)
    first = numbers(number)
    first[codes[::-1]] = np.arange(len(codes), dtype=np.int64)[::-1]
    return first, codes


def split(rows: Any, *columns: Any) -> Iterator[Any]:
    """Yield ``rows`` in groups that are equal in every column (columns have an element for each row)."""
    if not len(rows):
        return
    first, codes = distinct(*columns)
    order = np.argsort(codes, kind="stable")
    ends = np.cumsum(np.bincount(codes, minlength=len(first)))
    start = 0
    for end in ends.tolist():
        yield rows[order[start:end]]
        start = end
