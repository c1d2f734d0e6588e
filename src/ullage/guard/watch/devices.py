"""The GPUs of this machine through NVML (package ``nvidia-ml-py``, extra ``gpu``); nothing where there is none.

NVML's ``used`` is what the driver has handed out, by all processes and the driver itself; ``memory.utilization`` of
NVML is a bandwidth duty cycle and is not read. Per-process figures are missing in many containers and under MIG.
Source: nvidia-ml-py@12.535:pynvml.py:nvmlDeviceGetMemoryInfo, nvmlDeviceGetComputeRunningProcesses.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from ullage.guard.watch.sample import Device, Process, Sample
from ullage.i18n import _


class Nvml:
    """An open NVML, or none: ``why`` says what is missing."""

    def __init__(self) -> None:
        self.why = ""
        self._library: Any = None
        self._handles: list[tuple[Device, Any]] = []
        try:
            import pynvml
        except ImportError:
            self.why = _("the package nvidia-ml-py is not installed (pip install 'ullage[gpu]')")
            return
        try:
            pynvml.nvmlInit()
            self._library = pynvml
            self._handles = [self._open(index) for index in range(int(pynvml.nvmlDeviceGetCount()))]
        except pynvml.NVMLError as error:
            self.why = _("NVML does not answer: {why}").format(why=error)

    def _open(self, index: int) -> tuple[Device, Any]:
        handle = self._library.nvmlDeviceGetHandleByIndex(index)
        total = int(self._library.nvmlDeviceGetMemoryInfo(handle).total)
        name, uuid = _text(self._library.nvmlDeviceGetName(handle)), ""
        with suppress(self._library.NVMLError):
            uuid = _text(self._library.nvmlDeviceGetUUID(handle))
        return Device(index=index, name=name, total_bytes=total, uuid=uuid), handle

    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices, by index."""
        return tuple(device for device, _handle in self._handles)

    def samples(self) -> list[Sample]:
        """Return what is used now; a device that does not answer says so in ``error``."""
        return [self._sample(device, handle) for device, handle in self._handles]

    def _sample(self, device: Device, handle: Any) -> Sample:
        try:
            used = int(self._library.nvmlDeviceGetMemoryInfo(handle).used)
        except self._library.NVMLError as error:
            return Sample(device=device, used_bytes=0, error=str(error))
        found: dict[int, int] = {}
        for name in ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"):
            with suppress(self._library.NVMLError, AttributeError):
                for each in getattr(self._library, name)(handle):
                    found[int(each.pid)] = max(found.get(int(each.pid), 0), int(each.usedGpuMemory or 0))
        processes = tuple(Process(pid=pid, used_bytes=amount, name=_name(pid)) for pid, amount in found.items())
        return Sample(device=device, used_bytes=used, processes=_sorted(processes))

    def close(self) -> None:
        """Close NVML."""
        if self._library is not None:
            with suppress(self._library.NVMLError):
                self._library.nvmlShutdown()
            self._library, self._handles = None, []


def _text(value: Any) -> str:
    """Return a name: older versions give bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _sorted(processes: tuple[Process, ...]) -> tuple[Process, ...]:
    return tuple(sorted(processes, key=lambda each: -each.used_bytes))


def _name(pid: int) -> str:
    from ullage.guard.watch.host import process_name

    return process_name(pid)


def gpu_names() -> tuple[str, ...]:
    """Return the names of this machine's GPUs, none where NVML does not tell."""
    nvml = Nvml()
    try:
        return tuple(device.name for device in nvml.devices)
    finally:
        nvml.close()
