"""What is watched: devices with a total, and at a moment how much of each is used and by whom."""

from __future__ import annotations

from dataclasses import dataclass

#: Index of the host's memory among the devices: real devices count from 0.
HOST = -1


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU, or the host's memory (index -1, or the cgroup's limit where that is lower)."""

    index: int
    name: str
    total_bytes: int
    kind: str = "gpu"
    uuid: str = ""


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process and the memory it holds on one device."""

    pid: int
    used_bytes: int
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Counters:
    """PyTorch's counters of one process on one device, as its exporter wrote them."""

    pid: int
    device: int
    rank: int
    age_seconds: float
    allocated_bytes: int
    reserved_bytes: int
    peak_allocated_bytes: int = 0
    peak_reserved_bytes: int = 0
    num_alloc_retries: int = 0
    num_ooms: int = 0
    step: int = -1


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One device at one moment. Zero counters stand for "no exporter"; see ``counters``."""

    device: Device
    used_bytes: int
    processes: tuple[Process, ...] = ()
    counters: tuple[Counters, ...] = ()
    error: str = ""

    @property
    def share(self) -> float:
        """The used share of the device."""
        return self.used_bytes / self.device.total_bytes if self.device.total_bytes else 0.0

    def _sum(self, name: str) -> int | None:
        return sum(getattr(each, name) for each in self.counters) if self.counters else None

    @property
    def allocated_bytes(self) -> int | None:
        """What PyTorch's tensors hold, over the processes that export it."""
        return self._sum("allocated_bytes")

    @property
    def reserved_bytes(self) -> int | None:
        """What PyTorch's allocators hold, over the processes that export it."""
        return self._sum("reserved_bytes")

    @property
    def num_alloc_retries(self) -> int | None:
        """How often an allocator had to empty its cache."""
        return self._sum("num_alloc_retries")

    @property
    def num_ooms(self) -> int | None:
        """How often an allocation failed."""
        return self._sum("num_ooms")
