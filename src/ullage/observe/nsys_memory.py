"""Device memory in an export of Nsight Systems: what the driver was asked for, the peak, and what was open then.

Source: the schema that is documented with the tool (docs.nvidia.com/nsight-systems, "SQLite Schema Reference"):
CUDA_GPU_MEMORY_USAGE_EVENTS (start, globalPid, deviceId, contextId, address, bytes, memKind, memoryOperationType, ...),
ENUM_CUDA_MEM_KIND, ENUM_CUDA_DEV_MEM_EVENT_OPER, NVTX_EVENTS (start, end, eventType, text, textId, globalTid).
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right

from ullage.frozen import Frozen
from ullage.observe.nsys_tables import Tables, Value

MEMORY = "CUDA_GPU_MEMORY_USAGE_EVENTS"
#: As exported without the ENUM tables: the first two lie on the host.
_KINDS = ("Pageable", "Pinned", "Device", "Array", "Managed", "Device Static", "Managed Static", "Unknown")
_HOST = ("pageable", "pinned")
_FREE = 1
_MAX_EVENTS = 1_000_000
_MAX_RANGES = 200_000
_DIGITS = re.compile(r"\d+")
_PID_SHIFT = 24  # globalTid and globalPid: the process stands above the thread
_LIMIT = 1 << 60


class Peak(Frozen):
    """The largest total of one device."""

    num_bytes: int
    time_ns: int
    process: int
    kinds: tuple[tuple[str, int], ...]
    sizes: tuple[tuple[int, int], ...]


class DeviceEvents:
    """Allocations and frees of one device in time."""

    def __init__(self) -> None:
        self.live: dict[tuple[int, int, int], tuple[int, str]] = {}
        self.times: list[int] = []
        self.totals: list[int] = []
        self.total = 0
        self.peak = self.peak_at = -1
        self.num_unknown_frees = 0
        self.pool_peak = 0

    def take(self, time: int, key: tuple[int, int, int], size: int, kind: str, *, freed: bool) -> None:
        """Count one event; a free takes back what was allocated at its address."""
        known = self.live.pop(key, None)
        if known is not None:
            self.total -= known[0]
        elif freed:
            self.num_unknown_frees += 1
        if not freed:
            self.live[key] = (size, kind)
            self.total += size
        self.times.append(time)
        self.totals.append(self.total)
        if self.total > self.peak:
            self.peak, self.peak_at = self.total, len(self.times) - 1


class Memory:
    """The memory events of an export, by device."""

    def __init__(self, tables: Tables) -> None:
        self.devices: dict[int, DeviceEvents] = {}
        self.num_events = 0
        self.cut = False
        self.host_peak = 0
        self._host = DeviceEvents()
        kinds = labels(tables, "ENUM_CUDA_MEM_KIND")
        operations = labels(tables, "ENUM_CUDA_DEV_MEM_EVENT_OPER")
        self._rows: list[tuple[int, int, tuple[int, int, int], int, str, bool]] = []
        columns = (
            "start", "deviceId", "globalPid", "contextId", "address", "bytes", "memKind", "memoryOperationType",
            "localMemoryPoolSize",
        )  # fmt: skip
        for row in tables.rows(MEMORY, columns, order="start"):
            time, size = whole(row[0]), whole(row[5])
            if time is None or size is None or size < 0:
                continue
            if self.num_events >= _MAX_EVENTS:
                self.cut = True
                break
            self.num_events += 1
            kind = _kind(row[6], kinds)
            operation = operations.get(whole(row[7]) or 0, "")
            freed = "dealloc" in operation.lower() or "free" in operation.lower() if operation else row[7] == _FREE
            device = whole(row[1]) or 0
            on_host = kind.lower() in _HOST
            events = self._host if on_host else self.devices.setdefault(device, DeviceEvents())
            key = (whole(row[2]) or 0, whole(row[3]) or 0, whole(row[4], 1 << 64) or 0)
            events.take(time, key, size, kind, freed=freed)
            events.pool_peak = max(events.pool_peak, whole(row[8]) or 0)
            if not on_host:
                self._rows.append((time, device, key, size, kind, freed))
        self.host_peak = max(0, self._host.peak)

    def peak(self, device: int) -> Peak:
        """Return the peak of a device, with what was alive then."""
        events = self.devices[device]
        live: dict[tuple[int, int, int], tuple[int, str]] = {}
        count, process = 0, 0
        for _time, each, key, size, kind, freed in self._rows:
            if each != device:
                continue
            live.pop(key, None)
            if not freed:
                live[key] = (size, kind)
            if count == events.peak_at:
                process = key[0]
                break
            count += 1
        kinds: dict[str, int] = {}
        sizes: dict[int, int] = {}
        for size, kind in live.values():
            kinds[kind] = kinds.get(kind, 0) + size
            sizes[size] = sizes.get(size, 0) + 1
        return Peak(
            num_bytes=max(0, events.peak),
            time_ns=events.times[events.peak_at],
            process=process,
            kinds=tuple(sorted(kinds.items(), key=lambda pair: -pair[1])),
            sizes=tuple(sorted(sizes.items(), key=lambda pair: -pair[0] * pair[1])),
        )


class Range(Frozen):
    """NVTX ranges of one name: digits of the names are ``#``."""

    name: str
    count: int
    time_ns: int
    peak_bytes: int
    growth_bytes: int
    ends: tuple[int, ...]


