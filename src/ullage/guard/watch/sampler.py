"""Take samples: every GPU that NVML knows, or the host where there is none; and say when the reserve is touched."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

from ullage.guard.watch.counters import read_counters
from ullage.guard.watch.devices import Nvml
from ullage.guard.watch.exporter import default_folder
from ullage.guard.watch.host import host_sample
from ullage.guard.watch.sample import Device, Sample

#: Over how long the trend is taken, and from how many samples on.
TREND_SECONDS = 600.0
MIN_TREND_SAMPLES = 5


class Sampler:
    """Samples of all devices; ``host`` adds the host's memory beside GPUs (without GPUs it is always there)."""

    def __init__(self, *, counters: Path | None = None, host: bool = True) -> None:
        self.nvml = Nvml()
        self.folder = counters if counters is not None else default_folder()
        self.with_host = host or not self.nvml.devices

    def take(self) -> list[Sample]:
        """Return a sample of each device."""
        counters = read_counters(self.folder)
        found = [
            replace(sample, counters=tuple(each for each in counters if each.device == sample.device.index))
            for sample in self.nvml.samples()
        ]
        return [*found, host_sample()] if self.with_host else found

    def close(self) -> None:
        """Let NVML go."""
        self.nvml.close()


@dataclass(frozen=True, kw_only=True)
class Passed:
    """The reserve of a device was passed (``below`` False: it is free again)."""

    device: Device
    used_bytes: int
    line_bytes: int


class Line:
    """The line above which the reserve is used; each passing is told once, until it is free again."""

    def __init__(self, reserve: str) -> None:
        self.reserve = reserve
        self._above: set[int] = set()

    def line_bytes(self, device: Device) -> int:
        """Return how much may be used before the reserve is touched."""
        from ullage.fitting import parse_reserve

        return device.total_bytes - parse_reserve(self.reserve, device.total_bytes)

    def check(self, samples: list[Sample]) -> list[Passed]:
        """Return the devices that passed the line since the last look."""
        found = []
        for sample in samples:
            line, index = self.line_bytes(sample.device), sample.device.index
            if sample.used_bytes <= line or sample.error:
                self._above.discard(index)
            elif index not in self._above:
                self._above.add(index)
                found.append(Passed(device=sample.device, used_bytes=sample.used_bytes, line_bytes=line))
        return found


class Trend:
    """Where the used memory of each device goes: a straight line through the last minutes (least squares)."""

    def __init__(self, seconds: float = TREND_SECONDS) -> None:
        self.seconds = seconds
        self._points: dict[int, deque[tuple[float, int]]] = {}

    def add(self, samples: list[Sample], now: float | None = None) -> None:
        """Take the samples of a moment."""
        moment = time.monotonic() if now is None else now
        for sample in samples:
            points = self._points.setdefault(sample.device.index, deque(maxlen=4096))
            points.append((moment, sample.used_bytes))
            while points and points[0][0] < moment - self.seconds:
                points.popleft()

    def bytes_per_second(self, index: int) -> float | None:
        """Return the slope, None from too few samples.

        Formula: sum((t - mean t)(u - mean u)) / sum((t - mean t)^2).
        """
        points = self._points.get(index, deque())
        if len(points) < MIN_TREND_SAMPLES:
            return None
        mean_t = sum(t for t, _used in points) / len(points)
        mean_u = sum(used for _t, used in points) / len(points)
        below = sum((t - mean_t) ** 2 for t, _used in points)
        return sum((t - mean_t) * (used - mean_u) for t, used in points) / below if below else None

    def seconds_to_full(self, sample: Sample) -> float | None:
        """Return when the device is full if it goes on like this; None when it does not grow."""
        slope = self.bytes_per_second(sample.device.index)
        if slope is None or slope <= 0:
            return None
        return (sample.device.total_bytes - sample.used_bytes) / slope
