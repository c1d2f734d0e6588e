"""What a step runs under: a tracker, meta tensors that pass for a GPU's, and one rank of as many as the job has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ullage.trace.cuda.functions import CudaFunctions
from ullage.trace.cuda.patches import cuda_stand_ins
from ullage.trace.job import TraceJob
from ullage.trace.ranks.fake_group import fake_ranks
from ullage.trace.ranks.spread import replicate
from ullage.trace.recorder import events as names
from ullage.trace.recorder.shadows import Routing
from ullage.trace.recorder.temporaries import Kernels
from ullage.trace.recorder.tracker import Tracker
from ullage.trace.step.guarded import guarded


def start(job: TraceJob, *, stacks: bool) -> tuple[Tracker, CudaFunctions]:
    """Return a tracker for a job, and the functions' stand-ins."""
    attention = "auto" if job.attention == "eager" else job.attention
    kernels = Kernels(compute_capability=job.compute_capability, attention=attention)
    return Tracker(kernels=kernels, routing=Routing(skew=job.routing_skew), stacks=stacks), CudaFunctions(kernels)


@contextmanager
def on_one_rank(job: TraceJob, *, stacks: bool) -> Iterator[Tracker]:
    """Let meta tensors pass for those of a job's GPU, and be one of its ranks; nothing is recorded yet."""
    tracker, functions = start(job, stacks=stacks)
    with fake_ranks(tracker, job.num_ranks, job.rank), cuda_stand_ins(tracker, functions), functions:
        yield tracker


def replica(tracker: Tracker, job: TraceJob, model: Any) -> Any:
    """Wrap a model in DDP where the job asks for it: its buckets are taken now."""
    if not job.ddp:
        return model
    with tracker.positions.phase(names.SETUP), tracker.taking_for(names.COMMUNICATION):
        return guarded(lambda: replicate(model))