def ranges_of(tables: Tables, events: DeviceEvents) -> list[Range]:
    """Return the NVTX ranges by name, the longest first, with the peak within them and what they left behind."""
    spans: dict[str, list[tuple[int, int]]] = {}
    names = strings(tables)
    columns = ("start", "end", "text", "textId")
    for number, (start, end, text, key) in enumerate(tables.rows("NVTX_EVENTS", columns, order="start")):
        begin, stop = whole(start), whole(end)
        if number >= _MAX_RANGES:
            break
        if begin is None or stop is None or stop < begin:
            continue
        name = text if isinstance(text, str) and text else names.get(key_of(key), "")
        if name:
            spans.setdefault(_DIGITS.sub("#", name[:200]), []).append((begin, stop))
    largest = _Largest(events.totals)
    found = []
    for name, pairs in spans.items():
        peaks, growth, ends = [0], 0, []
        for begin, stop in pairs:
            first, last = bisect_left(events.times, begin), bisect_right(events.times, stop)
            before = events.totals[first - 1] if first else 0
            after = events.totals[last - 1] if last else 0
            peaks.append(max(before, largest.of(first, last)))
            growth += after - before
            ends.append(after)
        time = sum(stop - begin for begin, stop in pairs)
        found.append(
            Range(
                name=name, count=len(pairs), time_ns=time, peak_bytes=max(peaks), growth_bytes=growth, ends=tuple(ends)
            )
        )
    return sorted(found, key=lambda each: (-each.time_ns, each.name))


class _Largest:
    """The largest of any stretch of a list: maxima of stretches whose lengths are powers of two."""

    def __init__(self, values: list[int]) -> None:
        self._levels = [values]
        width = 1
        while 2 * width <= len(values):
            below = self._levels[-1]
            self._levels.append([max(below[at], below[at + width]) for at in range(len(below) - width)])
            width *= 2

    def of(self, first: int, last: int) -> int:
        """Return the largest of values ``first`` to ``last`` (not included), 0 of none."""
        if last <= first:
            return 0
        level = min((last - first).bit_length() - 1, len(self._levels) - 1)
        row = self._levels[level]
        return max(row[first], row[last - (1 << level)])


def open_ranges(tables: Tables, time_ns: int, process: int) -> list[str]:
    """Return the NVTX ranges of a process that are open at a moment, the outermost first."""
    names = strings(tables)
    columns = ("start", "end", "text", "textId", "globalTid")
    found: list[str] = []
    where = f'"start" <= {int(time_ns)} AND "end" >= {int(time_ns)}'
    if not tables.has("NVTX_EVENTS", "start", "end"):
        return []
    for _start, _end, text, key, thread in tables.rows("NVTX_EVENTS", columns, order="start", where=where):
        owner = whole(thread, 1 << 64)
        if owner is not None and process and owner >> _PID_SHIFT != process >> _PID_SHIFT:
            continue
        name = text if isinstance(text, str) and text else names.get(key_of(key), "")
        if name and len(found) < 50:
            found.append(name[:120])
    return found


def labels(tables: Tables, table: str) -> dict[int, str]:
    """Return the labels of an ENUM table by number."""
    found: dict[int, str] = {}
    for number, name, label in tables.rows(table, ("id", "name", "label")):
        key, words = whole(number), label if isinstance(label, str) and label else name
        if key is not None and isinstance(words, str) and len(found) < 1000:
            found[key] = words[:80]
    return found


def strings(tables: Tables) -> dict[int, str]:
    """Return the strings of the export by number; the beginning of each, and of at most a million."""
    found: dict[int, str] = {}
    for number, words in tables.rows("StringIds", ("id", "value")):
        key = whole(number)
        if key is not None and isinstance(words, str) and len(found) < 1_000_000:
            found[key] = words[:240]
    return found


def whole(value: Value, limit: int = _LIMIT) -> int | None:
    """Return a whole number of a sane size, None for anything else: SQLite keeps any type in any column."""
    if isinstance(value, float) and value.is_integer() and abs(value) < limit:
        return int(value)
    return value if isinstance(value, int) and abs(value) < limit else None


def key_of(value: Value) -> int:
    """Return the number of a string, -1 for none."""
    number = whole(value)
    return -1 if number is None else number


def _kind(value: Value, kinds: dict[int, str]) -> str:
    number = whole(value)
    if number is None:
        return "Device"
    return kinds.get(number) or (_KINDS[number] if 0 <= number < len(_KINDS) else f"kind {number}")
