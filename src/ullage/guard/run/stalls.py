"""Where a silent job is stuck: the Python stacks by py-spy where it is installed, else what the system tells."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

from ullage.guard.run import keeper
from ullage.guard.run.child import Child
from ullage.i18n import _

MAX_PROCESSES = 32
MAX_CHARACTERS = 60_000
_TIMEOUT_SECONDS = 10.0
_STATES = {"R": "running", "S": "sleeping", "D": "waiting for a device", "T": "stopped", "t": "traced"}


def dump(child: Child, number: int = 0) -> str:
    """Return the stacks of the job's processes; ``number``: a signal they answer by writing where they are."""
    pids = [child.pid, *keeper.descendants(child.pid)][:MAX_PROCESSES]
    if number:
        for pid in pids:
            if _is_python(pid):
                keeper.send(pid, number)
    spy = shutil.which("py-spy")
    texts = [_spied(spy, pid) for pid in pids if _is_python(pid)] if spy else []
    texts = [text for text in texts if text]
    if not texts:
        texts = [_("py-spy is not installed: no Python stacks"), *filter(None, map(_state, pids))]
    return "\n".join(texts)[:MAX_CHARACTERS]


def _is_python(pid: int) -> bool:
    with suppress(OSError):
        return b"python" in (Path("/proc") / str(pid) / "cmdline").read_bytes()[:4096]
    return False


def _spied(spy: str, pid: int) -> str:
    try:
        done = subprocess.run(
            [spy, "dump", "--pid", str(pid)], capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _state(pid: int) -> str:
    """Return one line on a process: its state, what it waits for in the kernel, and its processor time."""
    place = Path("/proc") / str(pid)
    try:
        fields = (place / "stat").read_text().rpartition(")")[2].split()
        command = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")[:120].strip()
    except (OSError, IndexError):
        return ""
    seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    waits = ""
    with suppress(OSError):
        waits = (place / "wchan").read_text().strip("0")
    state = _STATES.get(fields[0], fields[0])
    return f"  {pid}: {state}{f' in {waits}' if waits else ''}, {seconds:.1f} s of processor time: {command}"
