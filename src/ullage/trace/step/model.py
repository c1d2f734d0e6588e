"""The step of a model of transformers."""

from __future__ import annotations

from typing import Any

from ullage.trace.job import TraceJob
from ullage.trace.models.function import Traced
from ullage.trace.ranks.spread import spread
from ullage.trace.recorder.tracker import Tracker
from ullage.trace.step.guarded import guarded
from ullage.trace.step.loops import run_inference, run_training, token_batch
from ullage.trace.step.session import on_one_rank, replica


def trace_model(model: Any, config: Any, job: TraceJob, *, stacks: bool = False) -> Tracker:
    """Trace the step of a prepared model of transformers as it is, all layers."""
    for each in model.parameters():
        each.grad = None
    for each in model.modules():
        if hasattr(each, "begin_again"):
            each.begin_again()
    with on_one_rank(job, stacks=stacks) as tracker:
        batch = token_batch(job, config.vocab_size)
        model = guarded(lambda: spread(model, job))
        _trace_steps(tracker, job, model, batch)
    return tracker


def _trace_steps(tracker: Tracker, job: TraceJob, model: Any, batch: Any) -> None:
    traced = Traced(model, inputs=batch)
    with tracker.watching():
        tracker.hold(model)
        model = replica(tracker, job, model)
        if job.inference:
            batch.pop("labels")
            guarded(lambda: run_inference(tracker, job, model, batch, traced.call))
        else:
            guarded(lambda: run_training(tracker, job, model, batch, traced.loss_of))
