"""The keeper: a small process between ``ullage run`` and the command, so that nothing outlives a run.

``ullage run`` → keeper → command. The keeper adopts every descendant whose parent dies (Linux: child subreaper), hands
signals on, reports the command's end, and ends all that is left. When ``ullage run`` itself is killed the pipe to it
closes, and the keeper ends everything; when the keeper is killed the command gets SIGTERM (PR_SET_PDEATHSIG) and
``ullage run``, a subreaper too, ends the rest.

It runs as a file of its own (``python -I -S keeper.py``) and imports the standard library only.

Control lines read: ``signal NUMBER group|command``, ``end SECONDS``. Reports written, JSON lines: ``{"pid"}``,
``{"error", "text"}``, ``{"status", "num_swept", "num_left"}``.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # Linux: include/uapi/linux/prctl.h
_SWEEP_SECONDS = 2.0
_KILL_SECONDS = 20.0
_PROC = Path("/proc")
_IGNORED = (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_WAKING = (signal.SIGCHLD, signal.SIGTERM)


def prctl(option: int, value: int) -> bool:
    """Set an attribute of this process; false where the system has none."""
    if not sys.platform.startswith("linux"):
        return False
    import ctypes

    try:
        library = ctypes.CDLL(None, use_errno=True)
        return int(library.prctl(option, value, 0, 0, 0)) == 0
    except (OSError, AttributeError):
        return False


def adopt_orphans(*, adopt: bool = True) -> bool:
    """Let descendants whose parent dies become children of this process."""
    return prctl(_PR_SET_CHILD_SUBREAPER, int(adopt))


def _parents() -> dict[int, int]:
    """Return the parent of every live process; zombies are left out."""
    found: dict[int, int] = {}
    for entry in _PROC.iterdir() if _PROC.is_dir() else ():
        if not entry.name.isdigit():
            continue
        try:
            state, parent = (entry / "stat").read_bytes().rpartition(b")")[2].split()[:2]
        except (OSError, ValueError):
            continue
        if state not in (b"Z", b"X"):
            found[int(entry.name)] = int(parent)
    return found or _parents_by_ps()


def _parents_by_ps() -> dict[int, int]:
    """Return the parents where there is no /proc (macOS)."""
    import subprocess

    try:
        text = subprocess.run(["ps", "-axo", "pid=,ppid=,stat="], capture_output=True, text=True, check=False).stdout
    except OSError:
        return {}
    rows = [line.split(None, 2) for line in text.splitlines()]
    return {int(row[0]): int(row[1]) for row in rows if len(row) == 3 and not row[2].startswith("Z")}


def descendants(root: int, *, but: frozenset[int] = frozenset()) -> list[int]:
    """Return the live processes below ``root``, children first; those of ``but`` and below them are left out."""
    children: dict[int, list[int]] = {}
    for pid, parent in _parents().items():
        children.setdefault(parent, []).append(pid)
    found: list[int] = []
    waiting = [root]
    while waiting:
        below = [pid for pid in children.get(waiting.pop(0), []) if pid not in but]
        found += below
        waiting += below
    return found


def send(pid: int, number: int) -> None:
    """Signal a process that may be gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def reap() -> dict[int, int]:
    """Collect children that have ended."""
    found: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        found[pid] = status


def sweep(root: int, grace_seconds: float = _SWEEP_SECONDS, *, but: frozenset[int] = frozenset()) -> tuple[int, int]:
    """End all descendants of this process: SIGTERM, then SIGKILL. Return how many there were and how many are left."""
    seen: set[int] = set()
    start = time.monotonic()
    while True:
        if not but:
            reap()
        alive = descendants(root, but=but)
        waited = time.monotonic() - start
        if not alive or waited > grace_seconds + _KILL_SECONDS:
            return len(seen), len(alive)
        for pid in alive:
            if waited >= grace_seconds:
                send(pid, signal.SIGKILL)
            elif pid not in seen:
                send(pid, signal.SIGTERM)
                send(pid, signal.SIGCONT)  # a stopped process takes its signal only when it goes on
        seen.update(alive)
        time.sleep(0.01 if waited < 0.5 else 0.1)


