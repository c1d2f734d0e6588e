"""One attempt: the command under its keeper, its output passed on, signals handed on, and its end."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from ullage.guard.run import keeper
from ullage.guard.run.tail import Tail

#: Signals that ask for the end; further ones are handed on only.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_PASSED = (signal.SIGUSR1, signal.SIGUSR2)
_TO_GROUP = (*ENDING, signal.SIGWINCH, signal.SIGCONT)
_BLOCK_BYTES = 1 << 16
_DRAIN_SECONDS = 2.0
#: What a stuck process has for writing where it is, before it is asked to end.
_DUMP_SECONDS = 1.0
#: So many requests to end mean: now.
_IMPATIENT = 3


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How an attempt ended.

    Attributes:
        exit_code: the command's own; 128 + n after signal n.
        signal: the signal that ended it, 0 for none.
        errno: why it could not be started, 0 when it was.
        by: ``command``, or what ended it: ``signal`` (to ullage run), ``stall``.
        asked_to_end: the signal that asked ullage run to end, 0 for none.
        num_swept: descendants that were left over and ended; ``num_left`` could not be ended.
    """

    exit_code: int
    signal: int = 0
    errno: int = 0
    by: str = "command"
    asked_to_end: int = 0
    seconds: float = 0.0
    num_swept: int = 0
    num_left: int = 0
    pid: int = 0
    tail: Tail = field(default_factory=Tail)
    dump: str = ""


