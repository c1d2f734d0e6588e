"""Layouts as a job: arrays stand where a job of one layout has numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ullage.engines.megatron.defaults import Settings
from ullage.engines.megatron.layout import Groups, group_sizes
from ullage.engines.megatron.shape import Sizes, sizes_of
from ullage.plan.layouts import SCHEDULES, Layouts
from ullage.spec.training import TrainingJob

#: What splits layouts into pipelines.
PIPELINE = ("pipeline_parallel_size", "virtual_pipeline_parallel_size", "schedule")


def job_of(template: TrainingJob, given: Layouts, rows: Any) -> TrainingJob:
    """Return the layouts ``rows`` as one job. Stages, schedule and ZeRO stage are those of the first of them."""
    parallel = replace(
        template.parallel,
        data_parallel_size=given.data_parallel_size[rows],
        tensor_parallel_size=given.tensor_parallel_size[rows],
        context_parallel_size=given.context_parallel_size[rows],
        sequence_parallel=given.sequence_parallel[rows] == 1,
        expert_parallel_size=given.expert_parallel_size[rows],
        expert_tensor_parallel_size=given.expert_tensor_parallel_size[rows],
        pipeline_parallel_size=int(given.pipeline_parallel_size[rows[0]]),
        virtual_pipeline_parallel_size=int(given.virtual_pipeline_parallel_size[rows[0]]),
        schedule=SCHEDULES[int(given.schedule[rows[0]])],
        zero_stage=int(given.zero_stage[rows[0]]),
    )
    return replace(
        template,
        parallel=parallel,
        micro_batch_size=given.micro_batch_size[rows],
        seq_len=given.seq_len[rows],
        grad_accum=given.grad_accum[rows],
    )


def sized(job: TrainingJob, settings: Settings, vocab_size: Any) -> Sizes:
    """Sizes of the micro-batches."""
    return replace(sizes_of(job, settings), vocab_size=vocab_size)


def grouped(job: TrainingJob) -> Groups:
    """Groups that shard states."""
    return group_sizes(job.parallel)


def full(value: Any, number: int) -> Any:
    """Return a number or an array as an array."""
    return np.broadcast_to(value, number)
