"""The ledger: everything that is known of the memory of one rank at one moment, as a tree of terms.

A prediction, a trace and a measurement are all ledgers, so that they can be compared term by term.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import field
from enum import Enum

from ullage.frozen import Frozen
from ullage.numeric import larger, smaller, some


class Certainty(str, Enum):
    """How sure a figure is, surest first."""

    MEASURED = "measured"  # read off a device or an engine's log
    EXACT = "exact"  # follows from the model and the engine's rules with no freedom
    CALIBRATED = "calibrated"  # a model whose constants were measured on this kind of device
    MODELLED = "modelled"  # a formula with a stated error
    ASSUMED = "assumed"  # something was not given and a default was taken


_RANK_OF = {certainty: rank for rank, certainty in enumerate(Certainty)}


class Term(Frozen):
    """One named amount of memory.

    Attributes:
        name: the field's standard name, snake case: ``weights``, ``kv_cache``, ``cuda_graphs``.
        bytes: the expected amount, exact integer. A term with children is their sum.
        low_bytes, high_bytes: the honest range; equal to ``bytes`` when the term is exact.
        certainty: how sure.
        formula: the formula with its symbols filled in, for people.
        source: where the formula stands: paper equation, or ``project@version:file:function``.
        children: what it is made of.
    """

    name: str
    bytes: int
    low_bytes: int
    high_bytes: int
    certainty: Certainty
    formula: str = ""
    source: str = ""
    children: tuple[Term, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.bytes, int) and not self.low_bytes <= self.bytes <= self.high_bytes:
            raise ValueError(f"term {self.name}: {self.low_bytes} <= {self.bytes} <= {self.high_bytes} does not hold")

    def walk(self) -> Iterator[Term]:
        """Yield this term and all below it, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()


def exact(name: str, num_bytes: int, *, formula: str = "", source: str = "") -> Term:
    """Return a term without a range."""
    return Term(
        name=name,
        bytes=num_bytes,
        low_bytes=num_bytes,
        high_bytes=num_bytes,
        certainty=Certainty.EXACT,
        formula=formula,
        source=source,
    )


def ranged(
    name: str,
    num_bytes: int,
    *,
    low: int,
    high: int,
    formula: str = "",
    source: str = "",
    certainty: Certainty = Certainty.MODELLED,
) -> Term:
    """Return a term with the range ``low``..``high`` in bytes; the range is widened to hold the expected value."""
    return Term(
        name=name,
        bytes=num_bytes,
        low_bytes=smaller(low, num_bytes),
        high_bytes=larger(high, num_bytes),
        certainty=certainty,
        formula=formula,
        source=source,
    )


def total(name: str, children: Iterable[Term], *, formula: str = "", source: str = "") -> Term:
    """Return the sum of ``children``. Ranges add end to end (no independence assumed), certainty is the weakest."""
    parts = tuple(child for child in children)
    weakest = max(
        (child.certainty for child in parts if some(child.bytes) or some(child.high_bytes)),
        key=_RANK_OF.__getitem__,
        default=Certainty.EXACT,
    )
    return Term(
        name=name,
        bytes=sum(child.bytes for child in parts),
        low_bytes=sum(child.low_bytes for child in parts),
        high_bytes=sum(child.high_bytes for child in parts),
        certainty=weakest,
        formula=formula or " + ".join(child.name for child in parts),
        source=source,
        children=parts,
    )


def merged(terms: Iterable[Term]) -> list[Term]:
    """Return one term for each name, in order of first mention: the chunks of a pipeline stage become one row."""
    found: dict[str, list[Term]] = {}
    for term in terms:
        found.setdefault(term.name, []).append(term)
    return [
        alike[0]
        if len(alike) == 1
        else total(name, alike, source=next((one.source for one in alike if one.source), ""))
        for name, alike in found.items()
    ]


class Ledger(Frozen):
    """The memory of one rank at one moment.

    Attributes:
        rank: global rank number (of the first rank, for a class of equal ranks).
        moment: when, such as ``steady state`` or ``optimizer step``.
        allocated: what the framework's allocator hands out (PyTorch: allocated bytes).
        reserved_overhead: rounding and fragmentation on top of ``allocated`` (reserved - allocated).
        outside: what the framework's allocator does not see: context, NCCL, graphs, NVSHMEM.
        warnings: sentences for the user about this ledger.
    """

    rank: int = 0
    moment: str = "steady state"
    allocated: Term
    reserved_overhead: Term
    outside: Term
    warnings: tuple[str, ...] = field(default=())

    @property
    def reserved(self) -> Term:
        """Reserved bytes: allocated plus the allocator's overhead."""
        return total("reserved", (self.allocated, self.reserved_overhead))

    @property
    def device_used(self) -> Term:
        """Everything on the card, as ``nvidia-smi`` shows it."""
        return total("device_used", (self.allocated, self.reserved_overhead, self.outside))

    def terms(self) -> tuple[Term, ...]:
        """The top-level terms, in ledger order, empty ones left out."""
        parts = (*self.allocated.children, self.reserved_overhead, *self.outside.children)
        return tuple(term for term in parts if term.bytes or term.high_bytes)

    def find(self, name: str) -> Term | None:
        """Return the first term called ``name``, at any depth."""
        for term in self.device_used.walk():
            if term.name == name:
                return term
        return None
