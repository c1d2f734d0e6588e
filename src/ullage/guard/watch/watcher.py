"""The loop of ``ullage watch``: take samples, hand them to the endpoint, the recording and the view."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ullage.guard.watch.metrics import BY_NAME, Value, values_of
from ullage.guard.watch.record import Recorder
from ullage.guard.watch.sample import Sample
from ullage.guard.watch.sampler import Line, Passed, Sampler, Trend


@dataclass(frozen=True, kw_only=True)
class State:
    """What is known at a moment."""

    samples: tuple[Sample, ...]
    passed: tuple[Passed, ...]
    line: Line
    trend: Trend
    nvml_missing: str = ""
    time: float = field(default_factory=time.time)


class Watcher:
    """Samples on demand, or in turns of ``every_seconds``."""

    def __init__(self, *, reserve: str, counters: Path | None = None, host: bool = True) -> None:
        self.sampler, self.line, self.trend = Sampler(counters=counters, host=host), Line(reserve), Trend()
        self.recorder: Recorder | None = None
        self._lock = threading.Lock()
        self._last: list[Sample] = []
        self._num_samples = 0
        self._stop = threading.Event()

    def look(self) -> State:
        """Take a sample of everything."""
        samples = self.sampler.take()
        with self._lock:
            self._last = samples
            self._num_samples += 1
            self.trend.add([sample for sample in samples if not sample.error])
        passed = self.line.check(samples)
        if self.recorder is not None:
            self.recorder.samples(samples)
            for each in passed:
                self.recorder.event("reserve", each.device.name, device=each.device.index, used_bytes=each.used_bytes)
        return State(
            samples=tuple(samples),
            passed=tuple(passed),
            line=self.line,
            trend=self.trend,
            nvml_missing=self.sampler.nvml.why,
        )

    def values(self) -> list[Value]:
        """Return the values to export, of the last samples."""
        with self._lock:
            found = list(values_of(self._last, self.line, self.trend))
            return [*found, (BY_NAME["ullage_watch_samples"], (), self._num_samples)]

    def run(self, every_seconds: float, show: Callable[[State], None], num_samples: int = 0) -> None:
        """Look every so often until stopped, or so many times; the clock does not drift."""
        start, turn = time.monotonic(), 0
        while not self._stop.is_set():
            show(self.look())
            turn += 1
            if num_samples and turn >= num_samples:
                return
            self._stop.wait(max(0.0, start + turn * every_seconds - time.monotonic()))

    def stop(self) -> None:
        """Let :meth:`run` return."""
        self._stop.set()

    def close(self) -> None:
        """Close what is open."""
        self.sampler.close()
        if self.recorder is not None:
            self.recorder.close()
