"""The fullest rank of many layouts: pipelines one by one, in each the classes of equal ranks."""

from __future__ import annotations

from typing import Any

import numpy as np

from ullage.engines.megatron import layout
from ullage.engines.megatron.buffers import buffers
from ullage.engines.megatron.defaults import resolve
from ullage.engines.megatron.layout import Chunk
from ullage.engines.megatron.moments import composition, resident_terms
from ullage.engines.megatron.outside import fragmentation
from ullage.engines.megatron.states import gathered, states
from ullage.errors import LayoutError
from ullage.ledger import exact
from ullage.plan.layouts import Layouts, Reason
from ullage.plan.megatron.columns import PIPELINE, grouped, job_of, sized
from ullage.plan.megatron.passing import Passes, Passing
from ullage.plan.megatron.shares import SharedTables, Shares
from ullage.plan.rows import numbers, split
from ullage.spec.model import MoEFFN
from ullage.spec.training import TrainingJob

#: What a layout's allocated peak is made of: states by name, activations kept, what the moment needs on top, buffers.
STATES = ("weights", "fp8_weights", "gradients", "master_weights", "optimizer_moments", "allocator_rounding")
TERMS = (*STATES, "activations", "moment", "buffers")


class Walk:
    """The peaks of many layouts of one job.

    Attributes:
        reason: a :class:`Reason` each; allocated, reserved, used: bytes of the fullest rank at its worst moment, -1
            where there is none; pp_rank: its stage; terms: of ``allocated``, by name, if asked for.
    """

    def __init__(self, template: TrainingJob, given: Layouts, *, terms: bool = False) -> None:
        number = len(given)
        self._template, self._given, self._settings = template, given, resolve(template)[0]
        self.reason = numbers(number)
        self.allocated, self.reserved = numbers(number, -1), numbers(number, -1)
        self.used, self.pp_rank = numbers(number, -1), numbers(number, -1)
        self.terms = {name: numbers(number) for name in TERMS if terms}
        self._refuse()
        self._shares = Shares(template, given, self.reason)
        rows = np.flatnonzero(self.reason == 0)
        if len(rows):
            self._passes = Passes(template, self._settings, given, self._shares, rows)
        for own in split(rows, *(getattr(given, name)[rows] for name in PIPELINE)):
            self._pipeline(own)

    def _refuse(self) -> None:
        """Mark layouts that do not use the machine, or over whose ranks experts do not go round."""
        given = self._given
        stage = given.data_parallel_size * given.context_parallel_size * given.tensor_parallel_size
        self.reason[stage * given.pipeline_parallel_size != self._template.machine.num_gpus] = Reason.WORLD
        if any(isinstance(block, MoEFFN) for layer in self._template.model.layers for block in layer.ffns):
            uneven = stage % (given.expert_parallel_size * given.expert_tensor_parallel_size) != 0
            self.reason[(self.reason == 0) & uneven] = Reason.EXPERT_GROUPS

    def _pipeline(self, rows: Any) -> None:
        """Layouts of one pipeline."""
        job = job_of(self._template, self._given, rows)
        try:
            stages = layout.chunks(job, self._settings)
        except LayoutError:
            self.reason[rows] = Reason.STAGES
            return
        classes: dict[tuple[object, ...], list[tuple[Chunk, ...]]] = {}
        for parts in stages:
            classes.setdefault(composition(job, parts), []).append(parts)
        moments = self._passes.moments(job, len(stages[0]), rows)
        passing = [self._passes.of_class(job, alike, moments) for alike in classes.values()]
        for own in split(np.arange(len(rows)), self._given.zero_stage[rows]):
            tables = self._tables(rows[own])
            for alike, passes in zip(classes.values(), passing, strict=True):
                self._rank(tables, alike[0], passes, rows[own], own)
            self._around(tables, rows[own])

    def _tables(self, rows: Any) -> SharedTables:
        job = job_of(self._template, self._given, rows)
        settings = resolve(job)[0]
        sizes = sized(job, settings, self._shares.vocab_size[rows])
        return SharedTables(job, settings, sizes, grouped(job), self._shares, self._shares.index[rows])

    def _rank(self, tables: SharedTables, parts: tuple[Chunk, ...], passes: Passing, rows: Any, own: Any) -> None:
        """Show one class of ranks, whose passes of these ``rows`` are ``own``: the fullest is kept."""
        job, settings, sizes = tables.job, tables.settings, tables.sizes
        kinds = tuple(tables.held(chunk) for chunk in parts)
        held = states(job, settings, parts, kinds, tables.groups)
        persistent = buffers(job, settings, parts, sizes, kinds)
        resident = (*resident_terms(job, settings, sizes, parts, persistent), gathered(job, kinds))
        own_bytes = sum(term.bytes for term in held.terms)
        around = sum(term.bytes for term in resident)
        kept, on_top = passes.kept[own], passes.on_top[own]
        during = own_bytes - held.step_only_bytes + around + kept + on_top
        after = own_bytes + sum(term.bytes for term in persistent)
        now, pp_rank = np.maximum(during, after), np.where(during >= after, passes.pp_rank[own], parts[0].pp_rank)
        before = self.allocated[rows]
        better = (now > before) | ((now == before) & (pp_rank < self.pp_rank[rows]))
        self.allocated[rows] = np.where(better, now, before)
        self.pp_rank[rows] = np.where(better, pp_rank, self.pp_rank[rows])
        if self.terms:
            found = {term.name: term.bytes for term in held.terms}
            passing = during >= after
            found["gradients"] = found["gradients"] - np.where(passing, held.step_only_bytes, 0)
            found |= {"activations": np.where(passing, kept, 0), "moment": np.where(passing, on_top, 0)}
            found["buffers"] = now - sum(found.values())
            for name, column in self.terms.items():
                column[rows] = np.where(better, found[name], column[rows])

    def _around(self, tables: SharedTables, rows: Any) -> None:
        """What lies outside allocated bytes."""
        allocated = self.allocated[rows]
        self.reserved[rows] = allocated + fragmentation(tables.job, exact("allocated", allocated)).bytes
        self.used[rows] = self.reserved[rows] + tables.outside.bytes
