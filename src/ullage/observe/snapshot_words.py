"""Verdict and advice of a snapshot: what happened, how sure that is, and the cheapest change."""

from __future__ import annotations

from typing import NamedTuple

from ullage.i18n import _
from ullage.observe.advice import Piece
from ullage.observe.attribution_stacks import OPTIMIZER
from ullage.observe.snapshot_answer import Answer
from ullage.observe.verdict import MATERIAL_SHARE
from ullage.units import format_bytes

#: A category below this share of the peak is not worth a change of its own.
WORTH_SHARE = 0.1


class Finding(NamedTuple):
    """The cause, how sure it is, and the evidence in one sentence."""

    cause: str
    confidence: str
    why: str = ""


def judge(found: Answer) -> Finding:
    """Return why memory ran out, or whether it grows."""
    if found.refusal is not None:
        return _judge_refusal(found)
    if found.leak.is_one:
        return Finding("leak", found.leak.sure, _leak_sentence(found))
    return Finding("none", "likely")


def _judge_refusal(found: Answer) -> Finding:
    refusal = found.refusal
    assert refusal is not None
    asked = format_bytes(refusal.requested_bytes)
    if refusal.saved_by and refusal.dies:
        why = _("run again up to the request, it fits with {settings}: {free} stay free then").format(
            settings=refusal.saved_by[0][0], free=format_bytes(max(0, refusal.saved_by[0][1]))
        )
        return Finding("fragmentation", "certain", why)
    if refusal.tried and not refusal.dies:
        why = _("run again under the recorded settings, {asked} fit: blocks of other streams were waited for").format(
            asked=asked
        )
        return Finding("waiting", "unsure", why)
    pieces = refusal.reserved_bytes - refusal.allocated_bytes
    if not refusal.tried and pieces >= refusal.requested_bytes and pieces >= MATERIAL_SHARE * refusal.reserved_bytes:
        why = _("{asked} were refused while {pieces} of the reserved memory lay in pieces").format(
            asked=asked, pieces=format_bytes(pieces)
        )
        return Finding("fragmentation", "likely", why)
    held = format_bytes(refusal.allocated_bytes)
    why = _("{asked} were refused with {held} in use; {pieces} of the reserved memory were not").format(
        asked=asked, held=held, pieces=format_bytes(pieces)
    )
    if refusal.gap_bytes > 0:
        gap = _("{gap} were missing even if all that is free were one piece").format(
            gap=format_bytes(refusal.gap_bytes)
        )
        return Finding("capacity", "certain" if found.lives.num_events > 1 else "likely", f"{why}; {gap}")
    return Finding("capacity", "likely", why)


def _leak_sentence(found: Answer) -> str:
    leak = found.leak
    holder = leak.holders[0]
    return _("over {steps} steps, {size} per step stay, most of it asked for by {place}").format(
        steps=leak.num_steps, size=format_bytes(leak.bytes_per_step), place=found.place(holder.stack)
    )


def verdict_of(found: Answer, finding: Finding) -> str:
    """Return the sentence that comes first."""
    words = {
        "none": _("no request was refused") if found.recorded else _("whether a request was refused is not recorded"),
        "fragmentation": _("a request was refused though the memory is there, in pieces"),
        "capacity": _("a request was refused: the card is too small for what is alive"),
        "waiting": _("a request was refused though it would have fitted a moment later"),
        "leak": _("memory grows by {size} per step").format(size=format_bytes(found.leak.bytes_per_step)),
    }[finding.cause]
    lives = found.lives
    peak = _("peak {used} allocated, {reserved} reserved").format(
        used=format_bytes(lives.peak_bytes), reserved=format_bytes(lives.peak_reserved[1])
    )
    return _("device {device}: {words}; {peak}{when}").format(
        device=found.device, words=words, peak=peak, when=_when(found)
    )


