"""Parameters of many layouts: every share of tensor and of expert parallelism is counted once, then dealt out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ullage.engines.megatron import padded_vocabulary
from ullage.engines.megatron.defaults import Settings
from ullage.engines.megatron.holdings import Holding, Kind, layer_kind, root_kind
from ullage.engines.megatron.layout import Chunk, Groups
from ullage.engines.megatron.shape import Sizes
from ullage.engines.megatron.tables import Tables
from ullage.errors import LayoutError
from ullage.plan.layouts import Layouts, Reason
from ullage.plan.rows import distinct
from ullage.spec.model import Layer
from ullage.spec.training import TrainingJob

#: Figures of a holding that are arrays in a holding of many layouts.
FIGURES = ("elements", "base", "frozen", "aligned", "linear", "quantised", "largest")
Count = Callable[[TrainingJob, Groups], Kind]


def _layer(layer: Layer, job: TrainingJob, groups: Groups) -> Kind:
    return layer_kind(job, layer, groups)


def _root(chunk: Chunk, job: TrainingJob, groups: Groups) -> Kind:
    return root_kind(job, chunk, groups)


class Shares:
    """The distinct shares of layouts.

    Attributes:
        index: of each layout, the number of its share; vocab_size: with padding, layout by layout.
    """

    def __init__(self, template: TrainingJob, given: Layouts, reason: Any) -> None:
        self._template = template
        self._sides: dict[object, Kind] = {}
        self._kinds: dict[object, tuple[Kind, ...]] = {}
        self._columns: dict[object, dict[str, Any]] = {}
        self._known: dict[object, Any] = {}
        columns = (given.tensor_parallel_size, given.expert_tensor_parallel_size, given.expert_parallel_size)
        first, self.index = distinct(*columns)
        self._all = [tuple(int(column[row]) for column in columns) for row in first]
        self._jobs = {tensor: self._job(tensor) for tensor in {share[0] for share in self._all}}
        self.vocab_size = np.array([self._jobs[share[0]].model.vocab_size for share in self._all])[self.index]
        codes = np.array([self._refused(share) for share in self._all], dtype=reason.dtype)
        reason[reason == 0] = codes[self.index][reason == 0]
        self._legal = [share for share, code in zip(self._all, codes, strict=True) if not code]
        self.index = (np.cumsum(codes == 0) - 1)[self.index]

    def _job(self, tensor: int) -> TrainingJob:
        parallel = replace(self._template.parallel, tensor_parallel_size=tensor)
        return padded_vocabulary(replace(self._template, parallel=parallel))[0]

    def _refused(self, share: tuple[int, ...]) -> Reason:
        """Say why a share cannot be."""
        layers = list({id(layer): layer for layer in self._template.model.layers}.values())
        everything = Chunk(pp_rank=0, virtual=0, layers=(), embedding=True, head=True, mtp=True)
        counts = [(id(layer), partial(_layer, layer)) for layer in layers]
        counts.append((0, partial(_root, everything)))
        if not self._counted(counts, (*share[:2], 1)):
            return Reason.TENSOR
        return Reason.LEGAL if self._counted(counts, share) else Reason.EXPERTS

    def _counted(self, counts: Sequence[tuple[int, Count]], share: tuple[int, ...]) -> bool:
        try:
            for what, count in counts:
                self._kind(what, count, share)
        except LayoutError:
            return False
        return True

    def _kind(self, what: object, count: Count, share: tuple[int, ...]) -> Kind:
        """Join the dense side, which TP divides, and the expert side, which ETP and EP do."""
        tensor, expert_tensor, expert = share
        dense = self._side((what, tensor), count, (tensor, 1, 1))
        experts = self._side((what, expert_tensor, expert), count, (1, expert_tensor, expert))
        return Kind(dense=dense.dense, expert=experts.expert)

    def _side(self, key: object, count: Count, share: tuple[int, int, int]) -> Kind:
        if key not in self._sides:
            groups = Groups(data=1, expert_data=1, expert=share[2], expert_tensor=share[1])
            self._sides[key] = count(self._jobs.get(share[0]) or self._job(share[0]), groups)
        return self._sides[key]

    def layer(self, layer: Layer, index: Any) -> Kind:
        """Return a kind of layer for the layouts whose shares are ``index``."""
        return self._dealt(id(layer), partial(_layer, layer), index)

    def root(self, chunk: Chunk, index: Any) -> Kind:
        """Return what a chunk holds outside layers."""
        bare = replace(chunk, layers=())
        what = (chunk.embedding, chunk.head, chunk.mtp)
        return self._dealt(what, partial(_root, bare), index)

    def _dealt(self, what: object, count: Count, index: Any) -> Kind:
        if what not in self._kinds:
            self._kinds[what] = tuple(self._kind(what, count, share) for share in self._legal)
        choices = self._kinds[what]
        return Kind(
            dense=self._holding((what, "dense"), choices, index),
            expert=self._holding((what, "expert"), choices, index),
            choices=choices,
            index=index,
            known=self._known,
        )

    def _holding(self, key: tuple[object, str], kinds: tuple[Kind, ...], index: Any) -> Holding:
        columns = self._columns.get(key)
        if columns is None:
            choices = tuple(getattr(kind, key[1]) for kind in kinds)
            columns = {name: np.array([getattr(one, name) for one in choices], dtype=np.int64) for name in FIGURES}
            columns["closed"] = np.array([one.closed for one in choices], dtype=np.int64).reshape(len(choices), -1)
            columns["choices"] = choices  # kept: what is known of them goes by their identity
            self._columns[key] = columns
        choices = columns["choices"]
        figures = {name: columns[name][index] for name in FIGURES}
        return Holding(
            **figures,
            closed=tuple(columns["closed"].T[:, index]),
            num_tensors=choices[0].num_tensors,
            choices=choices,
            index=index,
            known=self._known,
        )


class SharedTables(Tables):
    """Tables whose parameters are arrays, an element a layout."""

    def __init__(
        self, job: TrainingJob, settings: Settings, sizes: Sizes, groups: Groups, shares: Shares, index: Any
    ) -> None:
        super().__init__(job, settings, sizes, groups)
        self._shares, self._index = shares, index

    def kind(self, layer: Layer) -> Kind:
        """Return the parameters of a kind of layer."""
        if id(layer) not in self._kinds:
            self._kinds[id(layer)] = self._shares.layer(layer, self._index)
        return self._kinds[id(layer)]

    def root(self, chunk: Chunk) -> Kind:
        """Return the parameters of a chunk outside layers."""
        what = (chunk.embedding, chunk.head, chunk.mtp)
        if what not in self._roots:
            self._roots[what] = self._shares.root(chunk, self._index)
        return self._roots[what]
