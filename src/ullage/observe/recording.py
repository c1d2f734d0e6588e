"""Recordings of ``ullage watch``: lines of JSON, one sample of one device each, read in bounded memory.

The first line is ``{"ullage_recording": 1, "started", "host", "devices": [{"index", "name", "total_bytes"}]}``; then
follow samples ``{"t", "device", "used_bytes", "allocated_bytes"?, "reserved_bytes"?, "num_alloc_retries"?,
"num_ooms"?, "processes"?: [{"pid", "used_bytes"}]}`` and events ``{"t", "event", "text"}``. ``t`` is seconds since the
start.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ullage.errors import InputError
from ullage.i18n import _
from ullage.ledger import Certainty, Term, ranged
from ullage.observe.advice import Piece
from ullage.observe.inspection import Inspection
from ullage.observe.measured import Cell, Curve, Listing, Rise, Series, ranked, rise_of
from ullage.observe.streams import Readable
from ullage.units import format_bytes

VERSION = 1
MAX_LINE_BYTES = 1 << 20
MAX_DEVICES = 1024
MAX_EVENTS = 200
MAX_PROCESSES = 10_000
#: A device that comes nearer to its total than this is close to the edge.
EDGE_SHARE = 0.95
_BLOCK_BYTES = 1 << 20
_MAX_SIZE = 1 << 60
_SOURCE = "ullage watch"
_AMOUNTS = ("used_bytes", "reserved_bytes", "allocated_bytes")
_COUNTS = ("num_alloc_retries", "num_ooms")


class Device:
    """What was recorded of one device."""

    def __init__(self, index: int, name: str = "", total_bytes: int = 0, *, on_host: bool = False) -> None:
        self.index, self.name, self.total_bytes, self.on_host = index, name, total_bytes, on_host
        self.curves = {amount: Curve() for amount in _AMOUNTS}
        self.counts = dict.fromkeys(_COUNTS, 0)
        self.at_peak: dict[str, int] = {}
        self.processes: dict[int, int] = {}
        self.num_samples = 0

    def take(self, moment: float, sample: Mapping[str, Any]) -> None:
        """Take a sample."""
        self.num_samples += 1
        before = self.curves["used_bytes"].peak
        for amount in _AMOUNTS:
            size = _whole(sample.get(amount))
            if size is not None:
                self.curves[amount].add(moment, size)
        if self.curves["used_bytes"].peak != before:
            self.at_peak = {amount: size for amount in _AMOUNTS if (size := _whole(sample.get(amount))) is not None}
        for count in _COUNTS:  # counters of the process; it may have been started anew
            self.counts[count] = max(self.counts[count], _whole(sample.get(count)) or 0)
        processes = sample.get("processes")
        for each in processes[:1000] if isinstance(processes, list) else ():
            number, size = (
                (_whole(each.get(key)) for key in ("pid", "used_bytes")) if isinstance(each, dict) else (0, 0)
            )
            if number and size is not None and (number in self.processes or len(self.processes) < MAX_PROCESSES):
                self.processes[number] = max(self.processes.get(number, 0), size)

    def label(self) -> str:
        """Return what to call it."""
        return _("host memory") if self.on_host else _("device {device}").format(device=self.index)

    def peak(self, amount: str) -> int:
        """Return the largest value of an amount, 0 where it was not recorded."""
        found = self.curves[amount].peak
        return found[1] if found else 0

    def peak_time(self) -> float:
        """Return when the most was in use."""
        found = self.curves["used_bytes"].peak
        return found[0] if found else 0.0

    def rise(self) -> Rise | None:
        """Return how the floor rises: of what is allocated where it was recorded, else of what is used."""
        amount = "allocated_bytes" if self.curves["allocated_bytes"].count else "used_bytes"
        return rise_of(self.curves[amount].points())


class Recording:
    """A recording as it was read."""

    def __init__(self) -> None:
        self.head: dict[str, Any] = {}
        self.devices: dict[int, Device] = {}
        self.events: list[tuple[float, str, str]] = []
        self.num_events = 0
        self.num_samples = 0
        self.num_broken = 0
        self.seconds = 0.0

    def take(self, line: Mapping[str, Any]) -> bool:
        """Take a line; False when it is neither a sample nor an event."""
        moment = line.get("t")
        if not isinstance(moment, int | float) or isinstance(moment, bool) or not 0 <= moment < 1e12:
            return False
        self.seconds = max(self.seconds, float(moment))
        if isinstance(line.get("event"), str):
            self.num_events += 1
            if len(self.events) < MAX_EVENTS:
                text = line.get("text")
                self.events.append((float(moment), line["event"][:80], text[:240] if isinstance(text, str) else ""))
            return True
        index = _whole(line.get("device"))
        if index is None or not any(_whole(line.get(amount)) is not None for amount in _AMOUNTS):
            return False
        if index not in self.devices and len(self.devices) >= MAX_DEVICES:
            return False
        self.num_samples += 1
        self.devices.setdefault(index, Device(index)).take(float(moment), line)
        return True


def read_recording(stream: Readable, where: str = "") -> Recording:
    """Read a recording once.

    Raises:
        InputError: it is none, or of a newer version.
    """
    found = Recording()
    for number, raw in enumerate(_lines(stream)):
        line = _parse(raw)
        if number == 0:
            _open(found, line, where)
        elif raw.strip() and (line is None or not found.take(line)):
            found.num_broken += 1
    if not found.head:
        raise InputError(_("this is no recording of ullage watch"), where=where)
    return found


def _open(found: Recording, head: dict[str, Any] | None, where: str) -> None:
    version = _whole((head or {}).get("ullage_recording"))
    if head is None or version is None:
        raise InputError(_("this is no recording of ullage watch"), where=where)
    if version > VERSION:
        raise InputError(
            _("recording of version {version}").format(version=version),
            where=where,
            remedy=_("this ullage reads version {known}; install a newer one").format(known=VERSION),
        )
    found.head = head
    devices = head.get("devices")
    for each in devices[:MAX_DEVICES] if isinstance(devices, list) else ():
        if isinstance(each, dict) and (index := _whole(each.get("index"))) is not None:
            name = each.get("name")
            total = _whole(each.get("total_bytes")) or 0
            words, on_host = name[:120] if isinstance(name, str) else "", each.get("kind") == "host"
            found.devices[index] = Device(index, words, total, on_host=on_host)


def _lines(stream: Readable) -> Iterator[bytes]:
    """Yield lines; one that is too long is cut, and then is no JSON."""
    rest = b""
    while True:
        try:
            block = stream.read(_BLOCK_BYTES)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise InputError(_("cannot read on: {reason}").format(reason=reason)) from None
        if not block:
            break
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
        rest = rest[: MAX_LINE_BYTES + 1]
    if rest:
        yield rest


def _parse(raw: bytes) -> dict[str, Any] | None:
    if len(raw) > MAX_LINE_BYTES:
        return None
    try:
        line = json.loads(raw.decode("utf-8-sig", "replace"))
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_SIZE else None


def inspect_recording(stream: Readable, where: str = "", device: int | None = None) -> Inspection:
    """Inspect a recording: peak, growth, retries, and who held the memory.

    Raises:
        InputError: it is none, or it holds no sample.
    """
    found = read_recording(stream, where)
    sampled = [each for each in found.devices.values() if each.num_samples and device in (None, each.index)]
    if not sampled:
        raise InputError(_("there are no samples in this recording"), where=where)
    fullest = max(sampled, key=_fullness)
    rise = fullest.rise()
    ooms = sum(each.counts["num_ooms"] for each in sampled)
    return Inspection(
        kind="recording",
        verdict=_verdict(fullest, rise, ooms),
        cause="capacity" if ooms else "leak" if rise else "none",
        confidence="unsure" if ooms else "likely" if rise else "certain",
        why=_why(fullest, rise, ooms),
        framework="ullage",
        sizes=_sizes(fullest),
        terms=_terms(fullest),
        total_bytes=fullest.total_bytes,
        advice=_advice(fullest, rise, ooms),
        partial=found.num_broken > 0,
        notes=_notes(found, sampled),
        metrics=_metrics(fullest),
        series=_series(sampled),
        listings=_listings(found, sampled, fullest),
        num_lines=1 + found.num_samples + found.num_events + found.num_broken,
    )


def _fullness(device: Device) -> tuple[bool, float, int]:
    """Return how full a device was; the host's memory counts only where nothing else was recorded."""
    peak = device.peak("used_bytes") or device.peak("reserved_bytes")
    return (not device.on_host, peak / device.total_bytes if device.total_bytes else 0.0, peak)


