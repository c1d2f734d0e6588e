"""Reading memory while something runs: CUDA's counters, or the resident set of a process; a thread that samples."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any, Protocol

from ullage.bench.curves import Sample

INTERVAL = 0.02
MAX_SAMPLES = 200_000


class Meter(Protocol):
    """One device, or one process, whose memory can be read."""

    def read(self, t: float) -> Sample:
        """Return the memory now; ``t`` is the time to note."""

    def begin_step(self) -> None:
        """Forget the peaks so far."""

    def end_step(self) -> tuple[int | None, int | None]:
        """Wait for the device; return the peaks of allocated and reserved since :meth:`begin_step`."""

    def counters(self) -> dict[str, int]:
        """Return what the allocator counts: retries, out-of-memory."""


class CudaMeter:
    """A CUDA device by its own counters: used is total - free of the whole device, other processes counted."""

    def __init__(self, device: Any) -> None:
        import torch

        self._cuda, self._device = torch.cuda, device

    def read(self, t: float) -> Sample:
        """Return device used, allocated and reserved."""
        free, total = self._cuda.mem_get_info(self._device)
        return Sample(
            t=t,
            used_bytes=total - free,
            allocated_bytes=self._cuda.memory_allocated(self._device),
            reserved_bytes=self._cuda.memory_reserved(self._device),
        )

    def begin_step(self) -> None:
        """Reset the peaks of torch."""
        self._cuda.reset_peak_memory_stats(self._device)

    def end_step(self) -> tuple[int | None, int | None]:
        """Synchronise and return torch's peaks."""
        self._cuda.synchronize(self._device)
        return self._cuda.max_memory_allocated(self._device), self._cuda.max_memory_reserved(self._device)

    def counters(self) -> dict[str, int]:
        """Return ``num_alloc_retries`` and ``num_ooms``."""
        stats = self._cuda.memory_stats(self._device)
        return {name: int(stats.get(name, 0)) for name in ("num_alloc_retries", "num_ooms")}


class ProcessMeter:
    """The resident set of a process and, when asked for, of its children."""

    def __init__(self, pid: int | None = None, *, children: bool = False) -> None:
        self._pid, self._children = pid or os.getpid(), children
        self._page = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096

    def read(self, t: float) -> Sample:
        """Return the resident set."""
        return Sample(t=t, used_bytes=sum(self._resident(pid) for pid in self._pids()))

    def _pids(self) -> list[int]:
        if not self._children:
            return [self._pid]
        import psutil

        try:
            below = psutil.Process(self._pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [self._pid, *(child.pid for child in below)]

    def _resident(self, pid: int) -> int:
        try:
            return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * self._page
        except (OSError, IndexError):
            return _resident_elsewhere(pid)

    def begin_step(self) -> None:
        """Nothing to forget: the sampler keeps the peak of a step."""

    def end_step(self) -> tuple[int | None, int | None]:
        """No allocator is seen."""
        return None, None

    def counters(self) -> dict[str, int]:
        """Nothing is counted."""
        return {}


def _resident_elsewhere(pid: int) -> int:
    """Return the resident set where there is no /proc; 0 of a process that is gone."""
    try:
        import psutil

        return int(psutil.Process(pid).memory_info().rss)
    except Exception:  # gone, or psutil is not installed: a curve with a gap is better than no bench
        return 0


class NvmlMeter:
    """Devices of this host by NVML, without a CUDA context of our own; the sum over those asked for."""

    def __init__(self, indices: list[int] | None = None) -> None:
        import pynvml

        pynvml.nvmlInit()
        self._nvml = pynvml
        chosen = indices if indices is not None else list(range(pynvml.nvmlDeviceGetCount()))
        self._handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in chosen]

    def read(self, t: float) -> Sample:
        """Return what is used on all of them."""
        return Sample(t=t, used_bytes=sum(int(self._nvml.nvmlDeviceGetMemoryInfo(one).used) for one in self._handles))

    def begin_step(self) -> None:
        """Nothing to forget."""

    def end_step(self) -> tuple[int | None, int | None]:
        """No allocator is seen."""
        return None, None

    def counters(self) -> dict[str, int]:
        """Nothing is counted."""
        return {}


class Sampler:
    """A thread that reads a meter every ``interval`` seconds; use as a context manager."""

    def __init__(self, meter: Meter, *, interval: float = INTERVAL, clock: float | None = None) -> None:
        self.meter, self.interval = meter, interval
        self.start = time.perf_counter() if clock is None else clock
        self.samples: list[Sample] = []
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ullage-bench-sampler", daemon=True)

    def __enter__(self) -> Sampler:
        self.sample()
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        self.sample()

    def now(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self.start

    def sample(self) -> Sample:
        """Read once, now."""
        found = self.meter.read(round(self.now(), 4))
        self._peak = max(self._peak, found.used_bytes)
        if len(self.samples) < MAX_SAMPLES:
            self.samples.append(found)
        return found

    def take_peak(self) -> int:
        """Return the most used since the last call."""
        peak, self._peak = self._peak, 0
        return peak

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            self.sample()
