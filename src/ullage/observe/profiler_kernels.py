"""The kernels of a trace: time, copies, device utilisation, and compute density against the GPU's ridge."""

from __future__ import annotations

from collections.abc import Iterable

from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.observe.measured import Cell, Listing, ranked
from ullage.observe.profiler_memory import NOBODY, Owners
from ullage.observe.profiler_trace import Kernels, Trace
from ullage.observe.roofline import gpu_named, ridge_of
from ullage.spec.machine import Gpu


class Counted(Frozen):
    """Work summed up: of a kernel's name, an operator's or a phase."""

    flops: int = 0
    moved_bytes: int = 0
    time_us: float = 0.0
    count: int = 0
    dtypes: tuple[str, ...] = ()

    def plus(self, flops: int, moved_bytes: int, time_us: float, dtype: str) -> Counted:
        """Return the sum with one more operator."""
        dtypes = self.dtypes if dtype in self.dtypes else (*self.dtypes, dtype)
        return Counted(
            flops=self.flops + flops,
            moved_bytes=self.moved_bytes + moved_bytes,
            time_us=self.time_us + time_us,
            count=self.count + 1,
            dtypes=dtypes,
        )

    def density(self) -> float | None:
        """Return FLOPs per byte."""
        return self.flops / self.moved_bytes if self.moved_bytes else None


def gpu_of_trace(trace: Trace) -> tuple[str, int, Gpu | None]:
    """Return the first card of the trace: its name, its total in bytes (0: not recorded), and the catalogue's entry."""
    cards = trace.heads.get("deviceProperties")
    card = cards[0] if isinstance(cards, list) and cards and isinstance(cards[0], dict) else {}
    name, total = card.get("name"), card.get("totalGlobalMem")
    if not isinstance(name, str):
        return "", 0, None
    size = total if isinstance(total, int) and not isinstance(total, bool) and 0 < total < 1 << 60 else 0
    return name[:120], size, gpu_named(name[:120])