def _verdict(device: Device, rise: Rise | None, ooms: int) -> str:
    peak = format_bytes(device.peak("used_bytes") or device.peak("reserved_bytes"))
    if device.total_bytes:
        peak = _("{peak} of {total}").format(peak=peak, total=format_bytes(device.total_bytes))
    words = (
        _("{device}: {count:,} allocations were refused; peak {peak}")
        if ooms
        else _("{device}: memory grows by {rate} per hour; peak {peak}")
        if rise
        else _("{device}: peak {peak}")
    )
    rate = format_bytes(rise.per_x * 3600) if rise else ""
    return words.format(device=device.label(), count=ooms, peak=peak, rate=rate)


def _why(device: Device, rise: Rise | None, ooms: int) -> str:
    parts = [_("the peak came {seconds:,.1f} s after the start").format(seconds=device.peak_time())]
    if rise is not None:
        parts.append(_("the floor rose by {size}").format(size=format_bytes(rise.total)))
    if ooms:
        parts.append(_("the job's log says more about what was refused"))
    return "; ".join(parts)


def _sizes(device: Device) -> tuple[tuple[str, int], ...]:
    sizes = {"capacity": device.total_bytes} if device.total_bytes else {}
    for amount in _AMOUNTS:
        if device.curves[amount].count:
            sizes["peak_" + amount.removesuffix("_bytes")] = device.peak(amount)
    return tuple(sizes.items())