def _when(found: Answer) -> str:
    """Return when the peak was, in words that follow it; empty without a history."""
    at = found.lives.peak_at
    if not found.recorded or at < 0:
        return ""
    phase = found.phase(at)
    step = found.step(at)
    parts = [
        _("in {phase}").format(phase=phase) if phase else "",
        _("of step {step}").format(step=step) if step and len(found.leak.boundaries) > 1 else "",
        _("(event {at:,} of {count:,})").format(at=at, count=found.lives.num_events),
    ]
    return " " + " ".join(part for part in parts if part)


def advice_of(found: Answer, finding: Finding, path: str) -> tuple[Piece, ...]:
    """Return changes, the cheapest first."""
    pieces: list[Piece] = []
    if finding.cause == "leak":
        holder = found.leak.holders[0]
        pieces.append(
            Piece(
                change=_("free what {place} makes: keep .item() or .detach().cpu(), not tensors of the graph").format(
                    place=found.place(holder.stack)
                ),
                gain_bytes=found.leak.bytes_per_step * found.leak.num_steps,
                cost=_("none"),
            )
        )
    pieces += _settings_advice(found, finding)
    pieces += _optimizer_advice(found)
    if finding.cause in ("capacity", "fragmentation", "leak", "waiting"):
        pieces += _training_advice(found)
    if finding.cause != "none" or pieces:
        pieces.append(
            Piece(
                change=_("replay it under other allocator settings, and see which would have needed less"),
                flags=f"ullage replay {path} --what-if",
                cost=_("none"),
            )
        )
    return tuple(pieces)


def _settings_advice(found: Answer, finding: Finding) -> list[Piece]:
    final = found.final
    pinned = final.pinned_bytes
    if found.settings.expandable_segments:
        return []
    saved = found.refusal.saved_by if found.refusal is not None else []
    if saved:
        return [Piece(change=_("settings under which it fits"), flags=f"PYTORCH_CUDA_ALLOC_CONF={saved[0][0]}")]
    if finding.cause == "fragmentation" or pinned >= WORTH_SHARE * max(1, final.reserved_bytes):
        return [
            Piece(
                change=_("let segments grow, so that pieces join"),
                flags="PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
                gain_bytes=pinned,
            )
        ]
    return []


def _optimizer_advice(found: Answer) -> list[Piece]:
    """Advise on what the optimizer's step holds besides its states, where the peak lies in it."""
    lives = found.lives
    if found.moment < 0 or found.found.phase_at(found.moment) != OPTIMIZER:
        return []
    temporaries = sum(found.sums.get("temporaries", ()))
    if temporaries < WORTH_SHARE * lives.peak_bytes:
        return []
    return [
        Piece(
            change=_("let the optimizer work without temporaries of all parameters at a time"),
            flags="torch.optim.AdamW(..., fused=True)",
            gain_bytes=temporaries,
            cost=_("none"),
        )
    ]


def _training_advice(found: Answer) -> list[Piece]:
    total = max(1, sum(map(sum, found.sums.values())))
    activations, states = sum(found.sums.get("activations", ())), sum(found.sums.get("optimizer_states", ()))
    cache = sum(found.sums.get("kv_cache", ()))
    pieces = []
    if activations >= WORTH_SHARE * total or not found.sums.keys() & {"optimizer_states", "kv_cache"}:
        pieces.append(
            Piece(
                change=_("a smaller micro-batch, with gradient accumulation so that the global batch stays"),
                gain_bytes=activations // 2,
                cost=_("smaller kernels, somewhat slower"),
            )
        )
    if activations >= WORTH_SHARE * total:
        pieces.append(
            Piece(
                change=_("recompute activations in the backward pass"),
                flags="torch.utils.checkpoint / model.gradient_checkpointing_enable()",
                cost=_("about a third more compute"),
            )
        )
    if states >= WORTH_SHARE * total:
        pieces.append(
            Piece(
                change=_("keep the optimizer's states in 8 bits, or shard them over the ranks"),
                gain_bytes=states * 3 // 4,
                cost=_("another optimizer, or communication"),
            )
        )
    if cache >= WORTH_SHARE * total:
        pieces.append(Piece(change=_("a smaller KV cache: fewer or shorter requests at a time"), gain_bytes=cache // 2))
    return pieces
