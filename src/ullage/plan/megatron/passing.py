"""What micro-batches in flight need, for many layouts: tables by sizes, moments by passes of a step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ullage.engines.megatron.costs import chunk_cost
from ullage.engines.megatron.defaults import Settings
from ullage.engines.megatron.layout import Chunk, Groups
from ullage.engines.megatron.moments import contents, loads_of, moments_of, pass_group
from ullage.engines.megatron.schedule import Load, both_ways, fullest, settled
from ullage.engines.megatron.tables import Tables
from ullage.plan.layouts import Layouts
from ullage.plan.megatron.columns import job_of, sized
from ullage.plan.megatron.shares import Shares
from ullage.plan.rows import distinct, numbers, split
from ullage.spec.training import TrainingJob

#: What decides the sizes of a micro-batch on a rank.
SIZES = (
    "micro_batch_size",
    "seq_len",
    "context_parallel_size",
    "tensor_parallel_size",
    "sequence_parallel",
    "expert_tensor_parallel_size",
)
_NO_GROUPS = Groups(data=1, expert_data=1, expert=1, expert_tensor=1)


@dataclass(frozen=True, kw_only=True)
class ChunkBytes:
    """Bytes of one chunk, an element for each recompute and distinct size of a micro-batch.

    Attributes:
        kept: of one micro-batch; on_top: during the fullest moment of a pass, by direction (forward: True).
    """

    kept: Any
    on_top: dict[bool, Any]


@dataclass(frozen=True, kw_only=True)
class Passing:
    """The fullest moment of the passes of a class of ranks: kept activations, bytes on top, the pipeline rank."""

    kept: Any
    on_top: Any
    pp_rank: Any


@dataclass(frozen=True, kw_only=True)
class Moments:
    """The distinct (sizes, recompute, accumulation) of layouts.

    Attributes:
        number: of each layout among them; cost: of each of them, its sizes and recompute; groups: those of one
            accumulation.
    """

    number: Any
    cost: Any
    groups: list[tuple[Any, int]]


class Passes:
    """Costs of passes of the legal layouts ``rows``."""

    def __init__(self, template: TrainingJob, settings: Settings, given: Layouts, shares: Shares, rows: Any) -> None:
        self._template, self._settings, self._given = template, settings, given
        first, size = distinct(*(getattr(given, name)[rows] for name in SIZES))
        self._size = numbers(len(given))
        self._size[rows] = size
        self._number = len(first)
        job = job_of(template, given, rows[first])
        sizes = sized(job, settings, shares.vocab_size[rows[first]])
        self._tables = [
            Tables(replace(job, recompute=recompute), settings, sizes, _NO_GROUPS) for recompute in given.recomputes
        ]
        self._chunks: dict[tuple[object, ...], ChunkBytes] = {}

    def moments(self, job: TrainingJob, virtual: int, rows: Any) -> Moments:
        """Tell apart the rows of one pipeline; beyond a settled pipeline more accumulation changes no peak."""
        passes: Any = settled(
            schedule=job.parallel.schedule or "1f1b",
            pipeline=job.parallel.pipeline_parallel_size,
            virtual=virtual,
            num_micro_batches=self._given.grad_accum[rows],
            group=pass_group(job, self._settings),
        )
        cost = self._given.recompute[rows] * self._number + self._size[rows]
        first, number = distinct(cost, passes)
        groups = [(own, int(passes[first[own[0]]])) for own in split(np.arange(len(first)), passes[first])]
        return Moments(number=number, cost=cost[first], groups=groups)

    def of_class(self, job: TrainingJob, alike: list[tuple[Chunk, ...]], moments: Moments) -> Passing:
        """Return the fullest moment of the passes of equal ranks, layout by layout."""
        kept, on_top, pp_rank = (numbers(len(moments.cost)) for _array in range(3))
        chunks = [self._chunk(chunk) for chunk in alike[0]]
        for own, passes in moments.groups:
            loads = _loads(replace(job, grad_accum=passes), self._settings, alike)
            at = moments.cost[own]
            best = numbers(len(own), -1)
            for live, (rank, kinds) in loads.items():
                more = chunks[kinds[0].virtual].on_top[kinds[0].forward]
                for load in kinds[1:]:
                    more = np.maximum(more, chunks[load.virtual].on_top[load.forward])
                more = more[at]
                now = sum(count * chunk.kept[at] for count, chunk in zip(live, chunks, strict=True) if count)
                better = now + more > best
                best = np.where(better, now + more, best)
                kept[own], on_top[own] = np.where(better, now, kept[own]), np.where(better, more, on_top[own])
                pp_rank[own] = np.where(better, rank, pp_rank[own])
        number = moments.number
        return Passing(kept=kept[number], on_top=on_top[number], pp_rank=pp_rank[number])

    def _chunk(self, chunk: Chunk) -> ChunkBytes:
        key = contents(self._template, chunk)
        if key not in self._chunks:
            each = [self._one(tables, chunk) for tables in self._tables]
            self._chunks[key] = ChunkBytes(
                kept=np.concatenate([one[0] for one in each]),
                on_top={
                    True: np.concatenate([one[1] for one in each]),
                    False: np.concatenate([one[2] for one in each]),
                },
            )
        return self._chunks[key]

    def _one(self, tables: Tables, chunk: Chunk) -> tuple[Any, Any, Any]:
        """Under one recompute: bytes kept, and on top in the fullest moment forward and backward."""
        cost = chunk_cost(tables, chunk)
        found = [np.broadcast_to(cost.saved.bytes, self._number)]
        for forward in (True, False):
            most = numbers(self._number)
            for _moment, terms in moments_of(tables, cost, forward=forward):
                most = np.maximum(most, sum(term.bytes for term in terms))
            found.append(most)
        return found[0], found[1], found[2]


def _loads(
    job: TrainingJob, settings: Settings, alike: list[tuple[Chunk, ...]]
) -> dict[tuple[int, ...], tuple[int, list[Load]]]:
    """Micro-batches held, where they can be the most of all the ranks: the first such rank, and the passes at work."""
    ranks: dict[Load, int] = {}
    for parts in alike if both_ways(job.parallel.schedule or "1f1b") else alike[:1]:
        for load in loads_of(job, settings, parts[0].pp_rank, len(parts)):
            ranks.setdefault(load, parts[0].pp_rank)
    found: dict[tuple[int, ...], tuple[int, list[Load]]] = {}
    for load in fullest(tuple(ranks)):
        rank, kinds = found.setdefault(load.live, (ranks[load], []))
        kinds.append(load)
        found[load.live] = (min(rank, ranks[load]), kinds)
    return found
