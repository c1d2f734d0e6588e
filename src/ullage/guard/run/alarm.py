"""Beside a run: sample the devices, warn when the reserve is used, keep the peak, and write the recording."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from ullage.guard.watch.record import Recorder
from ullage.guard.watch.sample import Device
from ullage.guard.watch.sampler import Line, Sampler
from ullage.i18n import _
from ullage.units import format_bytes


class Alarm:
    """A thread that looks every few seconds; sampling is a lower bound of the true peak."""

    def __init__(
        self, say: Callable[[str], None], *, reserve: str, every_seconds: float, counters: Path, record: str = ""
    ) -> None:
        self._say, self._every = say, every_seconds
        self._line = Line(reserve) if reserve else None
        self._counters = counters
        self._peaks: dict[int, tuple[Device, int]] = {}
        self._stop = threading.Event()
        self._sampler = Sampler(counters=counters)
        samples = self._sampler.take()
        self._recorder = Recorder(record, [sample.device for sample in samples]) if record else None
        if self._line is not None:
            for sample in samples:  # a reserve that makes no sense is said before anything starts
                self._line.line_bytes(sample.device)
        self._thread = threading.Thread(target=self._run, name="ullage-alarm", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._look()
            self._stop.wait(self._every)

    def _look(self) -> None:
        samples = self._sampler.take()
        for sample in samples:
            known = self._peaks.get(sample.device.index, (sample.device, 0))[1]
            self._peaks[sample.device.index] = (sample.device, max(known, sample.used_bytes))
        if self._recorder is not None:
            self._recorder.samples(samples)
        for passed in self._line.check(samples) if self._line is not None else ():
            words = _("{device}: {used} are used, above the line of {line} that keeps the reserve of {total} free")
            sentence = words.format(
                device=passed.device.name,
                used=format_bytes(passed.used_bytes),
                line=format_bytes(passed.line_bytes),
                total=format_bytes(passed.device.total_bytes),
            )
            self._say(sentence)
            self.event("reserve", sentence)

    def event(self, event: str, text: str) -> None:
        """Write an event into the recording."""
        if self._recorder is not None:
            self._recorder.event(event, text)

    def take_peaks(self) -> tuple[tuple[Device, int], ...]:
        """Return the highest use of each device since the last call."""
        found, self._peaks = tuple(self._peaks.values()), {}
        return found

    def close(self) -> None:
        """Stop looking."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        self._sampler.close()
        if self._recorder is not None:
            if self._recorder.error:
                self._say(_("the recording ended early: {why}").format(why=self._recorder.error))
            self._recorder.close()
