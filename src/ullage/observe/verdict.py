"""The verdict: which of the possible causes the arithmetic of a message leaves, how sure, and why in one sentence.

Causes: ``capacity``, ``fragmentation``, ``waiting``, ``other_process``, ``cap``, ``outside``, ``host``, ``kv_pool``,
``start_budget``, ``cascade``, ``unknown``. Confidence is ``certain`` only where no other reading of the printed figures
is left; ``likely`` where the figures point one way and something is not printed; ``unsure`` where they do not decide.
"""

from __future__ import annotations

from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.observe.books import STEP_BYTES, Books, books_of
from ullage.observe.oom import Fact
from ullage.units import GiB, format_bytes

#: What a process of PyTorch holds outside its allocator on an ordinary day: context, cuBLAS and NCCL.
#: Source: sglang PR 11716 logs 1.77 to 2.01 GB for context and NCCL of an 8-GPU start.
ORDINARY_OUTSIDE_BYTES = 2 * GiB
#: Pieces below this share of a card do not save a job: the next step takes them. A judgement, not a measurement.
MATERIAL_SHARE = 0.02
#: Another process with this share of a card is worth naming before the pieces of one's own.
FOREIGN_SHARE = 0.05


class Finding(Frozen):
    """A cause with its confidence and its sentence; ``gap_bytes`` is what was missing, where that is known."""

    cause: str
    confidence: str
    why: str
    gap_bytes: int | None = None


def judge(fact: Fact) -> Finding:
    """Return the finding of one fact."""
    from ullage.observe.verdict_engines import judge_other

    return judge_device(fact, books_of(fact)) if fact.kind == "device_oom" else judge_other(fact)


def judge_device(fact: Fact, books: Books) -> Finding:
    """Judge a failed allocation of PyTorch."""
    if books.capacity is not None and books.requested > books.capacity:
        return _larger_than_the_card(books, books.capacity)
    capped = _cap(fact, books)
    if capped is not None:
        return capped
    if books.capacity is None or books.free is None or books.allocated is None:
        return _incomplete(books)
    hopeless = _capacity(books, books.capacity, books.allocated)
    if hopeless is not None:
        return hopeless
    if books.free >= books.requested:
        return _waiting(books, books.free)
    findings = (_foreign(books, books.capacity, books.free), _pieces(books), _outside(books), _unaccounted(fact, books))
    return next((finding for finding in findings if finding is not None), None) or _full(books)


def _cap(fact: Fact, books: Books) -> Finding | None:
    reserved, asked = format_bytes(books.reserved or books.allocated or 0), format_bytes(books.requested)
    if fact.detail("rejected"):
        why = _("per_process_memory_fraction turned {asked} away before the driver was asked").format(asked=asked)
        return Finding(cause="cap", confidence="certain", why=why)
    if books.limit is None or (books.capacity is not None and books.limit >= books.capacity):
        return None
    held = books.reserved if books.reserved is not None else (books.allocated or 0) + (fact.size("outside") or 0)
    if held + books.requested <= books.limit + STEP_BYTES:
        return None
    if (books.allocated or 0) + books.requested <= books.limit and books.unallocated >= books.requested:
        return _pieces(books)
    why = _("the process may take {limit}, holds {reserved} and asked for {asked}").format(
        limit=format_bytes(books.limit), reserved=reserved, asked=asked
    )
    surely = books.free is not None and books.free >= books.requested
    return Finding(
        cause="cap",
        confidence="certain" if surely else "likely",
        why=why,
        gap_bytes=held + books.requested - books.limit,
    )


def _incomplete(books: Books) -> Finding:
    why = _("memory ran out; the text gives no figures")
    if books.requested:
        why = _("{asked} could not be had; the message does not say what the card held").format(
            asked=format_bytes(books.requested)
        )
    return Finding(cause="capacity", confidence="unsure", why=why)


def _larger_than_the_card(books: Books, capacity: int) -> Finding:
    why = _("the one request of {asked} is larger than the card ({total})").format(
        asked=format_bytes(books.requested), total=format_bytes(capacity)
    )
    return Finding(cause="capacity", confidence="certain", why=why, gap_bytes=books.requested - capacity)


def _capacity(books: Books, capacity: int, allocated: int) -> Finding | None:
    """Return a finding where even perfect packing would not have helped."""
    asked, total = format_bytes(books.requested), format_bytes(capacity)
    outside = min(books.outside or 0, 2 * ORDINARY_OUTSIDE_BYTES)  # more than that is a cause of its own
    gap = allocated + books.requested + outside - capacity
    if gap <= STEP_BYTES:
        return None
    if allocated > capacity:
        why = _(
            "{allocated} were allocated on a card of {total}: the driver moved some to host memory, and that ran out"
        )
        why = why.format(allocated=format_bytes(allocated), total=total)
    elif outside:
        why = _(
            "{allocated} of live tensors, {outside} outside PyTorch and {asked} asked for are {gap} more than {total}"
        ).format(
            allocated=format_bytes(allocated),
            outside=format_bytes(outside),
            asked=asked,
            gap=format_bytes(gap),
            total=total,
        )
    else:
        why = _("{allocated} of live tensors and the {asked} asked for are {gap} more than {total}").format(
            allocated=format_bytes(allocated), asked=asked, gap=format_bytes(gap), total=total
        )
    return Finding(cause="capacity", confidence="certain", why=why, gap_bytes=gap)


