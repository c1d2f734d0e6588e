"""Parameters of a rank added up once for every kind of layer, so that a chunk is a sum over kinds times their numbers.

A :class:`Holding` is the dense or the expert side of one kind of layer, or of what stands outside layers. Its figures
are whole numbers, or arrays with one element a layout; ``choices`` are then the holdings the elements were taken from.
"""

from __future__ import annotations

import sys
from typing import Any

from ullage.engines.megatron.layout import Chunk, Groups
from ullage.engines.megatron.params import RankTensor, adapters, buffer_elements, chunk_tensors, layer_tensors
from ullage.frozen import Frozen, field
from ullage.numeric import lcm
from ullage.spec.model import Layer
from ullage.spec.training import TrainingJob
from ullage.units import round_up

#: Every parameter starts at a multiple of so many elements in the distributed optimizer's buffers.
ALIGNMENT = 64


class Holding(Frozen):
    """Tensors of one side, added up.

    Attributes:
        elements: trained ones; base: without adapters; frozen: the base beside adapters.
        aligned: elements when each tensor starts at a multiple of 64, those of ``closed`` left out.
        closed: aligned elements of buckets that a tied embedding closes or fills.
        linear: elements of weights of GEMMs; quantised: of these, all but routers'.
        largest: elements of the largest tensor; num_tensors: copies counted once; shapes: of weights of GEMMs.
        tensors: the trained ones; choices, index: of an array; known: what was worked out about it.
    """

    elements: int
    base: int
    frozen: int
    aligned: int
    closed: tuple[int, ...]
    linear: int
    quantised: int
    largest: int
    num_tensors: int
    shapes: frozenset[tuple[int, ...]] = frozenset()
    tensors: tuple[RankTensor, ...] = ()
    choices: tuple[Holding, ...] = ()
    index: Any = None
    known: dict[Any, Any] = field(default_factory=dict)


#: Holdings in module order, with how often each comes in a row.
Runs = tuple[tuple[Holding, int], ...]


class Kind(Frozen):
    """A kind of layer, or what a chunk holds outside layers: its two sides.

    Attributes:
        choices, index, known: of an array, as for a holding; ``known`` is what was worked out about choices.
    """

    dense: Holding
    expert: Holding
    choices: tuple[Kind, ...] = ()
    index: Any = None
    known: Any = None

    @property
    def elements(self) -> int:
        """Elements of both sides, without adapters."""
        return self.dense.base + self.expert.base


def distinct_shapes(kinds: list[Kind]) -> tuple[int, int]:
    """Elements of the distinct shapes of linear weights among ``kinds``, and how many shapes they are."""
    first = kinds[0]
    if not first.choices:
        shapes = frozenset().union(*(side.shapes for kind in kinds for side in (kind.dense, kind.expert)))
        return sum(shape[0] * shape[1] for shape in shapes), len(shapes)
    key = tuple(id(kind.choices) for kind in kinds)
    if key not in first.known:
        rows = [distinct_shapes([kind.choices[at] for kind in kinds]) for at in range(len(first.choices))]
        first.known[key] = sys.modules["numpy"].array(rows, dtype="int64")
    found = first.known[key][first.index]
    return found[:, 0], found[:, 1]


def layer_kind(job: TrainingJob, layer: Layer, sizes: Groups) -> Kind:
    """Add up one layer."""
    return _kind(job, layer_tensors(job, layer, sizes))


def root_kind(job: TrainingJob, chunk: Chunk, sizes: Groups) -> Kind:
    """Add up what a chunk holds outside layers: multi-token prediction, embedding, final norms, head."""
    return _kind(job, chunk_tensors(job, chunk, sizes, layers=False))


def _kind(job: TrainingJob, tensors: list[RankTensor]) -> Kind:
    return Kind(
        dense=_holding(job, [tensor for tensor in tensors if not tensor.expert]),
        expert=_holding(job, [tensor for tensor in tensors if tensor.expert]),
    )


