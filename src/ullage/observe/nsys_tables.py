"""A SQLite database that may be anyone's: opened read-only, with bounds on time and memory, its tables looked at.

Nothing is assumed of a schema: tables and columns are looked up in ``sqlite_master``; only real tables count, since
views and virtual tables can hide any computation.
"""

from __future__ import annotations

import re
import sqlite3
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ullage.errors import InputError
from ullage.i18n import _

MAX_SECONDS = 300.0
#: A value may be this long; the cache and the sorting of SQLite are bounded by themselves.
_MAX_VALUE_BYTES = 1 << 20
_OPCODES_PER_TICK = 100_000
_FUNCTIONS = frozenset(("count", "sum", "total", "min", "max", "typeof", "coalesce"))
_ALLOWED = frozenset((sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ))
_NAME = re.compile(r"\w{1,120}", re.ASCII)

Value = int | float | str | bytes | None


class Tables:
    """An open database. ``stopped`` is why a query was given up, empty when none was."""

    def __init__(self, path: Path, seconds: float = MAX_SECONDS) -> None:
        self.where, self.stopped = str(path), ""
        self._deadline = time.monotonic() + seconds
        self._shown: object = None
        try:
            self._database = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)
        except sqlite3.Error as error:
            raise self._refusal(error) from None
        try:
            self._protect()
            self._tables = self._list()
        except (sqlite3.Error, UnicodeError) as error:
            self._database.close()
            raise self._refusal(error) from None

    def __enter__(self) -> Tables:
        return self

    def __exit__(self, *_error: object) -> None:
        self._database.close()

    def _refusal(self, error: Exception) -> InputError:
        return InputError(
            _("no export of Nsight Systems can be read from this SQLite file: {reason}").format(
                reason=str(error)[:120]
            ),
            where=self.where,
            remedy=_("export it again: nsys export --type sqlite REPORT.nsys-rep"),
        )

    def _protect(self) -> None:
        base = self._database
        base.text_factory = lambda raw: raw.decode("utf-8", "replace")
        for setting in (
            "trusted_schema=OFF", "query_only=ON", "cell_size_check=ON", "mmap_size=0", "cache_size=-65536",
        ):  # fmt: skip
            base.execute(f"PRAGMA {setting}")
        if hasattr(base, "setlimit"):  # Python 3.11
            base.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_VALUE_BYTES)
            base.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
            base.setlimit(sqlite3.SQLITE_LIMIT_COLUMN, 500)
        base.set_progress_handler(self._tick, _OPCODES_PER_TICK)

    def _tick(self) -> int:
        now = time.monotonic()
        if self._shown is None and sys.stderr.isatty() and now > self._deadline - MAX_SECONDS + 1:
            self._shown = True
            print(_("reading the database..."), file=sys.stderr)
        return int(now > self._deadline)

    def _list(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        """Return name and columns of each real table, by its name in small letters."""
        found: dict[str, tuple[str, tuple[str, ...]]] = {}
        query = "SELECT name, sql FROM sqlite_master WHERE type = 'table' AND rootpage > 0 LIMIT 5000"
        rows = [row for row in self._database.execute(query) if all(isinstance(each, str) for each in row)]
        for name, words in rows:
            if _NAME.fullmatch(name) and not words.lstrip().upper().startswith("CREATE VIRTUAL"):
                columns = [row[1] for row in self._database.execute(f'PRAGMA table_info("{name}")')]
                found[name.lower()] = (name, tuple(each for each in columns if _NAME.fullmatch(each)))
        self._database.set_authorizer(_authorize)
        return found

    def names(self) -> list[str]:
        """Return the names of all tables, in small letters."""
        return list(self._tables)

    def has(self, table: str, *columns: str) -> bool:
        """Return whether a table is there with all of these columns."""
        _name, known = self._tables.get(table.lower(), ("", ()))
        return bool(known) and {column.lower() for column in columns} <= {each.lower() for each in known}

    def rows(
        self, table: str, columns: Sequence[str], *, order: str = "", group: str = "", where: str = ""
    ) -> Iterator[tuple[Value, ...]]:
        """Yield rows of a table: columns that it lacks are None; ``order`` and ``group`` are names of columns.

        A query that takes too long, or meets a broken page, ends early; ``stopped`` then says why.
        """
        if not self.has(table):
            return
        name = self._tables[table.lower()][0]
        chosen = ", ".join(self._column(table, column) for column in columns)
        words = f'SELECT {chosen} FROM "{name}"'
        words += f" WHERE {where}" if where else ""
        words += f' GROUP BY "{group}"' if group else ""
        words += f' ORDER BY "{order}"' if order and self.has(table, order) else ""
        try:
            yield from self._database.execute(words)
        except (sqlite3.Error, UnicodeError, MemoryError, OverflowError) as error:
            late = time.monotonic() > self._deadline
            self.stopped = _("it took too long") if late else str(error)[:120]

    def _column(self, table: str, column: str) -> str:
        if not _NAME.fullmatch(column):
            return column  # an expression of ours
        return f'"{column}"' if self.has(table, column) else "NULL"


def _authorize(action: int, _first: object, second: object, *_rest: object) -> int:
    """Allow reading, and the few functions that are asked for here: a schema may hide others in its columns."""
    if action in _ALLOWED or (action == sqlite3.SQLITE_FUNCTION and second in _FUNCTIONS):
        return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY
