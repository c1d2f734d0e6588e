"""Megatron-LM: one optimizer step, rank class by rank class.

``step(job)`` resolves Megatron-LM's defaults, places layers on pipeline ranks, and walks each rank's schedule. Ranks of
one pipeline stage are equal (balanced routing); each stage is a class.
"""

from __future__ import annotations

from dataclasses import replace

from ullage.engines.megatron import layout
from ullage.engines.megatron.defaults import VERSIONS, resolve
from ullage.engines.megatron.moments import rank_of
from ullage.engines.megatron.shape import sizes_of
from ullage.engines.training import TrainingStep
from ullage.spec.training import TrainingJob

__all__ = ["VERSIONS", "step"]


def step(job: TrainingJob) -> TrainingStep:
    """Walk one step of the job.

    Raises:
        LayoutError: sizes that do not divide the model or the GPUs. UnknownArchitectureError: a part without a table.
    """
    settings, assumed = resolve(job)
    groups, sizes = layout.groups(job), sizes_of(job, settings)
    stages = layout.chunks(job, settings)
    per_stage = job.parallel.tensor_parallel_size * groups.data
    last_order = settings.on("use-tp-pp-dp-mapping")
    ranks = []
    for index, parts in enumerate(stages):
        first = index * (
            job.parallel.tensor_parallel_size * job.parallel.context_parallel_size if last_order else per_stage
        )
        ranks.append(rank_of(job, settings, parts, groups, sizes, first_rank=first))
    ranks.sort(key=lambda rank: -rank.peak.device_used.bytes)
    filled = replace(job, assumed=(*job.assumed, *assumed))
    return TrainingStep(job=filled, ranks=tuple(ranks))
