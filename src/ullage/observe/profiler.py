"""A trace of torch.profiler inspected: the peak, its moment, who held the memory, what leaks, what the kernels did."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ullage.errors import InputError
from ullage.i18n import _
from ullage.ledger import Certainty, Term, ranged
from ullage.observe.advice import Piece
from ullage.observe.inspection import Inspection
from ullage.observe.measured import Cell, Curve, Listing, Rise, Series, ranked, rise_of
from ullage.observe.profiler_kernels import Roofline, busy_listing, kernel_listing, span_of, transfer_listing
from ullage.observe.profiler_memory import NOBODY, Owners, Usage, open_names, usage_of
from ullage.observe.profiler_trace import Trace, read_trace
from ullage.observe.streams import Readable
from ullage.units import format_bytes

MAX_TERMS = 8
MAX_PHASES = 12
_SOURCE = "torch.profiler, its [memory] events"
_MODULE = "nn.Module: "
_STEPS = re.compile(r"^ProfilerStep#\d+$")


def inspect_trace(stream: Readable, where: str = "", device: int | None = None) -> Inspection:
    """Inspect a Chrome trace of torch.profiler.

    Raises:
        InputError: it is none, or nothing in it is understood.
    """
    trace = read_trace(stream)
    if not (trace.operators or trace.kernels or trace.allocations or trace.transfers):
        raise InputError(
            _("this trace holds neither operators nor kernels nor memory events of torch.profiler"), where=where
        )
    owners = Owners(trace)
    begin = span_of(trace)[0]
    usages = [usage_of(trace, owners, each, begin) for each in range(len(trace.devices))]
    chosen = _choose(trace, usages, device, where)
    roofline = Roofline(trace, owners)
    rise = rise_of([(float(number), size) for number, size in chosen.steps]) if chosen else None
    return Inspection(
        kind="profiler_trace",
        verdict=_verdict(trace, chosen, rise),
        cause="leak" if rise else "none",
        confidence="likely" if rise else "certain",
        why=_why(trace, owners, chosen, rise),
        framework="pytorch",
        allocator="pytorch",
        sizes=_sizes(trace, chosen, roofline),
        terms=_terms(trace, owners, chosen) if chosen else (),
        total_bytes=chosen.peak_bytes if chosen else 0,
        total_name=_("peak allocated"),
        advice=_advice(trace, owners, chosen, rise),
        partial=trace.truncated or trace.num_dropped > 0 or chosen is None,
        notes=_notes(trace, owners, chosen),
        metrics=_metrics(trace, chosen, roofline),
        series=(*_series(trace, usages), *(_phase_curves(trace, owners, chosen, begin) if chosen else ())),
        listings=_listings(trace, owners, chosen, roofline),
    )


def _choose(trace: Trace, usages: list[Usage], device: int | None, where: str) -> Usage | None:
    """Return the device asked for, else the accelerator (else the CPU) whose peak is largest."""
    if device is not None:
        usages = [each for each in usages if trace.devices[each.device][0] != 0]
        usages = [each for each in usages if trace.devices[each.device][1] == device]
        if not usages:
            raise InputError(
                _("there are no memory events of device {device} in it").format(device=device), where=where
            )
    return max(usages, key=lambda each: (trace.devices[each.device][0] != 0, each.peak_bytes), default=None)


def _verdict(trace: Trace, usage: Usage | None, rise: Rise | None) -> str:
    if usage is None:
        return _("a trace without memory events: {count:,} operators, {kernels:,} kernels").format(
            count=len(trace.operators), kernels=len(trace.kernels)
        )
    device, peak = trace.device_name(usage.device), format_bytes(usage.peak_bytes)
    if rise is not None:
        return _("{device}: memory grows by {size} per step; peak {peak} allocated").format(
            device=device, size=format_bytes(rise.per_x), peak=peak
        )
    if usage.reserved_peak_bytes:
        return _("{device}: peak {peak} allocated, {reserved} reserved").format(
            device=device, peak=peak, reserved=format_bytes(usage.reserved_peak_bytes)
        )
    return _("{device}: peak {peak} allocated").format(device=device, peak=peak)


def _why(trace: Trace, owners: Owners, usage: Usage | None, rise: Rise | None) -> str:
    """Return the moment of the peak: phase, operators and modules that were open."""
    if usage is None:
        return ""
    kept, place = trace.allocations, owners.allocator[usage.peak_at]
    moment, thread = kept.time[usage.peak_at], kept.thread[usage.peak_at]
    names = [trace.names[trace.operators.name[each]] for each in owners.stack_of(place)]
    python = open_names(trace, trace.python, thread, moment)
    modules = [name.removeprefix(_MODULE) for name in python if name.startswith(_MODULE)]
    frames = [name for name in python if not name.startswith((_MODULE, "<built-in")) and "torch/" not in name]
    parts = [
        _("the peak was reached in {phase}").format(phase=owners.phase_of(place)),
        _("operators {names}").format(names=" > ".join(names[-6:])) if names else "",
        _("modules {names}").format(names=" > ".join(modules[-6:])) if modules else "",
        _("called at {frame}").format(frame=frames[-1]) if frames else "",
    ]
    if rise is not None:
        parts.append(_("the floor rises by {size} over the steps").format(size=format_bytes(rise.total)))
    return "; ".join(part for part in parts if part)


def _sizes(trace: Trace, usage: Usage | None, roofline: Roofline) -> tuple[tuple[str, int], ...]:
    sizes = {"capacity": roofline.total_bytes} if roofline.total_bytes else {}
    if usage is not None:
        sizes["peak_allocated"] = usage.peak_bytes
        if usage.reserved_peak_bytes:
            sizes["peak_reserved"] = usage.reserved_peak_bytes
            sizes["reserved_at_peak"] = usage.reserved_at_peak_bytes
        sizes["before_recording"] = usage.before_bytes
        sizes["left_at_end"] = sum(size for _operator, size in usage.left)
    if len(trace.transfers):
        sizes["copied"] = sum(trace.transfers.moved)
    return tuple(sizes.items())


def _terms(trace: Trace, owners: Owners, usage: Usage) -> tuple[Term, ...]:
    """Return what was alive at the peak by the operator that allocated it, as measured terms."""
    sums: dict[str, int] = {}
    for operator, size in usage.alive:
        name = _("no operator open") if operator == NOBODY else trace.names[trace.operators.name[operator]]
        sums[name] = sums.get(name, 0) + size
    rows = sorted(sums.items(), key=lambda pair: (-pair[1], pair[0]))
    shown, rest = rows[:MAX_TERMS], rows[MAX_TERMS:]
    terms = [_term(name, size, _("alive at the peak")) for name, size in shown]
    if rest:
        words = _("{count} further operators").format(count=len(rest))
        terms.append(_term("other operators", sum(size for _name, size in rest), words))
    if usage.before_bytes:
        words = _("alive at the peak, allocated before the recording began")
        terms.append(_term("before_recording", usage.before_bytes, words))
    return tuple(terms)


def _term(name: str, size: int, words: str) -> Term:
    return ranged(name, size, low=size, high=size, formula=words, source=_SOURCE, certainty=Certainty.MEASURED)


def _leaking(trace: Trace, owners: Owners, usage: Usage) -> list[tuple[str, int]]:
    """Return the operators whose memory is left at the end, the most first."""
    sums: dict[str, int] = {}
    for operator, size in usage.left:
        if operator != NOBODY:
            name = trace.names[trace.operators.name[operator]]
            sums[name] = sums.get(name, 0) + size
    return sorted(sums.items(), key=lambda pair: (-pair[1], pair[0]))


def _advice(trace: Trace, owners: Owners, usage: Usage | None, rise: Rise | None) -> tuple[Piece, ...]:
    if usage is None:
        return (
            Piece(
                change=_("record again with memory events"),
                flags="torch.profiler.profile(profile_memory=True, record_shapes=True, with_stack=True)",
            ),
        )
    if rise is None:
        return ()
    names = ", ".join(name for name, _size in _leaking(trace, owners, usage)[:3])
    change = _("find who keeps tensors of earlier steps: a list of losses, a graph that is not detached, a cache")
    if names:
        change = _("{change}; most of what is left was allocated by {names}").format(change=change, names=names)
    return (Piece(change=change, gain_bytes=rise.total, flags="loss.detach()", cost=_("none")),)


def _notes(trace: Trace, owners: Owners, usage: Usage | None) -> tuple[str, ...]:
    notes = []
    if trace.truncated:
        notes.append(_("the trace ends too early: this is a partial answer"))
    if trace.num_dropped:
        notes.append(_("{count:,} events were not read: this is a partial answer").format(count=trace.num_dropped))
    if usage is None:
        notes.append(_("there are no memory events in it (profile_memory was off): a partial answer"))
        return tuple(notes)
    if 0 < len(usage.steps) < 5:
        notes.append(
            _("{count} steps are too few to tell a leak; at their ends {sizes} were allocated").format(
                count=len(usage.steps), sizes=", ".join(format_bytes(size) for _step, size in usage.steps)
            )
        )
    if trace.devices[usage.device][0] == 0:
        notes.append(_("on the CPU the total counts from the beginning of the recording"))
    if not len(trace.python):
        notes.append(_("modules and lines are known only of traces with with_stack and with_modules"))
    return tuple(notes)


def _metrics(trace: Trace, usage: Usage | None, roofline: Roofline) -> tuple[tuple[str, float], ...]:
    """Return the ratios of docs/metrics.md that a trace gives."""
    found: dict[str, float] = {}
    if usage is not None and usage.reserved_at_peak_bytes:
        pool = usage.reserved_at_peak_bytes
        found["fragmentation_rate"] = max(0.0, (pool - usage.peak_bytes) / pool)
    works = trace.work.values()
    moved = sum(work.moved_bytes for work in works)
    if moved:
        found["work_flops"] = float(sum(work.flops for work in works))
        found["compute_density"] = found["work_flops"] / moved
    ridge = roofline.ridge(tuple({work.dtype for work in works}))
    if ridge:
        found["compute_density_ridge"] = ridge
    busy = [row[3] for row in busy_listing(trace).rows if isinstance(row[3], float)]
    if busy:
        found["busy_share"] = max(busy)
    return tuple(found.items())


def _series(trace: Trace, usages: list[Usage]) -> tuple[Series, ...]:
    found = []
    for usage in usages:
        name = trace.device_name(usage.device)
        found.append(Series(name=f"{name} allocated_bytes", points=usage.curve))
        if usage.reserved_curve:
            found.append(Series(name=f"{name} reserved_bytes", points=usage.reserved_curve))
        if usage.steps:
            points = tuple((float(number), size) for number, size in usage.steps)
            found.append(Series(name=f"{name} step_end_bytes", x_unit="step", points=points))
    return tuple(found)


def _phase_curves(trace: Trace, owners: Owners, usage: Usage, begin: float) -> Iterator[Series]:
    """Yield per phase the total allocated after each of its events, of the phases with most events."""
    kept = trace.allocations
    curves: dict[str, Curve] = {}
    order = sorted((place for place, each in enumerate(kept.device) if each == usage.device), key=kept.time.__getitem__)
    for place in order:
        phase = owners.phase_of(owners.allocator[place])
        if kept.total[place] >= 0:
            curves.setdefault(phase, Curve()).add((kept.time[place] - begin) / 1e6, kept.total[place])
    for phase, curve in sorted(curves.items(), key=lambda pair: -pair[1].count)[:MAX_PHASES]:
        yield curve.series(f"{trace.device_name(usage.device)} {phase} allocated_bytes")


def _listings(trace: Trace, owners: Owners, usage: Usage | None, roofline: Roofline) -> tuple[Listing, ...]:
    found = []
    if usage is not None:
        found += [_phases(trace, owners, usage), _operators(trace, owners, usage)]
    if len(trace.kernels) or len(trace.transfers):
        bandwidth = roofline.gpu.bandwidth_bytes_per_s if roofline.gpu else None
        found += [busy_listing(trace), kernel_listing(trace), transfer_listing(trace, bandwidth)]
    if trace.work:
        by_kernel, by_phase = roofline.by_kernel, roofline.by_phase
        found.append(roofline.listing("phase_density", _("Compute density by phase"), "phase", by_phase))
        found.append(roofline.listing("kernel_density", _("Compute density by kernel"), "kernel", by_kernel))
        by_operator = roofline.by_operator
        found.append(roofline.listing("operator_density", _("Compute density by operator"), "operator", by_operator))
    return tuple(each for each in found if each.rows)


def _phases(trace: Trace, owners: Owners, usage: Usage) -> Listing:
    """Return per phase its largest total, what it allocated, what it left, and what of it was alive at the peak."""
    kept = trace.allocations
    rows: dict[str, list[int]] = {}
    for place, device in enumerate(kept.device):
        if device == usage.device:
            row = rows.setdefault(owners.phase_of(owners.allocator[place]), [0, 0, 0, 0, 0])
            size = kept.bytes[place]
            row[0] = max(row[0], kept.total[place])
            row[1 if size > 0 else 2] += abs(size)
            row[4] += 1
    for operator, size in usage.alive:
        rows.setdefault(owners.phase_of(operator), [0, 0, 0, 0, 0])[3] += size
    columns = ("phase", "peak_bytes", "allocated_bytes", "freed_bytes", "alive_at_peak_bytes", "count")
    cells: list[tuple[Cell, ...]] = [(name, *row) for name, row in rows.items()]
    return Listing(name="phases", title=_("Phases"), columns=columns, rows=ranked(cells, 1))


def _operators(trace: Trace, owners: Owners, usage: Usage) -> Listing:
    """Return per operator what was alive of it at the peak, what it allocated itself, and its own time."""
    columns, kept = trace.operators, trace.allocations
    rows: dict[str, list[float]] = {}
    names = [_STEPS.sub("ProfilerStep*", name) for name in trace.names]
    for place, number in enumerate(columns.name):
        row = rows.setdefault(names[number], [0, 0, 0, 0.0, 0])
        row[3] += columns.end[place] - columns.start[place] - owners.inner_us[place]
        row[4] += 1
    for place, device in enumerate(kept.device):
        operator = owners.allocator[place]
        if device == usage.device and operator != NOBODY:
            row = rows[names[columns.name[operator]]]
            row[1] += max(0, kept.bytes[place])
            row[2] += kept.bytes[place]
    for operator, size in usage.alive:
        if operator != NOBODY:
            rows[names[columns.name[operator]]][0] += size
    cells: list[tuple[Cell, ...]] = [(name, *row) for name, row in rows.items()]
    heads = ("operator", "alive_at_peak_bytes", "allocated_bytes", "net_bytes", "self_us", "count")
    by_allocated = ranked(cells, 2, len(cells))
    return Listing(name="operators", title=_("Operators"), columns=heads, rows=ranked(by_allocated, 1))