def _waiting(books: Books, free: int) -> Finding:
    why = _(
        "{free} were free when the message was written, and only {asked} were asked for: memory came back a moment "
        "later (an event, another process), or the driver refused for a reason of its own"
    ).format(free=format_bytes(free), asked=format_bytes(books.requested))
    return Finding(cause="waiting", confidence="unsure", why=why)


def _foreign(books: Books, capacity: int, free: int) -> Finding | None:
    """Return a finding where what others hold would have been enough."""
    gap = books.requested - free
    if books.others is not None:
        others = books.others
        if others < FOREIGN_SHARE * capacity or free + others < books.requested or others < books.unallocated:
            return None
        why = _("other processes hold {others} of the {total} card, this one {own}; {gap} were missing").format(
            others=format_bytes(others),
            total=format_bytes(capacity),
            own=format_bytes(books.own or books.reserved or 0),
            gap=format_bytes(gap),
        )
        sure = books.own is not None and (free + books.unallocated < books.requested or others > capacity // 2)
        return Finding(cause="other_process", confidence="certain" if sure else "likely", why=why, gap_bytes=gap)
    excess = (books.beyond or 0) - ORDINARY_OUTSIDE_BYTES
    if excess <= 0 or free + excess < books.requested or excess < books.unallocated:
        return None
    why = _(
        "{beyond} of the {total} card are neither PyTorch's nor free: more than a context and NCCL take, so another "
        "process or a library holds them"
    ).format(beyond=format_bytes(books.beyond or 0), total=format_bytes(capacity))
    confidence = "likely" if excess > capacity // 4 else "unsure"
    return Finding(cause="other_process", confidence=confidence, why=why, gap_bytes=gap)


def _pieces(books: Books) -> Finding | None:
    """Return a finding where the memory was there, reserved and in pieces."""
    pieces, free, asked = books.unallocated, books.free or 0, books.requested
    if free + pieces < asked or pieces < MATERIAL_SHARE * (books.capacity or 0):
        return None
    if pieces >= asked:
        why = _("{pieces} were reserved and not allocated, in pieces too small for the {asked} asked for").format(
            pieces=format_bytes(pieces), asked=format_bytes(asked)
        )
    else:
        why = _(
            "{pieces} reserved, not allocated, and {free} free would hold the {asked} asked for, if they were together"
        ).format(pieces=format_bytes(pieces), free=format_bytes(free), asked=format_bytes(asked))
    confidence = "likely" if pieces >= asked else "unsure"
    return Finding(cause="fragmentation", confidence=confidence, why=why, gap_bytes=asked - free)


def _outside(books: Books) -> Finding | None:
    """Return a finding where this process holds unusually much outside PyTorch."""
    outside = books.outside
    if outside is None or outside <= 2 * ORDINARY_OUTSIDE_BYTES:
        return None
    why = _(
        "this process holds {outside} outside PyTorch: NCCL or NVSHMEM buffers, CUDA graphs, or a library's workspaces"
    ).format(outside=format_bytes(outside))
    return Finding(cause="outside", confidence="likely", why=why, gap_bytes=books.requested - (books.free or 0))


def _unaccounted(fact: Fact, books: Books) -> Finding | None:
    """Return a finding where live tensors and the request would fit, and nobody says who holds the rest.

    cudaMallocAsync prints no reserved figure: what is neither allocated nor free is its pool, in pieces, as far as
    another process does not hold it.
    """
    capacity, free, allocated = books.capacity or 0, books.free or 0, books.allocated or 0
    rest = capacity - free - allocated
    if fact.detail("allocator") != "cudaMallocAsync" or books.reserved is not None:
        return None
    if rest <= ORDINARY_OUTSIDE_BYTES or rest + free - ORDINARY_OUTSIDE_BYTES // 2 < books.requested:
        return None
    why = _(
        "{rest} of the {total} card are neither live tensors nor free, and {asked} were asked for: cudaMallocAsync's "
        "pool in pieces, or another process, and the message does not say which"
    ).format(rest=format_bytes(rest), total=format_bytes(capacity), asked=format_bytes(books.requested))
    return Finding(cause="fragmentation", confidence="unsure", why=why, gap_bytes=books.requested - free)


def _full(books: Books) -> Finding:
    why = _("{allocated} of the {total} card are live tensors, {free} were free, {asked} were asked for").format(
        allocated=format_bytes(books.allocated or 0),
        total=format_bytes(books.capacity or 0),
        free=format_bytes(books.free or 0),
        asked=format_bytes(books.requested),
    )
    unknown = books.reserved is None
    if unknown:
        rest = (books.capacity or 0) - (books.free or 0) - (books.allocated or 0)
        why = _("{why}; {rest} are neither, and the message does not say whose").format(
            why=why, rest=format_bytes(rest)
        )
    gap = max(0, books.requested - (books.free or 0))
    return Finding(cause="capacity", confidence="unsure" if unknown else "likely", why=why, gap_bytes=gap)
