"""Read what exporters wrote: strictly, since any process may write into the folder."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ullage.guard.watch.exporter import FORMAT, MAX_FILE_BYTES
from ullage.guard.watch.sample import Counters

#: A file that was not renewed for this long tells nothing about now.
MAX_AGE_SECONDS = 60.0
MAX_FILES = 4096
_MAX_COUNT = 1 << 62
_WHOLE = ("allocated_bytes", "reserved_bytes", "peak_allocated_bytes", "peak_reserved_bytes", "num_alloc_retries",
          "num_ooms")  # fmt: skip


def read_counters(folder: Path, *, now: float | None = None) -> tuple[Counters, ...]:
    """Return the counters of processes that live and wrote lately; a file that makes no sense is left out."""
    found: list[Counters] = []
    moment = time.time() if now is None else now
    try:
        paths = sorted(folder.glob("*.json"))[:MAX_FILES]
    except OSError:
        return ()
    for path in paths:
        with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            found += _read(path, moment)
    return tuple(found)


def _read(path: Path, now: float) -> list[Counters]:
    if path.stat().st_size > MAX_FILE_BYTES:
        return []
    values = json.loads(path.read_bytes())
    age = now - float(values["time"])
    pid = _count(values["pid"])
    if values["ullage_counters"] != FORMAT or not -5 <= age <= MAX_AGE_SECONDS or not _alive(pid):
        return []
    common = {"pid": pid, "rank": _count(values.get("rank", 0)), "step": int(values.get("step", -1))}
    return [
        Counters(
            **common,
            device=_count(each["device"]),
            age_seconds=max(0.0, age),
            **{name: _count(each[name]) for name in _WHOLE},
        )
        for each in values["devices"]
    ]


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_COUNT:
        raise ValueError(value)
    return value


def _alive(pid: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's
    return True