def _terms(device: Device) -> tuple[Term, ...]:
    """Return the card's books at the peak of what was used."""
    used, reserved, allocated = (device.at_peak.get(amount) for amount in _AMOUNTS)
    amounts: list[tuple[str, int, str]] = []
    if used is not None and reserved is not None and reserved <= used:
        if allocated is not None and allocated <= reserved:
            amounts.append(("allocated", allocated, _("live tensors")))
            amounts.append(("reserved_unallocated", reserved - allocated, "reserved - allocated"))
        else:
            amounts.append(("reserved", reserved, _("the pool of PyTorch")))
        amounts.append(("outside_or_others", used - reserved, "used - reserved"))
    elif used is not None:
        amounts.append(("used", used, _("of all processes on the card")))
    if used is not None and device.total_bytes > used:
        amounts.append(("free", device.total_bytes - used, "total - used"))
    return tuple(
        ranged(name, size, low=size, high=size, formula=words, source=_SOURCE, certainty=Certainty.MEASURED)
        for name, size, words in amounts
    )


def _advice(device: Device, rise: Rise | None, ooms: int) -> tuple[Piece, ...]:
    found = []
    if ooms:
        found.append(
            Piece(change=_("read the job's log: it has the request and the books"), flags="ullage inspect LOG")
        )
    if rise is not None:
        change = _("record a memory snapshot: it names who keeps what grows")
        flags = "torch.cuda.memory._record_memory_history()"
        found.append(Piece(change=change, flags=flags, gain_bytes=rise.total))
    if device.counts["num_alloc_retries"] and not ooms:
        change = _("leave more room: the allocator had to give its cache back and try again, which is slow")
        found.append(Piece(change=change, cost=_("a smaller micro-batch, or a smaller cache")))
    return tuple(found)


def _notes(found: Recording, sampled: list[Device]) -> tuple[str, ...]:
    notes = []
    if found.num_broken:
        count = found.num_broken
        notes.append(_("{count:,} lines were not understood: this is a partial answer").format(count=count))
    for device in sampled:
        retries = device.counts["num_alloc_retries"]
        if retries:
            notes.append(
                _("{device}: {count:,} allocations were only had after giving the cache back").format(
                    device=device.label(), count=retries
                )
            )
        if device.total_bytes and device.peak("used_bytes") > EDGE_SHARE * device.total_bytes:
            share = 100 * device.peak("used_bytes") / device.total_bytes
            notes.append(_("{device} was {share:.1f} % full").format(device=device.label(), share=share))
    notes.append(_("samples are taken from time to time: peaks between them are not seen"))
    return tuple(notes[:20])


def _metrics(device: Device) -> tuple[tuple[str, float], ...]:
    """Return the fragmentation rate at the peak (docs/metrics.md), and how full the card was."""
    metrics: dict[str, float] = {}
    reserved, allocated = device.at_peak.get("reserved_bytes"), device.at_peak.get("allocated_bytes")
    if reserved and allocated is not None:
        metrics["fragmentation_rate"] = max(0.0, (reserved - allocated) / reserved)
    if device.total_bytes:
        metrics["used_share"] = device.peak("used_bytes") / device.total_bytes
    return tuple(metrics.items())


def _series(sampled: list[Device]) -> tuple[Series, ...]:
    return tuple(
        device.curves[amount].series(f"device {device.index} {amount}")
        for device in sampled[:64]
        for amount in _AMOUNTS
        if device.curves[amount].count
    )


def _listings(found: Recording, sampled: list[Device], fullest: Device) -> tuple[Listing, ...]:
    devices: list[tuple[Cell, ...]] = [
        (
            f"{each.index}", each.name, each.total_bytes or None, each.peak("used_bytes"),
            each.peak("reserved_bytes") or None, each.peak("allocated_bytes") or None,
            each.counts["num_alloc_retries"], each.counts["num_ooms"], each.num_samples,
        )
        for each in sampled
    ]  # fmt: skip
    columns = (
        "device", "name", "total_bytes", "used_bytes", "reserved_bytes", "allocated_bytes", "retries", "ooms",
        "samples",
    )  # fmt: skip
    processes: list[tuple[Cell, ...]] = [(f"{number}", size) for number, size in fullest.processes.items()]
    events: list[tuple[Cell, ...]] = [(f"{moment:,.1f} s", name, text) for moment, name, text in found.events]
    tables = (
        Listing(name="devices", title=_("Devices, each at its peak"), columns=columns, rows=ranked(devices, 3)),
        Listing(
            name="processes",
            title=_("Processes on device {device}, each at its peak").format(device=fullest.index),
            columns=("pid", "used_bytes"),
            rows=ranked(processes, 1),
        ),
        Listing(name="events", title=_("Events"), columns=("t", "event", "text"), rows=tuple(events)),
    )
    return tuple(table for table in tables if table.rows)
