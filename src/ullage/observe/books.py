"""The books of one card when PyTorch could not allocate: what the message prints, and what follows from it.

Formula:
    reserved      = allocated + unallocated
    own           = what this process holds on the card: reserved + outside
    outside       = own - reserved: the context, NCCL, cuBLAS, graphs, NVSHMEM
    others        = capacity - free - own
Where the message does not say what the process holds, ``outside`` and ``others`` cannot be told apart; their sum is
``beyond`` = capacity - free - reserved.
Known error: amounts are printed with two decimals (half a step is 5 MiB at GiB). In a container the process number of
this process is foreign to the driver, which then lists it as any process; it is taken to be the smallest one that is
not smaller than what PyTorch has reserved.
"""

from __future__ import annotations

from ullage.frozen import Frozen
from ullage.ledger import Certainty, Term, ranged
from ullage.observe.oom import Fact, Size

#: Sums and differences of three amounts printed in GiB with two decimals may be off by this much.
STEP_BYTES = 16 << 20


class Books(Frozen):
    """Amounts in bytes; ``None`` is not known."""

    requested: int
    capacity: int | None = None
    free: int | None = None
    allocated: int | None = None
    reserved: int | None = None
    own: int | None = None
    others: int | None = None
    limit: int | None = None
    foreign: tuple[tuple[int, int], ...] = ()  # (process number, bytes) of other processes

    @property
    def unallocated(self) -> int:
        """Reserved and not allocated; 0 when it is not known."""
        return max(0, self.reserved - self.allocated) if self.reserved is not None and self.allocated is not None else 0

    @property
    def outside(self) -> int | None:
        """Of this process, outside PyTorch."""
        return None if self.own is None or self.reserved is None else max(0, self.own - self.reserved)

    @property
    def beyond(self) -> int | None:
        """Neither PyTorch's nor free: outside PyTorch or of other processes."""
        if self.capacity is None or self.free is None or self.reserved is None:
            return None
        return max(0, self.capacity - self.free - self.reserved)


def books_of(fact: Fact) -> Books:
    """Close the books of a message."""
    capacity, free, allocated = (fact.size(name) for name in ("capacity", "free", "allocated"))
    reserved, unallocated = fact.size("reserved"), fact.size("unallocated")
    if reserved is None and allocated is not None and unallocated is not None:
        reserved = allocated + unallocated
    listed = [(number, size.bytes) for number, size in fact.processes]
    own = fact.size("process_used")
    if own is not None and capacity is not None and own > 4 * capacity:
        own = None  # WSL: the driver does not know, and 2**64 is printed
    if own is None and listed and reserved is not None:
        mine = min(
            (pair for pair in listed if pair[1] >= reserved - STEP_BYTES), key=lambda pair: pair[1], default=None
        )
        if mine is not None:
            own = mine[1]
            listed.remove(mine)
    others = None
    if own is not None and capacity is not None and free is not None:
        others = max(sum(amount for _number, amount in listed), capacity - free - own, 0)
    elif listed:
        others = sum(amount for _number, amount in listed)
    return Books(
        requested=fact.size("requested") or 0,
        capacity=capacity,
        free=free,
        allocated=allocated,
        reserved=reserved,
        own=own,
        others=others,
        limit=fact.size("limit"),
        foreign=tuple(sorted(listed, key=lambda pair: -pair[1])),
    )


def terms_of(fact: Fact, books: Books) -> tuple[Term, ...]:
    """Return where the card's memory was, as measured terms whose ranges are the rounding of the print."""
    printed = dict(fact.sizes)
    source = fact.framework + " message"
    found = [
        _read("allocated", printed["allocated"], source) if "allocated" in printed else None,
        _difference("reserved_unallocated", books.unallocated, "reserved - allocated", source)
        if books.reserved
        else None,
    ]
    if books.outside is not None:
        found.append(_difference("outside_pytorch", books.outside, "process - reserved", source))
        found.append(_difference("other_processes", books.others or 0, "capacity - free - process", source))
    elif books.beyond is not None:
        found.append(_difference("outside_or_others", books.beyond, "capacity - free - reserved", source))
    elif books.others is not None:
        found.append(_difference("other_processes", books.others, "sum of the processes listed", source))
    found.append(_read("free", printed["free"], source) if "free" in printed else None)
    return tuple(term for term in found if term is not None)


def _read(name: str, size: Size, source: str) -> Term:
    half = size.half_step_bytes
    return ranged(
        name,
        size.bytes,
        low=max(0, size.bytes - half),
        high=size.bytes + half,
        formula=size.text,
        source=source,
        certainty=Certainty.MEASURED,
    )


def _difference(name: str, num_bytes: int, formula: str, source: str) -> Term:
    low, high = max(0, num_bytes - STEP_BYTES), num_bytes + STEP_BYTES
    return ranged(name, num_bytes, low=low, high=high, formula=formula, source=source, certainty=Certainty.MEASURED)
