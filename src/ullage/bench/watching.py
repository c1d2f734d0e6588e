"""Where the memory of a server is seen during a bench: its processes, NVML, or a recording of ``ullage watch``."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ullage.bench.curves import Sample, thinned
from ullage.bench.meters import Meter, NvmlMeter, ProcessMeter, Sampler
from ullage.errors import InputError, MissingExtraError
from ullage.i18n import _

INTERVAL = 0.1
MAX_RECORDING_BYTES = 1 << 30


class Watching:
    """Nothing is seen; the base of the others. A context manager around the bench; ``clock`` is its zero."""

    kind = "none"

    def __init__(self) -> None:
        self.clock = time.perf_counter()
        self.warnings: list[str] = []

    def __enter__(self) -> Watching:
        self.clock = time.perf_counter()
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def look(self) -> None:
        """Take a sample now, if that is possible: a phase shorter than the interval has one, too."""

    def samples(self) -> Sequence[Sample]:
        """Return all samples so far, by the clock."""
        return ()

    def between(self, begun: float, ended: float) -> list[Sample]:
        """Return the samples of a phase, timed from its start."""
        inside = [
            Sample(
                t=round(one.t - begun, 4),
                used_bytes=one.used_bytes,
                allocated_bytes=one.allocated_bytes,
                reserved_bytes=one.reserved_bytes,
            )
            for one in self.samples()
            if begun <= one.t <= ended
        ]
        return thinned(inside)

    def peak(self, begun: float, ended: float) -> int | None:
        """Return the most used between two instants."""
        return max((one.used_bytes for one in self.samples() if begun <= one.t <= ended), default=None)


class Metered(Watching):
    """A meter of this host, sampled by a thread."""

    def __init__(self, meter: Meter, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self._sampler = Sampler(meter, interval=INTERVAL)

    def __enter__(self) -> Watching:
        self.clock = self._sampler.start = time.perf_counter()
        self._sampler.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._sampler.__exit__(*error)

    def look(self) -> None:
        """Read the meter."""
        self._sampler.sample()

    def samples(self) -> Sequence[Sample]:
        """Return what was sampled, in order: the thread and a look may meet."""
        return sorted(self._sampler.samples, key=lambda one: one.t)


class Recorded(Watching):
    """A recording that ``ullage watch`` writes on the server's host; read anew, since it grows meanwhile."""

    kind = "recording"

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._begun = time.time()
        self._known: tuple[int, list[Sample]] = (-1, [])
        read_recording(path)  # a file that is none is refused before the bench starts

    def __enter__(self) -> Watching:
        self.clock, self._begun = time.perf_counter(), time.time()
        return self

    def samples(self) -> Sequence[Sample]:
        """Return its samples by the bench's clock; the devices are added up."""
        size = self.path.stat().st_size
        if size != self._known[0]:
            started, found = read_recording(self.path)
            shift = started - self._begun
            self._known = size, [Sample(t=t + shift, used_bytes=used) for t, used in found]
        return self._known[1]


def read_recording(path: Path) -> tuple[float, list[tuple[float, int]]]:
    """Return when a recording started (seconds of the epoch) and (seconds since then, bytes used on all devices).

    Raises:
        InputError: it is no recording.
    """
    try:
        if path.stat().st_size > MAX_RECORDING_BYTES:
            raise InputError(_("the recording is too large"), where=str(path))
        with path.open(encoding="utf-8") as file:
            head = json.loads(file.readline(1 << 20))
            if not isinstance(head, dict) or "ullage_recording" not in head:
                raise ValueError
            started = datetime.fromisoformat(str(head["started"]).replace("Z", "+00:00")).timestamp()
            return started, _sums(file)
    except OSError as error:
        raise InputError(_("cannot be read ({reason})").format(reason=error.strerror), where=str(path)) from None
    except (ValueError, KeyError):
        raise InputError(_("is no recording of ullage watch"), where=str(path)) from None


def _sums(lines: Any) -> list[tuple[float, int]]:
    """Add the devices up: each sample replaces its device's last figure."""
    last: dict[int, int] = {}
    found: list[tuple[float, int]] = []
    for line in lines:
        try:
            one = json.loads(line)
            at, device, used = float(one["t"]), int(one["device"]), int(one["used_bytes"])
        except (ValueError, KeyError, TypeError):  # an event, or the line that is being written now
            continue
        last[device] = used
        if found and found[-1][0] == at:
            found.pop()
        found.append((at, sum(last.values())))
    return found


def watching(*, pid: int | None = None, nvml: str | None = None, recording: Path | None = None) -> Watching:
    """Return the way that was asked for.

    Raises:
        InputError: there is no such process, device or recording.
    """
    if pid is not None:
        if ProcessMeter(pid).read(0.0).used_bytes == 0:
            raise InputError(_("there is no process {pid} here").format(pid=pid), where="--pid")
        _need_psutil()
        return Metered(ProcessMeter(pid, children=True), "rss")
    if nvml is not None:
        return Metered(_nvml(nvml), "nvml")
    return Recorded(recording) if recording is not None else Watching()


def _need_psutil() -> None:
    try:
        import psutil  # noqa: F401
    except ImportError:
        raise MissingExtraError("psutil", "bench") from None


def _nvml(words: str) -> NvmlMeter:
    try:
        indices = None if words == "all" else [int(word) for word in words.split(",")]
        return NvmlMeter(indices)
    except ImportError:
        raise MissingExtraError("nvidia-ml-py", "gpu") from None
    except ValueError:
        raise InputError(_("is no list of devices"), where="--nvml", remedy=_("write 0,1 or all")) from None
    except Exception as error:  # pynvml.NVMLError: no driver, or no such device
        raise InputError(_("NVML does not answer ({error})").format(error=error), where="--nvml") from None
