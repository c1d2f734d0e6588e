"""An export of Nsight Systems inspected: device memory, kernels and copies. It sees segments, not tensors."""

from __future__ import annotations

from heapq import merge
from pathlib import Path

from ullage.errors import InputError
from ullage.i18n import _
from ullage.ledger import Certainty, ranged
from ullage.observe.advice import Piece
from ullage.observe.inspection import Inspection
from ullage.observe.measured import Cell, Curve, Listing, Rise, Series, ranked, rise_of
from ullage.observe.nsys_memory import (
    MEMORY,
    Memory,
    Peak,
    Range,
    key_of,
    labels,
    open_ranges,
    ranges_of,
    strings,
    whole,
)
from ullage.observe.nsys_tables import Tables
from ullage.observe.roofline import gpu_named
from ullage.units import format_bytes

_KERNELS = "CUPTI_ACTIVITY_KIND_KERNEL"
_COPIES, _SETS = "CUPTI_ACTIVITY_KIND_MEMCPY", "CUPTI_ACTIVITY_KIND_MEMSET"
_KNOWN = (MEMORY, _KERNELS, _COPIES, _SETS, "NVTX_EVENTS", "TARGET_INFO_GPU", "StringIds")
#: Rows whose times are whole numbers in their order; SQLite would add up anything.
_SANE = 'typeof("start") = \'integer\' AND typeof("end") = \'integer\' AND "end" >= "start"'
_HOW = "nsys profile --trace=cuda,nvtx --cuda-memory-usage=true COMMAND"


def inspect_nsys(path: Path, device: int | None = None) -> Inspection:
    """Inspect a SQLite export of Nsight Systems.

    Raises:
        InputError: it is none, it is broken, or nothing in it is understood.
    """
    with Tables(path) as tables:
        if not any(tables.has(table) for table in _KNOWN[:5]):
            raise InputError(
                _("this SQLite file has none of the tables of an export of Nsight Systems"),
                where=str(path),
                remedy=_("looked for {tables}").format(tables=", ".join(_KNOWN[:5])),
            )
        return _inspect(tables, path, device)


def _inspect(tables: Tables, path: Path, device: int | None) -> Inspection:
    memory = Memory(tables)
    chosen = _choose(memory, device, path)
    peak = memory.peak(chosen) if chosen is not None else None
    card, total = _card(tables, chosen or 0)
    ranges = ranges_of(tables, memory.devices[chosen]) if chosen is not None else []
    rise = _rise(ranges)
    open_then = open_ranges(tables, peak.time_ns, peak.process) if peak else []
    listings = _listings(tables, memory, ranges, peak, card)
    stopped = tables.stopped
    return Inspection(
        kind="nsys",
        verdict=_verdict(chosen, peak, rise, listings),
        cause="leak" if rise else "none",
        confidence="likely" if rise else "certain",
        why=_why(open_then, rise),
        framework="nsys",
        sizes=_sizes(memory, chosen, peak, total),
        terms=tuple(
            ranged(
                kind.lower().replace(" ", "_"), size, low=size, high=size, formula=_("alive at the peak"),
                source=f"nsys, {MEMORY}", certainty=Certainty.MEASURED,
            )
            for kind, size in (peak.kinds if peak else ())
        ),
        total_bytes=peak.num_bytes if peak else 0,
        total_name=_("peak of the driver"),
        advice=_advice(memory, rise),
        partial=bool(stopped) or memory.cut or not memory.num_events,
        notes=_notes(memory, chosen, stopped, card),
        metrics=_metrics(listings),
        series=_series(memory),
        listings=listings,
    )  # fmt: skip


def _choose(memory: Memory, device: int | None, path: Path) -> int | None:
    """Return the device asked for, or the one whose peak is largest."""
    if device is not None and device not in memory.devices:
        raise InputError(
            _("there are no memory events of device {device} in it").format(device=device), where=str(path)
        )
    return (
        device if device is not None else max(memory.devices, key=lambda each: memory.devices[each].peak, default=None)
    )


def _card(tables: Tables, device: int) -> tuple[str, int]:
    """Return name and total of a CUDA device; TARGET_INFO_CUDA_DEVICE says which GPU it is."""
    gpu = device
    for number, place in tables.rows("TARGET_INFO_CUDA_DEVICE", ("cudaId", "gpuId")):
        if whole(number) == device and whole(place) is not None:
            gpu = whole(place) or 0
    for number, name, total in tables.rows("TARGET_INFO_GPU", ("id", "name", "totalMemory")):
        if whole(number) == gpu:
            return (name[:120] if isinstance(name, str) else ""), max(0, whole(total) or 0)
    return "", 0


