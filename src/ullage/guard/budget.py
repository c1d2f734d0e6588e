"""Warn before the wall: what stays free, failed allocations that were tried again, and the trend of the peaks."""

from __future__ import annotations

from collections import deque
from typing import Any

from ullage.guard.sizes import has_room
from ullage.i18n import _
from ullage.units import format_bytes

#: Reading the allocator's statistics costs about 0.1 ms, so that not every step does.
EVERY = 20
WINDOW = 16


class Trend:
    """The peaks of the last readings, and when they meet a limit if they go on like this."""

    def __init__(self) -> None:
        self.readings: deque[tuple[int, int]] = deque(maxlen=WINDOW)

    def feed(self, step: int, peak_bytes: int) -> None:
        """Take one reading."""
        self.readings.append((step, peak_bytes))

    def steps_to(self, limit_bytes: int) -> int | None:
        """Return the steps until the limit by the least-squares line; None while it is flat, falls, or is too short.

        A line counts only when it explains most of what varies (R² of at least 0.5): peaks that jump with the shapes
        of batches are no trend.
        """
        num = len(self.readings)
        if num < WINDOW // 2:
            return None
        mean_step = sum(step for step, _peak in self.readings) / num
        mean_peak = sum(peak for _step, peak in self.readings) / num
        across = sum((step - mean_step) ** 2 for step, _peak in self.readings)
        along = sum((step - mean_step) * (peak - mean_peak) for step, peak in self.readings)
        spread = sum((peak - mean_peak) ** 2 for _step, peak in self.readings)
        if not across or along <= 0 or along * along < 0.5 * across * spread:
            return None
        slope, (last, _peak) = along / across, self.readings[-1]
        return max(0, int((limit_bytes - mean_peak - slope * (last - mean_step)) / slope))


class Budget:
    """The memory of this rank's device, read every few windows; on a CPU it knows nothing and says nothing."""

    def __init__(self, reserve: str, memory_fraction: float | None) -> None:
        import torch

        from ullage.fitting import parse_reserve

        self.total_bytes = self.reserve_bytes = self.base_bytes = self.peak_bytes = 0
        self.trend = Trend()
        self._retries = 0
        self._cuda: Any = torch.cuda if torch.cuda.is_available() else None
        if self._cuda is None:
            parse_reserve(reserve, 1)
            return
        if memory_fraction is not None:
            self._cuda.set_per_process_memory_fraction(memory_fraction)
        self.total_bytes = self._cuda.mem_get_info()[1]
        self.reserve_bytes = parse_reserve(reserve, self.total_bytes)
        self.limit_bytes = int(self.total_bytes * (memory_fraction or 1.0))

    def begin(self, step: int) -> None:
        """Note what is held before a window."""
        if self._cuda is not None and step % EVERY == 0:
            self._cuda.reset_peak_memory_stats()
            self.base_bytes = self._cuda.memory_allocated()

    def end(self, step: int) -> list[str]:
        """Read the statistics every few windows, and return what is worth saying."""
        if self._cuda is None or step % EVERY:
            return []
        stats = self._cuda.memory_stats()
        self.peak_bytes = int(stats.get("allocated_bytes.all.peak", 0))
        reserved, retries = int(stats.get("reserved_bytes.all.peak", 0)), int(stats.get("num_alloc_retries", 0))
        return list(self.judge(step, reserved, retries))

    def judge(self, step: int, reserved_bytes: int, retries: int) -> list[str]:
        """Return warnings for one reading."""
        said = []
        if retries > self._retries:
            said.append(
                _("{num} allocations had to be tried again after the cache was emptied: memory is at its edge").format(
                    num=retries - self._retries
                )
            )
        self._retries = retries
        free = self.total_bytes - reserved_bytes
        if free < self.reserve_bytes:
            said.append(
                _("{free} of the device are left free at the peak, less than the reserve of {reserve}").format(
                    free=format_bytes(max(0, free)), reserve=format_bytes(self.reserve_bytes)
                )
            )
        self.trend.feed(step, reserved_bytes)
        steps = self.trend.steps_to(self.total_bytes)
        if steps is not None and steps < 1000:
            said.append(_("the peak grows: at this pace memory ends in {steps} steps").format(steps=steps))
        return said

    def no_room(self, current: int, larger: int) -> bool:
        """True where a larger micro-batch is predicted not to leave the reserve free."""
        if self._cuda is None or not self.peak_bytes:
            return False
        return not has_room(self.peak_bytes, self.base_bytes, self.limit_bytes - self.reserve_bytes, current, larger)