class Keeper:
    """Runs one command."""

    def __init__(self, control: int, status: int, command: list[str], ignored: frozenset[int] = frozenset()) -> None:
        self.control, self.status, self.command = control, status, command
        self.ignored = ignored
        self.pid = 0
        self.ended: int | None = None
        self.deadline: float | None = None
        self.rest = b""

    def report(self, **values: object) -> None:
        """Tell ``ullage run``; it may be gone."""
        with contextlib.suppress(OSError):
            os.write(self.status, json.dumps(values).encode() + b"\n")

    def start(self) -> bool:
        """Start the command in a session of its own."""
        ready, failed = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._become(failed)
        os.close(failed)
        number = os.read(ready, 16)
        os.close(ready)
        if number:
            self.report(error=int(number), text=os.strerror(int(number)))
            return False
        self.report(pid=self.pid)
        return True

    def _become(self, failed: int) -> None:
        try:
            os.setsid()
            prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            for number in (*_IGNORED, *_WAKING, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_IGN if number in self.ignored else signal.SIG_DFL)
            os.execvp(self.command[0], self.command)
        except OSError as error:
            os.write(failed, str(error.errno).encode())
        finally:
            os._exit(127)

    def run(self) -> None:
        """Wait for the command's end, obeying the control pipe."""
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        if not self.start():
            return
        while self.ended is None:
            wait = 60.0 if self.deadline is None else max(0.0, self.deadline - time.monotonic())
            watched = [wake_read] if self.control < 0 else [wake_read, self.control]
            readable = select.select(watched, [], [], wait)[0]
            if wake_read in readable:
                numbers = os.read(wake_read, 512)
                if signal.SIGTERM in numbers:
                    self._end(_SWEEP_SECONDS)
            if self.control >= 0 and self.control in readable:
                self._obey()
            if self.deadline is not None and time.monotonic() >= self.deadline:
                for pid in [*descendants(os.getpid()), self.pid]:
                    send(pid, signal.SIGKILL)
                self.deadline = time.monotonic() + 1
            self.ended = reap().get(self.pid, self.ended)
        swept, left = sweep(os.getpid())
        self.report(status=self.ended, num_swept=swept, num_left=left)

    def _obey(self) -> None:
        block = os.read(self.control, 4096)
        if not block:  # ullage run is gone
            self.control = -1
            self._end(_SWEEP_SECONDS)
            return
        *lines, self.rest = (self.rest + block).split(b"\n")
        for line in lines:
            words = line.decode().split()
            if words[:1] == ["end"]:
                self._end(float(words[1]))
            elif words[:1] == ["signal"]:
                self._hand_on(int(words[1]), group=words[2] == "group")

    def _hand_on(self, number: int, *, group: bool) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            (os.killpg if group else os.kill)(self.pid, number)

    def _end(self, seconds: float) -> None:
        """Ask the command to end, and set when it is killed with all below it; a later call only shortens the time."""
        if self.deadline is None and seconds > 0:
            self._hand_on(signal.SIGTERM, group=True)
            self._hand_on(signal.SIGCONT, group=True)
        moment = time.monotonic() + seconds
        self.deadline = moment if self.deadline is None else min(self.deadline, moment)


def main(words: list[str]) -> int:
    """Run as ``keeper.py CONTROL_FD STATUS_FD COMMAND...``."""
    control, status = int(words[0]), int(words[1])
    for number in (control, status):
        os.set_inheritable(number, False)
    found = {number for number in _IGNORED if signal.getsignal(number) == signal.SIG_IGN} - {signal.SIGPIPE}
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    for number in _WAKING:
        signal.signal(number, lambda _number, _frame: None)
    adopt_orphans()
    Keeper(control, status, words[2:], frozenset(found)).run()  # what nohup ignored stays ignored
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
