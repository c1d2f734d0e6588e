"""A memory snapshot of PyTorch inspected: where memory was at its peak, who holds it, does it grow, what to change."""

from __future__ import annotations

import shlex
from pathlib import Path

from ullage.allocator.session import choose_device, how_to_record
from ullage.i18n import _
from ullage.ledger import Certainty, Term, ranged
from ullage.observe.attribution import LEVELS
from ullage.observe.attribution_views import Share
from ullage.observe.inspection import Inspection
from ullage.observe.measured import Listing, Series
from ullage.observe.snapshot import DeviceMemory, python_frames, read_snapshot
from ullage.observe.snapshot_answer import Answer, answer
from ullage.observe.snapshot_words import advice_of, judge, verdict_of
from ullage.observe.stages import Stages
from ullage.units import format_bytes

MAX_HOLDERS = 5
MAX_FRAMES = 12
_SOURCE = "snapshot, its events and stacks"


def inspect_snapshot(path: Path, device: int | None = None) -> Inspection:
    """Inspect a snapshot file.

    Args:
        path: the file.
        device: one of its devices; the one with most events when not given.

    Raises:
        InputError: it is not one, or it holds nothing.
    """
    with Stages() as stages:
        snapshot = read_snapshot(path, progress=stages.reading)
        device, notes = choose_device(snapshot, device)
        found = answer(snapshot, device, stages)
    return inspection_of(found, str(path), (*notes, *found.notes, *snapshot.warnings))


def inspection_of(found: Answer, path: str, notes: tuple[str, ...] = ()) -> Inspection:
    """Put an answer into the words of an inspection."""
    finding = judge(found)
    reserved = found.lives.reserved_at(found.moment)
    return Inspection(
        kind="snapshot",
        verdict=verdict_of(found, finding),
        cause=finding.cause,
        confidence=finding.confidence,
        why=finding.why,
        framework="pytorch",
        allocator="pytorch",
        phase=found.phase(found.moment),
        sizes=_sizes(found),
        terms=_terms(found, reserved),
        total_bytes=reserved,
        total_name=_("reserved then") if found.recorded else "",
        advice=advice_of(found, finding, path),
        partial=found.memory.num_events == 0,
        notes=(*_notes(found), *notes),
        metrics=_metrics(found),
        series=_series(found),
        listings=_listings(found),
        detail=found,
        next_command=f"ullage inspect {shlex.quote(path)} --html report.html",
    )


def _sizes(found: Answer) -> tuple[tuple[str, int], ...]:
    final, lives, leak = found.final, found.lives, found.leak
    sizes = {
        "peak_allocated": lives.peak_bytes,
        "peak_reserved": lives.peak_reserved[1],
        "reserved": final.reserved_bytes,
        "in_use": final.in_use_bytes,
        "rounding": final.in_use_bytes - final.requested_bytes,
        "releasable": final.releasable_bytes,
        "pinned": final.pinned_bytes,
    }
    if leak.num_steps:
        sizes |= {"growth_per_step": leak.growth_bytes, "leak_per_step": leak.bytes_per_step}
    if found.refusal is not None:
        sizes |= {"requested": found.refusal.requested_bytes, "free": found.refusal.free_bytes}
    return tuple(sizes.items())


def _metrics(found: Answer) -> tuple[tuple[str, float], ...]:
    lives, final = found.lives, found.final
    values: list[tuple[str, float]] = []
    reserved = lives.peak_reserved[1]
    if reserved:
        values.append(("utilisation_share", round(lives.peak_bytes / reserved, 6)))
    if final.reserved_bytes:
        values.append(("fragmentation_share", round(final.pinned_bytes / final.reserved_bytes, 6)))
    if final.in_use_bytes:
        values.append(("rounding_share", round(final.internal, 6)))
    if found.recorded:
        values += [("events", found.memory.num_events), ("steps", len(found.leak.boundaries))]
        values += [("retries", found.retries), ("ooms", len(found.memory.ooms))]
    return tuple(values)


def _terms(found: Answer, reserved: int) -> tuple[Term, ...]:
    """Return the categories at the moment, and what was reserved and not in use."""
    terms = [_term(name, amounts, _how_sure(amounts)) for name, amounts in found.sums.items()]
    allocated = sum(term.bytes for term in terms)
    if not found.recorded or found.moment == found.lives.num_events - 1:
        awaiting = found.final.in_use_bytes - allocated
        parts = (
            ("awaiting_free", awaiting, _("freed, and waited for by another stream")),
            ("releasable", found.final.releasable_bytes, _("empty_cache() gives it back")),
            ("pinned", found.final.pinned_bytes, _("free, in segments that some block keeps")),
        )
        if sum(amount for _name, amount, _words in parts) == reserved - allocated:
            return (*terms, *(_term(name, [amount, 0, 0], words) for name, amount, words in parts if amount))
    unused = reserved - allocated
    return (*terms, _term("unused", [unused, 0, 0], _("reserved, and not in use then"))) if unused > 0 else tuple(terms)


