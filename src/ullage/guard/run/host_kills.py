"""Whether the kernel killed for the host's memory: the counters of the cgroup, and the kernel's log if it is readable.

Source: Linux Documentation/admin-guide/cgroup-v2.rst (memory.events: oom_kill), cgroup-v1/memory.rst
(memory.oom_control: oom_kill), mm/oom_kill.c (the words of the log).
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_KILL = re.compile(r"Killed process (\d+)|oom_reaper: reaped process (\d+)|oom-kill:.*\bpid=(\d+)")
_COUNT = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)
_MAX_MESSAGES = 100_000


def own_cgroups(text: str | None = None, root: Path = _ROOT) -> list[Path]:
    """Return the files that count the kills of this process's cgroup and of those above it."""
    if text is None:
        try:
            text = Path("/proc/self/cgroup").read_text()
        except OSError:
            return []
    found: list[Path] = []
    for line in text.splitlines():
        _number, _colon, rest = line.partition(":")
        controllers, _colon, path = rest.partition(":")
        base, name = (root, "memory.events") if not controllers else (root / "memory", "memory.oom_control")
        if controllers and "memory" not in controllers.split(","):
            continue
        place = base / path.lstrip("/")
        found += [folder / name for folder in (place, *place.parents) if folder == base or base in folder.parents]
        found.append(base / name)
    return [path for path in dict.fromkeys(found) if path.is_file()]


def count_kills(files: list[Path]) -> int:
    """Return how often the kernel has killed in the innermost cgroup that tells; those above it hold other jobs too."""
    for path in files:
        with suppress(OSError):
            match = _COUNT.search(path.read_text())
            return int(match.group(1)) if match else 0
    return 0


@dataclass
class KillWatch:
    """Kills between its making and :meth:`new_kills`."""

    def __post_init__(self) -> None:
        self._files = own_cgroups()
        self._before = count_kills(self._files)
        self._log = _open_log()
        self._read_log()

    def new_kills(self) -> tuple[int, tuple[int, ...]]:
        """Return how many kills the cgroups have counted, and the process numbers that the kernel's log names."""
        count = count_kills(self._files) - self._before
        pids = tuple(dict.fromkeys(int(next(filter(None, match.groups()))) for match in _matches(self._read_log())))
        return count, pids

    def close(self) -> None:
        """Close the kernel's log."""
        if self._log >= 0:
            os.close(self._log)
            self._log = -1

    def _read_log(self) -> list[str]:
        lines: list[str] = []
        while self._log >= 0 and len(lines) < _MAX_MESSAGES and (line := self._next()) is not None:
            lines.append(line)
        return lines

    def _next(self) -> str | None:
        """Return the next message, empty for some that were overwritten before they were read, None at the end."""
        try:
            return os.read(self._log, 8192).decode("utf-8", "replace")
        except BrokenPipeError:
            return ""
        except OSError:
            return None


def _matches(lines: list[str]) -> list[re.Match[str]]:
    return [match for line in lines if (match := _KILL.search(line))]


def _open_log() -> int:
    try:
        return os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return -1
