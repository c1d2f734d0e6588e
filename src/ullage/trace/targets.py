"""What may be traced, a model's name, a user's function or a module, and the trace of it with the model's counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ullage.errors import InputError
from ullage.i18n import _
from ullage.trace.job import TraceJob
from ullage.trace.models.function import load_function
from ullage.trace.models.hf import build_model
from ullage.trace.models.prepare import prepare
from ullage.trace.ranks.spread import sentences
from ullage.trace.recorder.events import Trace
from ullage.trace.repeat.layers import trace_layers
from ullage.trace.stand_ins.quantised import num_elements
from ullage.trace.step.function import trace_function


@dataclass(kw_only=True)
class Done:
    """A trace with the model's counts."""

    trace: Trace
    name: str
    num_parameters: int
    num_trained: int
    num_layers: int = 0
    num_layers_traced: int = 0


def run(target: Any, job: TraceJob, *, stacks: bool) -> Done:
    """Trace what ``target`` is: a model's name, a user's function, or a module.

    Raises:
        InputError: it is none of these, or cannot be built or traced.
    """
    if isinstance(target, torch.nn.Module):
        return _run_module(target, job, stacks=stacks)
    if callable(target):
        return _run_function(target, job, getattr(target, "__name__", "function"), stacks=stacks)
    if not isinstance(target, str):
        raise InputError(_("{kind} cannot be traced").format(kind=type(target).__name__))
    if ":" in target.replace("://", ""):
        return _run_function(load_function(target), job, target, stacks=stacks)
    built = build_model(target, job)
    done = _run_language_model(built.model, built.config, job, built.name, stacks=stacks)
    done.trace.assumed[:0] = built.assumed
    return done


def _run_module(model: Any, job: TraceJob, *, stacks: bool) -> Done:
    if not hasattr(model, "config"):
        raise InputError(
            _("a module alone does not say what its inputs are"),
            remedy=_("give a function that returns (module, inputs); see docs/trace.md"),
        )
    if any(each.device.type != "meta" for each in model.parameters()):
        model = model.to("meta")
    return _run_language_model(model, model.config, job, type(model).__name__, stacks=stacks)


def _run_language_model(model: Any, config: Any, job: TraceJob, name: str, *, stacks: bool) -> Done:
    assumed: list[str] = []
    model = prepare(model, job, assumed)
    trace, num_traced = trace_layers(model, config, job, stacks=stacks)
    trace.assumed += [*assumed, *sentences(job)]
    return Done(
        trace=trace,
        name=name,
        num_parameters=num_elements(model),
        num_trained=_num_trained(model),
        num_layers=getattr(config, "num_hidden_layers", 0),
        num_layers_traced=num_traced,
    )


def _run_function(function: Any, job: TraceJob, where: str, *, stacks: bool) -> Done:
    tracker, model = trace_function(function, job, where, stacks=stacks)
    return Done(
        trace=tracker.trace,
        name=where,
        num_parameters=sum(each.numel() for each in model.parameters()),
        num_trained=_num_trained(model),
    )


def _num_trained(model: Any) -> int:
    """Return the elements of trained parameters: a parameter that modules share is listed once."""
    return sum(each.numel() for each in model.parameters() if each.requires_grad)
