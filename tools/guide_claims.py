"""Recompute the figures of ``docs/guide-claims.md``: every row of a table that holds a command or an expression.

python tools/guide_claims.py           say which figures differ; exit 1 when some do
python tools/guide_claims.py --write   write the figures, with the digits and units that stand there

A row is ``| what | `ullage …` → `.key.path` | figure |``, or ``| what | `python expression` | figure |``. A path names
keys, and terms, ranks or moments by name or number; paths may be added, subtracted and divided. Files that the page
shows (a fenced block whose first line is ``// name``) are written to the folder where the commands run, and the
page's ``python`` block defines what its expressions use.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "guide-claims.md"
#: A public recording that is never copied into the project; rows on it are left alone where it is not there.
RECORDING = "kkaitlyn111__cs336-a2-systems__memory_files__memory_ctx128_fullstep.pickle"
UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "GB": 10**9, "%": 0.01, "B": 1, "": 1}
_ROW = re.compile(r"^\| (?P<what>.+?) \| (?P<how>`.+`) \| (?P<figure>[^|]+?) \|$", re.MULTILINE)
_FIGURE = re.compile(r"(?P<number>[−-]?[\d,]+(?:\.(?P<digits>\d+))?) ?(?P<unit>GiB|MiB|KiB|GB|%|B|)")
_PATH = re.compile(r"(?<![\w.])\.[a-z_]\w*(?:\.\w+)*")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table: what is told, how it is recomputed, and the figure that stands there."""

    what: str
    how: str
    figure: str
    start: int
    end: int


def rows(page: str) -> list[Row]:
    """Return the rows that can be recomputed."""
    return [
        Row(
            what=found["what"],
            how=found["how"],
            figure=found["figure"],
            start=found.start("figure"),
            end=found.end("figure"),
        )
        for found in _ROW.finditer(page)
    ]


@contextlib.contextmanager
def laid_out(page: str) -> Iterator[dict[str, Any]]:
    """Write the page's files into a folder, go there, and yield the names that the page's Python defines."""
    names: dict[str, Any] = {}
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for name, text in re.findall(r"```json\n// (\S+)\n(.*?)```", page, re.DOTALL):
                Path(name).parent.mkdir(parents=True, exist_ok=True)
                Path(name).write_text(text, encoding="utf-8")
            recording = Path(__file__).parents[2] / "shared" / "snapshots" / RECORDING
            if recording.is_file():
                Path("recording.pickle").symlink_to(recording)
            for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
                exec(block, names)
            yield names
        finally:
            os.chdir(before)
            _answer.cache_clear()


def value_of(row: Row, names: dict[str, Any]) -> Any:
    """Recompute a row: a number, or text."""
    spans = re.findall(r"`([^`]+)`", row.how)
    if not spans[0].startswith("ullage "):
        return eval(spans[0], names)
    answer = json.loads(_answer(spans[0]))
    return eval(_PATH.sub(lambda found: repr(_at(answer, found.group(0)[1:])), spans[1]), {"__builtins__": {}})


@lru_cache
def _answer(command: str) -> str:
    from ullage.cli import main

    words = shlex.split(command)[1:]
    advice = ["--no-advice"] if words[0] == "fit" else []
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main([*words, *advice, "--json"])
    if code not in (0, 3, 4):
        raise ValueError(f"{command} ended with {code}")
    return out.getvalue()


def _at(value: Any, path: str) -> Any:
    """Follow a path; a named term counts as its bytes, one that is not there as 0."""
    for part in path.split("."):
        if isinstance(value, list) and not part.isdigit():
            value = next((one for one in value if _name(one) == part), {"bytes": 0})
        else:
            value = value[int(part)] if isinstance(value, list) else value[part]
    return value["bytes"] if isinstance(value, dict) else value


def _name(one: dict[str, Any]) -> str:
    return str(one.get("name") or one.get("moment")).replace(" ", "_").replace(":", "")


def told(row: Row, value: Any) -> str:
    """Return the value as the page tells it: with the unit and the digits that stand there."""
    if isinstance(value, str):
        return value
    found = _FIGURE.fullmatch(row.figure)
    if found is None:
        raise ValueError(f"{row.figure!r} is not a figure: {row.what}")
    digits = len(found["digits"] or "")
    unit = found["unit"]
    return f"{value / UNITS[unit]:,.{digits}f}{' ' if unit else ''}{unit}".replace("-", "−")


def main() -> int:
    """Check or write the page."""
    page = PAGE.read_text(encoding="utf-8")
    written, wrong = page, 0
    with laid_out(page) as names:
        for row in reversed(rows(page)):
            now = told(row, value_of(row, names))
            if now != row.figure:
                wrong += 1
                print(f"{row.what}: {row.figure} is {now}")
                written = written[: row.start] + now + written[row.end :]
    if "--write" in sys.argv[1:]:
        PAGE.write_text(written, encoding="utf-8")
        return 0
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
