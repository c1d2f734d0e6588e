"""From what was asked to events: build, step, collect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ullage.errors import InputError
from ullage.i18n import _
from ullage.trace import events as names
from ullage.trace.api import guarded
from ullage.trace.events import Trace
from ullage.trace.fake_ranks import fake_ranks
from ullage.trace.functions import CudaFunctions
from ullage.trace.job import TraceJob
from ullage.trace.models import add_adapters, build_model, quantise_base
from ullage.trace.parallel import check_wrapping, replicate, sentences, spread
from ullage.trace.patches import cuda_stand_ins
from ullage.trace.protocol import Traced, call_function, load_function
from ullage.trace.quantised import num_elements
from ullage.trace.shadows import Routing
from ullage.trace.steps import run_inference, run_training, token_batch
from ullage.trace.temporaries import Kernels
from ullage.trace.tracker import Tracker


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
    """Trace what ``target`` is: a model's name, a user's function, or a module."""
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
    from ullage.trace.layers import trace_layers

    assumed: list[str] = []
    model = prepare(model, job, assumed)
    counts = {id(each): each for each in model.parameters()}
    trace, num_traced = trace_layers(model, config, job, stacks=stacks)
    trace.assumed += [*assumed, *sentences(job)]
    return Done(
        trace=trace,
        name=name,
        num_parameters=num_elements(model),
        num_trained=sum(each.numel() for each in counts.values() if each.requires_grad),
        num_layers=getattr(config, "num_hidden_layers", 0),
        num_layers_traced=num_traced,
    )


def prepare(model: Any, job: TraceJob, assumed: list[str] | None = None) -> Any:
    """Set a model of transformers to train or not, its layers to be repeated in backward; give it adapters.

    A quantised base comes first, as where it was loaded so; ``assumed`` takes what is said of it.
    """
    model.train(not job.inference)
    if job.base is not None:
        said = quantise_base(model, job)
        if assumed is not None:
            assumed += said
    if job.recompute == "full" and not job.inference:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": job.reentrant})
    return add_adapters(model, job)


def trace_model(model: Any, config: Any, job: TraceJob, *, stacks: bool = False) -> Tracker:
    """Trace the step of a prepared model of transformers as it is, all layers."""
    for each in model.parameters():
        each.grad = None
    for each in model.modules():
        if hasattr(each, "begin_again"):
            each.begin_again()
    tracker, functions = start(job, stacks=stacks)
    batch = token_batch(job, config.vocab_size)
    with fake_ranks(tracker, job.num_ranks, job.rank), cuda_stand_ins(tracker, functions), functions:
        model = guarded(lambda: spread(model, job))
        _trace_steps(tracker, job, model, batch)
    return tracker


def _trace_steps(tracker: Tracker, job: TraceJob, model: Any, batch: Any) -> None:
    traced = Traced(model, inputs=batch)
    with tracker.watching():
        tracker.hold(model)
        model = _replica(tracker, job, model)
        if job.inference:
            batch.pop("labels")
            guarded(lambda: run_inference(tracker, job, model, batch, traced.call))
        else:
            guarded(lambda: run_training(tracker, job, model, batch, traced.loss_of))


def _replica(tracker: Tracker, job: TraceJob, model: Any) -> Any:
    """Wrap a model in DDP where the job asks for it: its buckets are taken now."""
    if not job.ddp:
        return model
    with tracker.positions.phase(names.SETUP), tracker.taking_for(names.COMMUNICATION):
        return guarded(lambda: replicate(model))


def start(job: TraceJob, *, stacks: bool) -> tuple[Tracker, CudaFunctions]:
    """Return a tracker for a job, and the functions' stand-ins."""
    attention = "auto" if job.attention == "eager" else job.attention
    kernels = Kernels(compute_capability=job.compute_capability, attention=attention)
    return Tracker(kernels=kernels, routing=Routing(skew=job.routing_skew), stacks=stacks), CudaFunctions(kernels)


def _run_function(function: Any, job: TraceJob, where: str, *, stacks: bool) -> Done:
    tracker, functions = start(job, stacks=stacks)
    with fake_ranks(tracker, job.num_ranks, job.rank), cuda_stand_ins(tracker, functions), functions:
        traced = guarded(lambda: call_function(function, job, where))
        check_wrapping(job, traced)
        model = traced.module
        _to_meta(model)
        with tracker.watching():
            tracker.hold(model)
            traced.module = _replica(tracker, job, model)
            guarded(lambda: _steps(tracker, job, traced))
    parameters = list(model.parameters())
    return Done(
        trace=tracker.trace,
        name=where,
        num_parameters=sum(each.numel() for each in parameters),
        num_trained=sum(each.numel() for each in parameters if each.requires_grad),
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


def _to_meta(model: Any) -> None:
    """Move parameters and buffers that were made on the host, shared ones together."""
    moved: dict[int, Any] = {}
    for module in model.modules():
        for name, each in list(module._parameters.items()):
            if each is not None and each.device.type != "meta":
                if id(each) not in moved:
                    moved[id(each)] = torch.nn.Parameter(each.detach().to("meta"), each.requires_grad)
                module._parameters[name] = moved[id(each)]
        for name, each in list(module._buffers.items()):
            if each is not None and each.device.type != "meta":
                moved.setdefault(id(each), each.to("meta"))
                module._buffers[name] = moved[id(each)]
