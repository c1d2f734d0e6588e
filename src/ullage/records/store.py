"""Reading files of records: one JSON object a line, bounded, every error with file and line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.jsonfile import missing, parse_json_object
from ullage.records.schema import Record, read_record

MAX_FILE_BYTES = 256 * 2**20
MAX_LINE_BYTES = 4 * 2**20


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a file in order; blank lines are passed over.

    Raises:
        InputError: no such file, too large, or a line that is not a record, with its number.
    """
    seen: dict[str, str] = {}
    for number, values in _objects(path):
        record = read_record(values, f"{path}:{number}")
        if record.record_id in seen:
            raise InputError(
                _("the id {record_id!r} stands already at {first}").format(
                    record_id=record.record_id[:80], first=seen[record.record_id]
                ),
                where=record.where,
            )
        seen[record.record_id] = record.where
        if not record.measured and record.fits_in_gib is None:
            raise InputError(_("nothing was measured"), where=record.where, remedy=_("give measured or fits_in_gib"))
        yield record


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        if not path.is_file():
            raise missing(path)
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(_("the file is larger than {limit:,} bytes").format(limit=MAX_FILE_BYTES), where=str(path))
        with path.open("rb") as file:
            for number, line in _lines(file, path):
                where = f"{path}:{number}"
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                except UnicodeDecodeError:
                    raise InputError(_("is not UTF-8 text"), where=where) from None
                if text:
                    yield number, _finite_object(text, where)
    except OSError as error:
        raise InputError(_("cannot be read ({reason})").format(reason=error.strerror), where=str(path)) from None


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise InputError(
                _("the line is longer than {limit:,} bytes").format(limit=MAX_LINE_BYTES), where=f"{path}:{number}"
            )
        yield number, line


def _finite_object(text: str, where: str) -> dict[str, Any]:
    values = parse_json_object(text, where=where)
    _refuse_non_finite(values, where)  # NaN, Infinity, and what overflows to it (1e999)
    return values


def _refuse_non_finite(value: Any, where: str) -> None:
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, float) and not abs(item) < float("inf"):
            raise InputError(_("holds a number that is not finite"), where=where)
        if isinstance(item, dict):
            stack += item.values()
        elif isinstance(item, list):
            stack += item
