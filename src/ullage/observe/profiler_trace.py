"""A trace of torch.profiler as columns: intervals of operators, allocations, kernels, copies.

Source: pytorch@2.13.0:torch/csrc/profiler/kineto_shim.cpp and the Chrome trace format: complete events (``ph`` X) with
``ts`` and ``dur`` in microseconds; instant events named ``[memory]`` whose arguments are Addr, Bytes, Device Type,
Device Id, Total Allocated, Total Reserved. About 60 bytes of memory per event are kept, whatever the event says.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

from ullage.observe.profiler_stream import Document
from ullage.observe.roofline import COUNTED, Work, work_of
from ullage.observe.streams import Readable

#: c10/core/DeviceType.h
DEVICE_TYPES = {0: "cpu", 1: "cuda", 6: "hip", 9: "xla", 12: "xpu", 13: "mps", 15: "hpu", 19: "mtia", 20: "npu"}
MAX_INTERVALS = 8_000_000
MAX_NAMES = 200_000
MAX_NAME = 240
_MAX_SIZE = 1 << 60
_INTERVALS = {"cpu_op": 0, "user_annotation": 1, "python_function": 2}
_TRANSFERS = ("gpu_memcpy", "gpu_memset")


class Columns:
    """Intervals of one kind: when, on which thread, and what."""

    def __init__(self) -> None:
        self.start, self.end = array("d"), array("d")
        self.name, self.thread = array("l"), array("l")
        self.key = array("q")  # operators: External id; -1 where there is none

    def __len__(self) -> int:
        return len(self.start)


class Kernels(Columns):
    """Kernels and copies on devices; ``moved`` is what a copy says it moved."""

    def __init__(self) -> None:
        super().__init__()
        self.device, self.moved = array("l"), array("q")


class Allocations:
    """``[memory]`` events; ``total`` is -1 where the recorder did not write it."""

    def __init__(self) -> None:
        self.time = array("d")
        self.thread, self.device = array("l"), array("l")
        self.address, self.bytes = array("Q"), array("q")
        self.total, self.reserved = array("q"), array("q")

    def __len__(self) -> int:
        return len(self.time)


class Trace:
    """All that is kept of a trace."""

    def __init__(self) -> None:
        self.operators = Columns()  # operators and annotations
        self.python = Columns()
        self.kernels, self.transfers = Kernels(), Kernels()
        self.allocations = Allocations()
        self.annotations: set[int] = set()  # places among the operators
        self.work: dict[int, Work] = {}  # by place among the operators
        self.names: list[str] = []
        self.threads: list[str] = []
        self.devices: list[tuple[int, int]] = []  # (type, index)
        self.heads: dict[str, Any] = {}
        self.num_events = 0
        self.num_dropped = 0
        self.truncated = False
        self._base: float | None = None
        self._name_ids: dict[str, int] = {}
        self._thread_ids: dict[str, int] = {}
        self._device_ids: dict[tuple[int, int], int] = {}

    def take(self, event: object) -> None:
        """Keep what matters of one event."""
        self.num_events += 1
        if not isinstance(event, dict):
            return
        kind, name = event.get("cat"), event.get("name")
        if name == "[memory]":
            self._allocation(event)
        elif event.get("ph") == "X" and isinstance(name, str) and isinstance(kind, str):
            if kind in _INTERVALS:
                self._interval(event, name, _INTERVALS[kind])
            elif kind == "kernel":
                self._kernel(event, name, self.kernels)
            elif kind in _TRANSFERS:
                self._kernel(event, name, self.transfers)

    def _moment(self, event: Mapping[str, Any]) -> float | None:
        """Return when an event was, in microseconds since the first one: differences of large numbers lose digits."""
        time = _real(event.get("ts"))
        if time is None:
            return None
        if self._base is None:
            self._base = time
        return time - self._base

    def _span(self, event: Mapping[str, Any], name: str, columns: Columns) -> Mapping[str, Any] | None:
        """Add when and where to ``columns``; return the arguments, None where the event is not usable."""
        start, length = self._moment(event), _real(event.get("dur", 0))
        if start is None or length is None or length < 0:
            return None
        if len(columns) >= MAX_INTERVALS:
            self.num_dropped += 1
            return None
        columns.start.append(start)
        columns.end.append(start + length)
        columns.name.append(self.name_id(name))
        columns.thread.append(self._thread(event))
        given = event.get("args")
        arguments = given if isinstance(given, dict) else {}
        columns.key.append(_whole(arguments.get("External id", arguments.get("external id")), -1))
        return arguments

    def _interval(self, event: Mapping[str, Any], name: str, kind: int) -> None:
        columns = self.python if kind == 2 else self.operators
        place = len(columns)
        arguments = self._span(event, name, columns)
        if arguments is None:
            return
        if kind == 1:
            self.annotations.add(place)
        elif name in COUNTED:
            dims, types = arguments.get("Input Dims"), arguments.get("Input type")
            work = work_of(name, dims, types, arguments.get("Concrete Inputs"))
            if work is not None:
                self.work[place] = work

    def _kernel(self, event: Mapping[str, Any], name: str, columns: Kernels) -> None:
        arguments = self._span(event, name, columns)
        if arguments is not None:
            columns.device.append(_whole(arguments.get("device"), -1, limit=1 << 30))
            columns.moved.append(_whole(arguments.get("bytes"), 0))

    def _allocation(self, event: Mapping[str, Any]) -> None:
        given, time = event.get("args"), self._moment(event)
        if not isinstance(given, dict) or time is None:
            return
        size = _whole(given.get("Bytes"), 0)
        if not size:
            return
        if len(self.allocations) >= MAX_INTERVALS:
            self.num_dropped += 1
            return
        kept = self.allocations
        kept.time.append(time)
        kept.thread.append(self._thread(event))
        index = _whole(given.get("Device Id"), -1, limit=1 << 16)
        kept.device.append(self._device((_whole(given.get("Device Type"), 0, limit=64), index)))
        kept.address.append(_address(given.get("Addr")))
        kept.bytes.append(size)
        kept.total.append(_whole(given.get("Total Allocated"), -1))
        kept.reserved.append(_whole(given.get("Total Reserved"), -1))

    def name_id(self, name: str) -> int:
        """Return the number of a name."""
        name = name[:MAX_NAME]
        known = self._name_ids.get(name)
        if known is None:
            if len(self.names) >= MAX_NAMES:
                name = "..."
                return self._name_ids.setdefault(name, 0)
            known = self._name_ids[name] = len(self.names)
            self.names.append(name)
        return known

    def _thread(self, event: Mapping[str, Any]) -> int:
        name = f"{event.get('pid')!s:.40}/{event.get('tid')!s:.40}"
        known = self._thread_ids.get(name)
        if known is None:
            if len(self.threads) >= MAX_NAMES:
                return 0
            known = self._thread_ids[name] = len(self.threads)
            self.threads.append(name)
        return known

    def _device(self, device: tuple[int, int]) -> int:
        known = self._device_ids.get(device)
        if known is None:
            if len(self.devices) >= 4096:
                return 0
            known = self._device_ids[device] = len(self.devices)
            self.devices.append(device)
        return known

    def device_name(self, number: int) -> str:
        """Return ``cuda:0`` or ``cpu``."""
        kind, index = self.devices[number]
        name = DEVICE_TYPES.get(kind, f"type{kind}")
        return name if index < 0 or kind == 0 else f"{name}:{index}"


def read_trace(stream: Readable) -> Trace:
    """Read a trace once.

    Raises:
        InputError: it is no JSON document.
    """
    trace, document = Trace(), Document(stream)
    for key, value in document.items("traceEvents"):
        if key == "traceEvents":
            trace.take(value)
        elif key == "deviceProperties":
            trace.heads[key] = value
    trace.truncated = document.truncated
    trace.num_dropped += document.num_broken
    return trace


def _real(value: object) -> float | None:
    """Return a finite number of microseconds; older recorders write some as strings."""
    if isinstance(value, str) and len(value) < 40:
        try:
            value = float(value)
        except ValueError:
            return None
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if -1e18 < value < 1e18 else None


def _whole(value: object, default: int, *, limit: int = _MAX_SIZE) -> int:
    if isinstance(value, str) and value.lstrip("-").isascii() and value.lstrip("-").isdigit() and len(value) < 20:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not -limit < value < limit:
        return default
    return value


def _address(value: object) -> int:
    if isinstance(value, str) and len(value) < 20:
        try:
            value = int(value, 0)
        except ValueError:
            return 0
    return value if isinstance(value, int) and 0 <= value < 1 << 64 else 0