def _rise(ranges: list[Range]) -> Rise | None:
    """Return how memory rises from turn to turn of the range that takes most time among those that recur."""
    for each in ranges:
        if each.count >= 5:
            return rise_of([(float(turn), end) for turn, end in enumerate(each.ends)])
    return None


def _verdict(device: int | None, peak: Peak | None, rise: Rise | None, listings: tuple[Listing, ...]) -> str:
    if peak is None:
        count = sum(len(each.rows) for each in listings if each.name == "kernels")
        return _("an export without memory events: {count:,} kinds of kernels").format(count=count)
    size = format_bytes(peak.num_bytes)
    if rise is not None:
        return _("device {device}: memory grows by {size} per turn; peak {peak} asked of the driver").format(
            device=device, size=format_bytes(rise.per_x), peak=size
        )
    return _("device {device}: peak {peak} asked of the driver").format(device=device, peak=size)


def _why(open_then: list[str], rise: Rise | None) -> str:
    parts = [_("the peak was reached in {names}").format(names=" > ".join(open_then[-6:]))] if open_then else []
    if rise is not None:
        parts.append(_("the floor rises by {size} over the turns").format(size=format_bytes(rise.total)))
    return "; ".join(parts)


def _sizes(memory: Memory, device: int | None, peak: Peak | None, total: int) -> tuple[tuple[str, int], ...]:
    sizes = {"capacity": total} if total else {}
    if peak is not None and device is not None:
        events = memory.devices[device]
        sizes["peak_driver"] = peak.num_bytes
        sizes["left_at_end"] = events.total
        if events.pool_peak:
            sizes["peak_async_pool"] = events.pool_peak
    if memory.host_peak:
        sizes["peak_host_pinned"] = memory.host_peak
    return tuple(sizes.items())


def _advice(memory: Memory, rise: Rise | None) -> tuple[Piece, ...]:
    if not memory.num_events:
        return (Piece(change=_("record again with memory events"), flags=_HOW, cost=_("some run time")),)
    if rise is not None:
        change = _("record a memory snapshot of PyTorch: it names the tensors, and who keeps them")
        return (Piece(change=change, flags="torch.cuda.memory._record_memory_history()", gain_bytes=rise.total),)
    return ()


def _notes(memory: Memory, device: int | None, stopped: str, card: str) -> tuple[str, ...]:
    notes = [card] if card else []
    if stopped:
        notes.append(_("reading ended early ({reason}): this is a partial answer").format(reason=stopped))
    if memory.cut:
        notes.append(
            _("only the first {count:,} memory events were read: this is a partial answer").format(
                count=memory.num_events
            )
        )
    if device is None:
        notes.append(_("there are no memory events in it (--cuda-memory-usage was off): a partial answer"))
        return tuple(notes)
    notes.append(
        _(
            "what is seen is what the driver was asked for: under PyTorch these are segments of its pool, not tensors; "
            "the CUDA context and memory taken before the recording are not in it"
        )
    )
    unknown = memory.devices[device].num_unknown_frees
    if unknown:
        notes.append(_("{count:,} frees are of memory allocated before the recording").format(count=unknown))
    return tuple(notes)


def _metrics(listings: tuple[Listing, ...]) -> tuple[tuple[str, float], ...]:
    devices = next((each for each in listings if each.name == "devices"), None)
    shares = [row[3] for row in devices.rows if isinstance(row[3], float)] if devices else []
    return (("busy_share", max(shares)),) if shares else ()


def _series(memory: Memory) -> tuple[Series, ...]:
    begin = min((events.times[0] for events in memory.devices.values()), default=0)
    found = []
    for device, events in sorted(memory.devices.items()):
        curve = Curve()
        for time, total in zip(events.times, events.totals, strict=True):
            curve.add((time - begin) / 1e9, total)
        found.append(curve.series(f"device {device} driver_bytes"))
    return tuple(found)