def union_us(spans: Iterable[tuple[float, float]]) -> float:
    """Return the time that is covered by at least one of the spans."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        if end > until:
            total += end - max(start, until)
            until = end
    return total


def busy_listing(trace: Trace) -> Listing:
    """Return per device the time in which a kernel or copy ran, and its share of the time that was recorded."""
    begin, end = span_of(trace)
    rows: list[tuple[Cell, ...]] = []
    for device in sorted({*trace.kernels.device, *trace.transfers.device}):
        spans = [*_spans(trace.kernels, device), *_spans(trace.transfers, device)]
        busy = union_us(spans)
        in_kernels = union_us(_spans(trace.kernels, device))
        rows.append((f"{device}", busy, in_kernels, busy / (end - begin) if end > begin else None, len(spans)))
    columns = ("device", "busy_us", "kernels_us", "busy_share", "count")
    return Listing(name="devices", title=_("Devices"), columns=columns, rows=tuple(rows))


def _spans(columns: Kernels, device: int) -> list[tuple[float, float]]:
    return [(columns.start[place], columns.end[place]) for place, each in enumerate(columns.device) if each == device]


def span_of(trace: Trace) -> tuple[float, float]:
    """Return when the first interval begins and the last one ends."""
    parts = [each for each in (trace.operators, trace.python, trace.kernels, trace.transfers) if len(each)]
    starts = [min(each.start) for each in parts]
    ends = [max(each.end) for each in parts]
    if len(trace.allocations):
        starts.append(min(trace.allocations.time))
        ends.append(max(trace.allocations.time))
    return (min(starts), max(ends)) if starts else (0.0, 0.0)


class Roofline:
    """Which kernels ran for the operators whose work is known, per kernel name, operator name and phase."""

    def __init__(self, trace: Trace, owners: Owners) -> None:
        self._trace, self._owners = trace, owners
        self.name, self.total_bytes, self.gpu = gpu_of_trace(trace)
        self.times, self.longest = self._times()
        self.by_kernel: dict[str, Counted] = {}
        self.by_operator: dict[str, Counted] = {}
        self.by_phase: dict[str, Counted] = {}
        for place, work in trace.work.items():
            length = trace.operators.end[place] - trace.operators.start[place]
            time = self.times.get(place, 0.0 if len(trace.kernels) else length)
            keys = [
                (self.by_operator, trace.names[trace.operators.name[place]]),
                (self.by_phase, owners.phase_of(place)),
            ]
            if place in self.longest:
                keys.append((self.by_kernel, trace.names[trace.kernels.name[self.longest[place]]]))
            for sums, key in keys:
                sums[key] = sums.get(key, Counted()).plus(work.flops, work.moved_bytes, time, work.dtype)

    def _times(self) -> tuple[dict[int, float], dict[int, int]]:
        """Return per operator of known work the time of its kernels, and the longest of them."""
        trace, kernels = self._trace, self._trace.kernels
        places = {key: place for place, key in enumerate(trace.operators.key) if key >= 0}
        times: dict[int, float] = {}
        longest: dict[int, int] = {}
        for kernel, key in enumerate(kernels.key):
            place = places.get(key, NOBODY)
            for _turn in range(200):
                if place == NOBODY or place in trace.work:
                    break
                place = self._owners.parent[place]
            if place == NOBODY or place not in trace.work:
                continue
            length = kernels.end[kernel] - kernels.start[kernel]
            times[place] = times.get(place, 0.0) + length
            best = longest.get(place)
            if best is None or length > kernels.end[best] - kernels.start[best]:
                longest[place] = kernel
        return times, longest

    def ridge(self, dtypes: tuple[str, ...]) -> float | None:
        """Return the card's ridge in the one number format of the work; None where it is mixed or not known."""
        return ridge_of(self.gpu, dtypes[0]) if len(dtypes) == 1 else None

    def row(self, name: str, counted: Counted) -> tuple[Cell, ...]:
        """Return (name, FLOPs, bytes, FLOPs per byte, ridge, what it waits for, FLOP/s, time, count)."""
        density, ridge = counted.density(), self.ridge(counted.dtypes)
        waits = "" if density is None or ridge is None else _("memory") if density < ridge else _("arithmetic")
        speed = counted.flops / counted.time_us * 1e6 if counted.time_us else None
        return (
            name, counted.flops, counted.moved_bytes, density, ridge, waits, speed, counted.time_us, counted.count,
        )  # fmt: skip

    def listing(self, name: str, title: str, first: str, sums: dict[str, Counted]) -> Listing:
        """Return one of the three sums as a table."""
        columns = (
            first, "work_flops", "moved_bytes", "compute_density", "ridge_density", "waits_for", "flops_per_s",
            "time_us", "count",
        )  # fmt: skip
        rows = ranked((self.row(key, counted) for key, counted in sums.items()), 1)
        return Listing(name=name, title=title, columns=columns, rows=rows)


def kernel_listing(trace: Trace) -> Listing:
    """Return time per kernel name."""
    columns = trace.kernels
    sums: dict[int, tuple[float, int]] = {}
    for place, name in enumerate(columns.name):
        time, count = sums.get(name, (0.0, 0))
        sums[name] = (time + columns.end[place] - columns.start[place], count + 1)
    whole = sum(time for time, _count in sums.values())
    rows = ranked(
        ((trace.names[name], time, time / whole if whole else None, count) for name, (time, count) in sums.items()), 1
    )
    return Listing(name="kernels", title=_("Kernels"), columns=("kernel", "time_us", "time_share", "count"), rows=rows)


def transfer_listing(trace: Trace, bandwidth: float | None) -> Listing:
    """Return bytes and speed per kind of copy, with the share of the card's bandwidth."""
    columns = trace.transfers
    sums: dict[int, tuple[int, float, int]] = {}
    for place, name in enumerate(columns.name):
        moved, time, count = sums.get(name, (0, 0.0, 0))
        length = columns.end[place] - columns.start[place]
        sums[name] = (moved + columns.moved[place], time + length, count + 1)
    rows: list[tuple[Cell, ...]] = []
    for name, (moved, time, count) in sums.items():
        speed = moved / time * 1e6 if time else None
        twice = 2 if "DtoD" in trace.names[name] else 1  # read and written on the same card
        on_card = "DtoD" in trace.names[name] or "Memset" in trace.names[name]
        share = twice * speed / bandwidth if speed and bandwidth and on_card else None
        rows.append((trace.names[name], moved, time, speed, share, count))
    names = ("copy", "moved_bytes", "time_us", "bytes_per_s", "bandwidth_share", "count")
    return Listing(name="copies", title=_("Copies"), columns=names, rows=ranked(rows, 1))
