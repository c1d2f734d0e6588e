"""Models whose layers repeat."""

from __future__ import annotations

from typing import Any

from ullage.trace.job import TraceJob


def trace_layers(model: Any, config: Any, job: TraceJob, name: str, *, stacks: bool) -> Any:
    """Trace a model of transformers."""
    from ullage.trace.running import Done, trace_model

    counts = {id(each): each for each in model.parameters()}
    tracker = trace_model(model, config, job, stacks=stacks)
    return Done(
        trace=tracker.trace,
        name=name,
        num_parameters=sum(each.numel() for each in counts.values()),
        num_trained=sum(each.numel() for each in counts.values() if each.requires_grad),
        num_layers=getattr(config, "num_hidden_layers", 0),
    )