class Signals:
    """Signals to this process, queued while the context lasts."""

    def __init__(self) -> None:
        self.queue: deque[int] = deque()
        self.read_fd = -1

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.queue.append(number)

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catch signals; what was ignored (nohup) stays ignored."""
        numbers = [*ENDING, *_PASSED, signal.SIGWINCH, signal.SIGCONT]
        numbers = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
        self.read_fd, write_fd = os.pipe()
        os.set_blocking(write_fd, False)
        before = {number: signal.signal(number, self._note) for number in numbers}
        old_fd = signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(old_fd)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(self.read_fd)
            os.close(write_fd)


@dataclass
class Limits:
    """When an attempt is given up: seconds of grace after a request to end, and of silence (0: for ever)."""

    grace_seconds: float = 30.0
    stall_seconds: float = 0.0
    heartbeat: Path | None = None


class Child:
    """The command, from its start to its end."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], signals: Signals, limits: Limits
    ) -> None:
        self.command, self.environment, self.signals, self.limits = list(command), environment, signals, limits
        self.tail = Tail()
        self.pid = self.errno = self.asked_to_end = self._asked = 0
        self.by, self.dump = "command", ""
        self.on_stall: Callable[[Child], str] = lambda _child: ""
        self._report: dict[str, int] | None = None
        self._rest = b""
        self._kill_at: float | None = None
        self._end_at: float | None = None
        self._outputs: dict[int, int] = {}
        self._selector = selectors.DefaultSelector()

    def run(self) -> Ended:
        """Run the command to its end."""
        start = self.last_sign = time.monotonic()
        before = frozenset(keeper.descendants(os.getpid()))
        kept, files = self._start()
        try:
            self._loop()
            self._drain()
        finally:
            for number in (self._control, self._status):
                os.close(number)
            with suppress(subprocess.TimeoutExpired):
                kept.wait(timeout=5)
            if self._report is None and not self.errno:
                self._sweep_here(before | {kept.pid})
                kept.wait()
            self._selector.close()
            for file in files:
                os.close(file)
        self.tail.finish()
        return self._ended(time.monotonic() - start)

    def _start(self) -> tuple[subprocess.Popen[bytes], list[int]]:
        pipes = {name: os.pipe() for name in ("control", "status", "out", "err")}
        words = [sys.executable, "-I", "-S", str(Path(keeper.__file__).resolve())]
        kept = subprocess.Popen(
            [*words, str(pipes["control"][0]), str(pipes["status"][1]), *self.command],
            stdout=pipes["out"][1],
            stderr=pipes["err"][1],
            pass_fds=(pipes["control"][0], pipes["status"][1]),
            env=dict(self.environment),
            start_new_session=True,
        )
        for number in (pipes["control"][0], pipes["status"][1], pipes["out"][1], pipes["err"][1]):
            os.close(number)
        self._control, self._status = pipes["control"][1], pipes["status"][0]
        self._outputs = {pipes["out"][0]: 1, pipes["err"][0]: 2}
        for number in (*self._outputs, self._status, self.signals.read_fd):
            self._selector.register(number, selectors.EVENT_READ)
        return kept, [pipes["out"][0], pipes["err"][0]]

    def _loop(self) -> None:
        done = False
        while not done:
            for key, _events in self._selector.select(timeout=0.5):
                if key.fd in self._outputs:
                    self._pass_on(key.fd)
                elif key.fd == self._status:
                    done = not self._read_report()
                else:
                    os.read(key.fd, 512)
            self._hand_on_signals()
            self._look_at_clock()

    def _pass_on(self, number: int) -> bool:
        """Pass a block on unchanged; false at the end of the stream."""
        block = os.read(number, _BLOCK_BYTES)
        if not block:
            self._selector.unregister(number)
            del self._outputs[number]
            return False
        self.last_sign = time.monotonic()
        self.tail.take(number, block)
        view = memoryview(block)
        try:
            while view:
                view = view[os.write(self._outputs[number], view) :]
        except BlockingIOError:
            os.set_blocking(self._outputs[number], True)
            os.write(self._outputs[number], view)
        except OSError:  # nobody reads it any more: let the command learn it as it would have without us
            self._selector.unregister(number)
            del self._outputs[number]
            nothing = os.open(os.devnull, os.O_RDONLY)
            os.dup2(nothing, number, inheritable=False)
            os.close(nothing)
        return True

    def _read_report(self) -> bool:
        block = os.read(self._status, 4096)
        *lines, self._rest = (self._rest + block).split(b"\n")
        for line in lines:
            values = json.loads(line)
            self.pid = values.get("pid", self.pid)
            self.errno = values.get("error", 0)
            if "status" in values:
                self._report = values
        return bool(block) and self._report is None and not self.errno

    def tell(self, words: str) -> None:
        """Tell the keeper; it may be gone."""
        with suppress(OSError):
            os.write(self._control, words.encode() + b"\n")

    def _hand_on_signals(self) -> None:
        while self.signals.queue:
            number = self.signals.queue.popleft()
            self.tell(f"signal {number} {'group' if number in _TO_GROUP else 'command'}")
            if number not in ENDING:
                continue
            self._asked += 1
            self.asked_to_end = self.asked_to_end or number
            self.by = "signal"
            moment = time.monotonic() + (0 if self._asked >= _IMPATIENT else self.limits.grace_seconds)
            self._kill_at = moment if self._kill_at is None else min(self._kill_at, moment)

    def _look_at_clock(self) -> None:
        now = time.monotonic()
        if self._kill_at is not None:
            if now >= self._kill_at:
                self.tell("end 0")
                self._kill_at = now + 60
            return
        if self._end_at is not None and now >= self._end_at:
            self.tell(f"end {self.limits.grace_seconds}")
            self._end_at = None
        if self.limits.stall_seconds <= 0 or self.by != "command" or not self.pid:
            return
        if now - self.last_sign >= self.limits.stall_seconds and self._silent_for() >= self.limits.stall_seconds:
            self.by = "stall"
            self.dump = self.on_stall(self)
            self._end_at = now + _DUMP_SECONDS

    def _silent_for(self) -> float:
        """Return the seconds since the last output or heartbeat."""
        silent = time.monotonic() - self.last_sign
        if self.limits.heartbeat is None:
            return silent
        with suppress(OSError):
            beats = [path.stat().st_mtime for path in self.limits.heartbeat.iterdir()]
            silent = min([silent, *(time.time() - beat for beat in beats)])
        return silent

    def _drain(self) -> None:
        """Read what is left in the pipes."""
        end = time.monotonic() + _DRAIN_SECONDS
        while self._outputs and time.monotonic() < end:
            for key, _events in self._selector.select(timeout=0.1):
                if key.fd in self._outputs:
                    self._pass_on(key.fd)
                elif key.fd == self.signals.read_fd:
                    os.read(key.fd, 512)

    def _sweep_here(self, but: frozenset[int]) -> None:
        """End what the keeper left when it was killed: this process has adopted it."""
        swept, left = keeper.sweep(os.getpid(), but=but)
        for pid in keeper.descendants(os.getpid(), but=but):
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        self._report = {"status": int(signal.SIGKILL), "num_swept": swept, "num_left": left}

    def _ended(self, seconds: float) -> Ended:
        report = self._report or {"status": 127 << 8, "num_swept": 0, "num_left": 0}
        status = report["status"]
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        return Ended(
            exit_code=128 + number if number else os.WEXITSTATUS(status),
            signal=number,
            errno=self.errno,
            by=self.by,
            asked_to_end=self.asked_to_end,
            seconds=seconds,
            num_swept=report["num_swept"],
            num_left=report["num_left"],
            pid=self.pid,
            tail=self.tail,
            dump=self.dump,
        )