def _term(name: str, amounts: list[int], words: str) -> Term:
    size = sum(amounts)
    certainty = Certainty.MEASURED if not amounts[1] and not amounts[2] else Certainty.ASSUMED
    return ranged(name, size, low=size, high=size, formula=words, source=_SOURCE, certainty=certainty)


def _how_sure(amounts: list[int]) -> str:
    words = {"certain": _("certain"), "likely": _("likely"), "unsure": _("unsure")}
    levels = [(size, words[level]) for level, size in zip(LEVELS, amounts, strict=True) if size]
    if len(levels) == 1:
        return levels[0][1]
    return ", ".join(f"{format_bytes(size)} {word}" for size, word in levels)


def _notes(found: Answer) -> list[str]:
    notes = []
    if not found.memory.num_events:
        notes.append(_("there is no history in it: a partial answer; {how}").format(how=how_to_record()))
    lives = found.lives
    older = sum(lives.sizes[each] for each in range(lives.num_older) if not lives.stacks[each])
    if older and found.recorded:
        notes.append(
            _("{size} are older than the recording: what they are for is told by their sizes and lives alone").format(
                size=format_bytes(older)
            )
        )
    if not found.recorded:
        notes += [
            _("{size} in {count:,} blocks held by {place}").format(
                size=format_bytes(each.bytes), count=each.blocks, place=found.place(each.stack)
            )
            for each in found.lines[:MAX_HOLDERS]
        ]
    return notes


def _series(found: Answer) -> tuple[Series, ...]:
    line = found.timeline
    unit = "s" if line.seconds else "event"
    x = line.seconds or [float(event) for event in line.events]
    columns = {**line.categories, "reserved": line.reserved}
    return tuple(
        Series(name=f"{name}_bytes", x_unit=unit, points=tuple(zip(x, column, strict=True)))
        for name, column in columns.items()
        if column
    )


def _listings(found: Answer) -> tuple[Listing, ...]:
    return tuple(
        listing
        for listing in (
            _by_line(found), _by_module(found), _holders(found), _leaks(found), _pins(found), _what_if(found),
        )
        if listing.rows
    )  # fmt: skip


def _when(found: Answer) -> str:
    if not found.recorded:
        return _("at the end")
    return _("when it was refused") if found.refusal is not None else _("at the peak")


def _by_line(found: Answer) -> Listing:
    return Listing(
        name="lines",
        title=_("Lines of code that held most, {when}").format(when=_when(found)),
        columns=("line", "held_bytes", "blocks", "category"),
        rows=tuple(_share_row(found, each) for each in found.lines),
    )


def _share_row(found: Answer, each: Share) -> tuple[str, int, int, str]:
    return (each.name or found.unnamed(each.stack), each.bytes, each.blocks, each.category)


def _by_module(found: Answer) -> Listing:
    named = [each for each in found.modules if each.name]
    return Listing(
        name="modules",
        title=_("Modules that held most, {when} (calls of forward, the innermost last)").format(when=_when(found)),
        columns=("module", "held_bytes", "blocks", "category"),
        rows=tuple((each.name, each.bytes, each.blocks, each.category) for each in named),
    )


def _holders(found: Answer) -> Listing:
    reader = found.found.reader
    return Listing(
        name="stacks",
        title=_("Stacks that held most, {when}").format(when=_when(found)),
        columns=("stack", "held_bytes", "blocks", "category"),
        rows=tuple(
            (
                " < ".join(reader.frames(each.stack, limit=MAX_FRAMES))
                or reader.node(each.stack)
                or found.unnamed(each.stack),
                each.bytes,
                each.blocks,
                each.category,
            )
            for each in found.holders
        ),
    )


def _leaks(found: Answer) -> Listing:
    steps = max(1, found.leak.num_steps)
    return Listing(
        name="leaks",
        title=_("What stays from step to step"),
        columns=("line", "per_step_bytes", "held_bytes", "blocks", "steps"),
        rows=tuple(
            (found.place(each.stack), each.bytes // steps, each.bytes, each.blocks, each.steps)
            for each in found.leak.holders
        ),
    )


def _pins(found: Answer) -> Listing:
    memory = found.memory
    return Listing(
        name="pins",
        title=_("What keeps free memory from being given back, at the end"),
        columns=("segment", "segment_bytes", "pinned_bytes", "blocks", "smallest_bytes", "kept_by"),
        rows=tuple(
            (
                f"{pin.address:#x}",
                pin.size_bytes,
                pin.pinned_bytes,
                pin.num_blocks,
                pin.block.size_bytes,
                _kept_by(found, memory, pin.block.address),
            )
            for pin in found.pinned_by
        ),
    )


def _kept_by(found: Answer, memory: DeviceMemory, address: int) -> str:
    stack = memory.stacks.get(address)
    number = memory.recording.known_stacks.number(stack or ())
    return found.place(number) if number else next(iter(python_frames(stack)), found.unnamed(0))


def _what_if(found: Answer) -> Listing:
    saved = found.refusal.saved_by if found.refusal is not None else []
    return Listing(
        name="would_have_fitted",
        title=_("Allocator settings under which the request would have fitted"),
        columns=("settings", "then_free_bytes"),
        rows=tuple(saved),
    )