def _holding(job: TrainingJob, tensors: list[RankTensor]) -> Holding:
    base = sum(tensor.num_elements for tensor in tensors)
    if job.lora is not None:
        tensors = adapters(job, tensors)
    sums = [tensor.num_elements for tensor in tensors]
    linear = [(tensor, size) for tensor, size in zip(tensors, sums, strict=True) if tensor.linear]
    aligned, closed = _buckets(tensors)
    return Holding(
        elements=sum(sums),
        base=base,
        frozen=base if job.lora is not None else 0,
        aligned=aligned,
        closed=closed,
        linear=sum(size for _tensor, size in linear),
        quantised=sum(size for tensor, size in linear if ".gate." not in tensor.name),
        largest=max((size // tensor.copies for tensor, size in zip(tensors, sums, strict=True)), default=0),
        num_tensors=len(tensors),
        shapes=frozenset(tensor.shape for tensor, _size in linear if not tensor.name.endswith(".gate.weight")),
        tensors=tuple(tensors),
    )


def _buckets(tensors: list[RankTensor]) -> tuple[int, tuple[int, ...]]:
    """Return aligned elements of the bucket that stays open, and of those that tied embeddings close.

    Buffers fill from the last parameter to the first; what comes before in module order joins the open bucket.
    """
    closed: list[int] = []
    at = 0
    for tensor in reversed(tensors):
        size = round_up(tensor.num_elements // tensor.copies, ALIGNMENT) * tensor.copies
        if tensor.shared_embedding:
            closed += [at, size]
            at = 0
        else:
            at += size
    return at, tuple(closed)


def buffered(runs: Runs, *, data: int, distributed: bool, bucket: int | None, granule: int = 128) -> int:
    """Elements of a parameter or gradient buffer of ``(holding, times)``, padding included.

    Formula: without the distributed optimizer the sum. With it every parameter starts at a multiple of 64 elements and
        every bucket ends at a multiple of m = lcm(N, granule): sum over buckets of ceil(aligned / m) * m, N
        data-parallel ranks, granule 128 (2**16 with ``--ddp-pad-buckets-for-high-nccl-busbw``). A tied embedding is a
        bucket of its own, all else one bucket; of buckets of a size see ``by_buckets``.
    Source: Megatron-LM@adc69db:megatron/core/distributed/param_and_grad_buffer.py:_ParamAndGradBuffer.__init__.
    """
    if not distributed:
        return sum(holding.elements * times for holding, times in runs)
    if bucket is not None:
        return _by_buckets(runs, data, bucket, granule)
    multiple = lcm(data, granule)
    found = round_up(sum(holding.aligned * times for holding, times in runs), multiple)
    for holding, times in runs:
        found = found + sum(round_up(size, multiple) * times for size in holding.closed)
    return found


def _by_buckets(runs: Runs, data: Any, bucket: Any, granule: int) -> int:
    """Buckets of a size, closed one after the other: layout by layout."""
    choices, index = runs[0][0].choices, runs[0][0].index
    if not choices:
        return buffer_elements(_tensors(runs), data=data, distributed=True, bucket=bucket, granule=granule)
    known: dict[tuple[int, int], int] = {}
    rows = list(zip(index.tolist(), data.tolist(), strict=True))
    for at, (choice, ranks) in enumerate(rows):
        if (choice, ranks) not in known:
            one = tuple((holding.choices[choice], times) for holding, times in runs)
            limit = bucket if isinstance(bucket, int) else int(bucket[at])
            known[choice, ranks] = buffer_elements(
                _tensors(one), data=ranks, distributed=True, bucket=limit, granule=granule
            )
    found: int = sys.modules["numpy"].array([known[row] for row in rows], dtype="int64")
    return found


def _tensors(runs: Runs) -> list[RankTensor]:
    return [tensor for holding, times in runs for _time in range(times) for tensor in holding.tensors]


class Side(Frozen):
    """Dense or expert parameters of one chunk.

    Attributes:
        runs: holdings in module order, with how often each comes in a row.
        buffered: elements of the buffer; shard: whose optimizer states this rank holds.
    """

    runs: Runs
    buffered: int
    shard: int

    def sum(self, name: str) -> int:
        """Add up an attribute of the holdings."""
        return sum(getattr(holding, name) * times for holding, times in self.runs)
