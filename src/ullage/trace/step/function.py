"""The step of a user's function: its own, or a plain one over the module and inputs that it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ullage.errors import InputError
from ullage.i18n import _
from ullage.trace.job import TraceJob
from ullage.trace.models.function import Traced, call_function, to_meta
from ullage.trace.ranks.spread import check_wrapping
from ullage.trace.recorder.tracker import Tracker
from ullage.trace.step.guarded import guarded
from ullage.trace.step.loops import run_inference, run_training
from ullage.trace.step.session import on_one_rank, replica

#: What is done to a model that is built here; a module of the user's is as the function made it.
OF_MODELS = ("dtype", "recompute", "lora", "base", "nested", "group_size", "prepare")
#: What a plain step is made of; a step of the user's own does what it does.
OF_STEPS = ("grad_accum", "autocast", "optimizer", "optimizer_impl", "clip", "inference")
_OPTIONS = {"nested": "--no-double-quant"}


def trace_function(
    function: Callable[..., Any], job: TraceJob, where: str, *, stacks: bool = False
) -> tuple[Tracker, Any]:
    """Trace the step of what a user's function gives; return the tracker and the module."""
    with on_one_rank(job, stacks=stacks) as tracker:
        traced = guarded(lambda: call_function(function, job, where))
        check_wrapping(job, traced)
        _check_options(job, traced)
        model = traced.module
        to_meta(model)
        with tracker.watching():
            tracker.hold(model)
            traced.module = replica(tracker, job, model)
            guarded(lambda: _steps(tracker, job, traced))
    return tracker, model


def _check_options(job: TraceJob, traced: Traced) -> None:
    """Refuse options that would change nothing of what the function gave.

    Raises:
        InputError: some were stated.
    """
    own = OF_STEPS if traced.step is not None else OF_STEPS[-4:-2] if traced.optimizer is not None else ()
    found = job.stated(*OF_MODELS, *own)
    if found:
        raise InputError(
            _("{options} would change nothing of a step of your own").format(
                options=", ".join(_OPTIONS.get(name, "--" + name.replace("_", "-")) for name in found)
            ),
            remedy=_("do so in your function, or trace a model by its name"),
        )


def _steps(tracker: Tracker, job: TraceJob, traced: Traced) -> None:
    if traced.step is not None:
        for step in range(job.steps):
            tracker.positions.step = step
            traced.step()
        return
    if job.inference:
        run_inference(tracker, job, traced.module, traced.inputs, traced.call)
        return
    optimizer = None
    if traced.optimizer is not None:
        optimizer = traced.optimizer([each for each in traced.module.parameters() if each.requires_grad])
    run_training(tracker, job, traced.module, traced.inputs, traced.loss_of, optimizer)