def _listings(tables: Tables, memory: Memory, ranges: list[Range], peak: Peak | None, card: str) -> tuple[Listing, ...]:
    devices: list[tuple[Cell, ...]] = []
    for device, events in sorted(memory.devices.items()):
        devices.append((f"{device}", events.peak, events.total, len(events.times)))
    names: tuple[str, ...] = ("device", "peak_bytes", "end_bytes", "count")
    found = [Listing(name="memory", title=_("Memory asked of the driver"), columns=names, rows=tuple(devices))]
    if peak is not None:
        rows: list[tuple[Cell, ...]] = [(format_bytes(size), size, size * count, count) for size, count in peak.sizes]
        names = ("block", "each_bytes", "alive_at_peak_bytes", "count")
        found.append(Listing(name="blocks", title=_("Alive at the peak"), columns=names, rows=ranked(rows, 2)))
    cells: list[tuple[Cell, ...]] = [
        (each.name, each.time_ns / 1e3, each.peak_bytes, each.growth_bytes, each.count) for each in ranges
    ]
    names = ("range", "time_us", "peak_bytes", "growth_bytes", "count")
    found.append(Listing(name="ranges", title=_("NVTX ranges"), columns=names, rows=ranked(cells, 1)))
    found += [_busy(tables), _kernels(tables), _copies(tables, card)]
    return tuple(each for each in found if each.rows)


def _kernels(tables: Tables) -> Listing:
    """Return time per kernel name."""
    column = next((each for each in ("demangledName", "shortName", "name") if tables.has(_KERNELS, each)), "")
    sums: dict[str, tuple[int, int]] = {}
    if column and tables.has(_KERNELS, "start", "end"):
        names = strings(tables)
        chosen = (column, 'total("end" - "start")', "count(*)")
        for key, time, count in tables.rows(_KERNELS, chosen, group=column, where=_SANE):
            name = key[:240] if isinstance(key, str) else names.get(key_of(key), "?")
            known = sums.get(name, (0, 0))
            sums[name] = (known[0] + (whole(time) or 0), known[1] + (whole(count) or 0))
    overall = sum(time for time, _count in sums.values())
    rows: list[tuple[Cell, ...]] = [
        (name, time / 1e3, time / overall if overall else None, count) for name, (time, count) in sums.items()
    ]
    columns = ("kernel", "time_us", "time_share", "count")
    return Listing(name="kernels", title=_("Kernels"), columns=columns, rows=ranked(rows, 1))


def _copies(tables: Tables, card: str) -> Listing:
    """Return bytes and speed per kind of copy."""
    gpu = gpu_named(card) if card else None
    bandwidth = gpu.bandwidth_bytes_per_s if gpu else None
    kinds = labels(tables, "ENUM_CUDA_MEMCPY_OPER")
    rows: list[tuple[Cell, ...]] = []
    for table, group in ((_COPIES, "copyKind"), (_SETS, "memKind")):
        if not tables.has(table, "start", "end", "bytes", group):
            continue
        chosen = (group, 'total("bytes")', 'total("end" - "start")', "count(*)")
        for kind, size, time, count in tables.rows(table, chosen, group=group, where=_SANE):
            number, moved, length = whole(kind) or 0, whole(size) or 0, whole(time) or 0
            name = "Memset" if table == _SETS else kinds.get(number) or f"copyKind {number}"
            within = table == _SETS or (number == 8 if not kinds else "device-to-device" in name.lower())
            speed = moved / length * 1e9 if length else None
            passes = 1 if table == _SETS else 2  # a copy on the card is read and written
            share = passes * speed / bandwidth if speed and bandwidth and within else None
            rows.append((name, moved, length / 1e3, speed, share, whole(count)))
    columns = ("copy", "moved_bytes", "time_us", "bytes_per_s", "bandwidth_share", "count")
    return Listing(name="copies", title=_("Copies"), columns=columns, rows=ranked(rows, 1))


def _busy(tables: Tables) -> Listing:
    """Return per device the time in which a kernel, copy or memset ran, and its share of what was recorded."""
    covered: dict[int, int] = {}
    first: dict[int, int] = {}
    until: dict[int, int] = {}
    parts = [
        tables.rows(table, ("start", "end", "deviceId"), where=_SANE, order="start")
        for table in (_KERNELS, _COPIES, _SETS)
        if tables.has(table, "start", "end")
    ]
    for row in merge(*parts, key=lambda row: whole(row[0]) or 0):
        begin, stop, device = whole(row[0]), whole(row[1]), whole(row[2]) or 0
        if begin is None or stop is None:
            continue
        first.setdefault(device, begin)
        last = until.get(device, begin)
        if stop > last:
            covered[device] = covered.get(device, 0) + stop - max(begin, last)
            until[device] = stop
    rows: list[tuple[Cell, ...]] = []
    for device, start in sorted(first.items()):
        whole_time = until.get(device, start) - start
        busy = covered.get(device, 0)
        rows.append((f"{device}", busy / 1e3, whole_time / 1e3, busy / whole_time if whole_time else None))
    columns = ("device", "busy_us", "from_first_to_last_us", "busy_share")
    return Listing(name="devices", title=_("Devices"), columns=columns, rows=tuple(rows))
