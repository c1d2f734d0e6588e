"""A memory snapshot of PyTorch inspected: was a request refused, what holds the memory, how much of it is in pieces."""

from __future__ import annotations

from pathlib import Path

from ullage.allocator.metrics import Fragmentation, fragmentation
from ullage.allocator.session import choose_device, how_to_record
from ullage.i18n import _
from ullage.ledger import Certainty, Term, ranged
from ullage.observe.advice import Piece
from ullage.observe.inspection import Inspection
from ullage.observe.snapshot import DeviceMemory, python_frames, read_snapshot
from ullage.observe.verdict import MATERIAL_SHARE
from ullage.units import format_bytes

MAX_HOLDERS = 5
_SOURCE = "snapshot, its segments"


def inspect_snapshot(path: Path, device: int | None = None) -> Inspection:
    """Inspect a snapshot file.

    Raises:
        InputError: it is not one, or it holds nothing.
    """
    snapshot = read_snapshot(path)
    device, notes = choose_device(snapshot, device)
    memory = snapshot.devices[device]
    found = fragmentation(memory.segments)
    refused = memory.ooms[-1][1] if memory.ooms else None
    cause, confidence, why = _judge(found, refused)
    holders = [
        _("{size} in {count:,} blocks held by {place}").format(size=format_bytes(size), count=count, place=place)
        for place, size, count in _holders(memory)
    ]
    sizes = {
        "reserved": found.reserved_bytes,
        "in_use": found.in_use_bytes,
        "releasable": found.releasable_bytes,
        "pinned": found.pinned_bytes,
    }
    if refused is not None:
        sizes["requested"] = refused
    return Inspection(
        kind="snapshot",
        verdict=_verdict(cause, device, found, recorded=memory.num_events > 0),
        cause=cause,
        confidence=confidence,
        why=why,
        framework="pytorch",
        allocator="pytorch",
        sizes=tuple(sizes.items()),
        terms=_terms(found),
        total_bytes=found.reserved_bytes,
        advice=_advice(cause, found, str(path)),
        partial=memory.num_events == 0,
        notes=(*notes, *_without_history(memory), *holders, *snapshot.warnings),
    )


def _judge(found: Fragmentation, refused: int | None) -> tuple[str, str, str]:
    pieces = found.releasable_bytes + found.pinned_bytes
    held = format_bytes(found.in_use_bytes)
    if refused is None:
        return "none", "likely", ""
    asked = format_bytes(refused)
    if pieces >= refused and pieces >= MATERIAL_SHARE * found.reserved_bytes:
        why = _("{asked} were refused while {pieces} of the reserved memory lay in pieces").format(
            asked=asked, pieces=format_bytes(pieces)
        )
        return "fragmentation", "likely", why
    why = _("{asked} were refused with {held} in use; {pieces} of the reserved memory were not").format(
        asked=asked, held=held, pieces=format_bytes(pieces)
    )
    return "capacity", "likely", why


def _without_history(memory: DeviceMemory) -> tuple[str, ...]:
    if memory.num_events:
        return ()
    return (_("there is no history in it: a partial answer; {how}").format(how=how_to_record()),)


def _verdict(cause: str, device: int, found: Fragmentation, *, recorded: bool) -> str:
    words = {
        "none": _("no request was refused") if recorded else _("whether a request was refused is not recorded"),
        "fragmentation": _("the memory is there, in pieces"),
        "capacity": _("the card is too small for what is alive"),
    }[cause]
    return _("device {device}: {words}; {used} in use of {reserved} reserved").format(
        device=device,
        words=words,
        used=format_bytes(found.in_use_bytes),
        reserved=format_bytes(found.reserved_bytes),
    )


def _terms(found: Fragmentation) -> tuple[Term, ...]:
    amounts = (
        ("requested", found.requested_bytes, _("asked for, and in use")),
        ("rounding", found.in_use_bytes - found.requested_bytes, _("in use, and asked for by nobody")),
        ("releasable", found.releasable_bytes, _("empty_cache() gives it back")),
        ("pinned", found.pinned_bytes, _("free, in segments that some block keeps")),
    )
    return tuple(
        ranged(name, size, low=size, high=size, formula=words, source=_SOURCE, certainty=Certainty.MEASURED)
        for name, size, words in amounts
    )


def _holders(memory: DeviceMemory) -> list[tuple[str, int, int]]:
    """Return (place in the code, bytes, blocks) of what holds most, by the innermost line outside PyTorch."""
    sums: dict[str, tuple[int, int]] = {}
    for segment in memory.segments:
        for block in segment.blocks:
            frames = python_frames(memory.stacks.get(block.address), limit=32)
            place = next((frame for frame in frames if "/torch/" not in frame), frames[0] if frames else "")
            size, count = sums.get(place, (0, 0))
            sums[place] = (size + block.size_bytes, count + 1)
    ranked = sorted(((place, *pair) for place, pair in sums.items() if place), key=lambda row: (-row[1], row[0]))
    return ranked[:MAX_HOLDERS]


def _advice(cause: str, found: Fragmentation, path: str) -> tuple[Piece, ...]:
    replay = Piece(
        change=_("replay it under other allocator settings, and see which would have needed less"),
        flags=f"ullage replay {path} --what-if",
        gain_bytes=found.pinned_bytes,
        cost=_("none"),
    )
    smaller = Piece(
        change=_("a smaller micro-batch, with gradient accumulation so that the global batch stays"),
        cost=_("smaller kernels, somewhat slower"),
    )
    if cause == "none":
        return (replay,) if found.pinned_bytes >= MATERIAL_SHARE * found.reserved_bytes else ()
    conf = Piece(
        change=_("let segments grow, so that pieces join"),
        flags="PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
        gain_bytes=found.pinned_bytes,
    )
    return (conf, replay, smaller) if cause == "fragmentation" else (smaller, replay)
