"""The host's memory: the machine's, or the limit of the cgroup where that is lower, and the largest processes.

Source: Linux Documentation/filesystems/proc.rst (MemTotal, MemAvailable), admin-guide/cgroup-v2.rst (memory.max,
memory.current, memory.stat: inactive_file), cgroup-v1/memory.rst (memory.limit_in_bytes, memory.usage_in_bytes). As the
kernel does before it kills, file pages that can be dropped at once are not counted as used. Without /proc: psutil.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ullage.errors import MissingExtraError
from ullage.guard.watch.sample import HOST, Device, Process, Sample
from ullage.i18n import _

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")
#: Limits above this are no limits (cgroup v1 writes 2**63 rounded to pages).
_NO_LIMIT = 1 << 60
MAX_PROCESSES = 10


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Total and used bytes, and whether the total is the limit of a cgroup."""

    total_bytes: int
    used_bytes: int
    scope: str = "machine"


def host_memory(proc: Path = _PROC, cgroup: Path = _CGROUP) -> HostMemory:
    """Return the memory that this process may use, and how much of it is used."""
    machine = _machine(proc)
    limited = _cgroup(proc, cgroup)
    if limited is not None and limited.total_bytes < machine.total_bytes:
        return limited
    return machine


def _machine(proc: Path) -> HostMemory:
    try:
        text = (proc / "meminfo").read_text()
    except OSError:
        memory = _psutil().virtual_memory()
        return HostMemory(total_bytes=int(memory.total), used_bytes=int(memory.total - memory.available))
    found = {name: int(amount) << 10 for name, amount in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    free = found.get("MemAvailable", found.get("MemFree", 0))
    return HostMemory(total_bytes=found["MemTotal"], used_bytes=found["MemTotal"] - free)


def _psutil() -> Any:
    try:
        import psutil
    except ImportError:
        raise MissingExtraError("psutil", "watch") from None
    return psutil


def _cgroup(proc: Path, root: Path) -> HostMemory | None:
    """Return the tightest limit of this process's cgroups."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return None
    found: list[HostMemory] = []
    for line in lines:
        _number, _colon, rest = line.partition(":")
        controllers, _colon, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        place = base / path.lstrip("/")
        folders = [folder for folder in (place, *place.parents) if folder == base or base in folder.parents]
        found += [memory for folder in folders if (memory := _limit(folder, *names)) is not None]
    return min(found, key=lambda memory: memory.total_bytes, default=None)


def _limit(folder: Path, limit_name: str, usage_name: str) -> HostMemory | None:
    try:
        limit, usage = (folder / limit_name).read_text().strip(), int((folder / usage_name).read_text())
        stat = (folder / "memory.stat").read_text()
    except (OSError, ValueError):
        return None
    if not limit.isdigit() or int(limit) >= _NO_LIMIT:
        return None
    match = re.search(r"^(?:total_)?inactive_file (\d+)$", stat, re.MULTILINE)
    dropped = int(match.group(1)) if match else 0
    return HostMemory(total_bytes=int(limit), used_bytes=max(0, usage - dropped), scope="cgroup")


def host_sample() -> Sample:
    """Return the host as a device, with its largest processes by resident memory."""
    memory = host_memory()
    name = _("host") if memory.scope == "machine" else _("host (limit of the cgroup)")
    device = Device(index=HOST, name=name, total_bytes=memory.total_bytes, kind="host")
    return Sample(device=device, used_bytes=memory.used_bytes, processes=largest_processes())


def largest_processes(limit: int = MAX_PROCESSES) -> tuple[Process, ...]:
    """Return the processes with most resident memory."""
    found: list[tuple[int, int]] = []
    if not _PROC.is_dir():
        return ()
    page = os.sysconf("SC_PAGE_SIZE")
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            with suppress(OSError, ValueError, IndexError):
                found.append((int((entry / "statm").read_text().split()[1]) * page, int(entry.name)))
    largest = sorted(found, reverse=True)[:limit]
    return tuple(Process(pid=pid, used_bytes=used, name=process_name(pid)) for used, pid in largest if used)


def process_name(pid: int) -> str:
    """Return what a process calls itself, empty when it is gone."""
    with suppress(OSError):
        return (_PROC / str(pid) / "comm").read_text().strip()
    return ""
