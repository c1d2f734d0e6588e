"""Models whose layers repeat: run few of them, and repeat their events."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ullage.trace.job import TraceJob
from ullage.trace.recorder.events import Trace
from ullage.trace.recorder.positions import clean_path
from ullage.trace.repeat.unroll import CannotUnrollError, Stack, grow
from ullage.trace.step.model import trace_model

#: Units that are run, and one more for the check: the one that is repeated has a neighbour on each side, and what is
#: outside can tell the first two from the last two.
UNITS = 4
#: Longest pattern of alternating layers that is looked for.
MAX_PERIOD = 12
_NOT_KINDS = frozenset(("layer_idx", "training"))


class Layers:
    """The list of decoder layers in a model of transformers."""

    def __init__(self, path: str, holder: Any, name: str) -> None:
        self.path, self.holder, self.name = path, holder, name
        self.modules = list(getattr(holder, name))


def find_layers(model: Any, count: int) -> Layers | None:
    """Return the list that holds as many layers as the config says, None where there is none or more than one."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            parent, _dot, name = path.rpartition(".")
            found.append(Layers(path, model.get_submodule(parent), name))
    return found[0] if len(found) == 1 else None


def kinds_of(layers: Layers, config: Any) -> list[int]:
    """Return a number for each layer's kind: layers of one kind do the same with tensors of the same sizes."""
    count = len(layers.modules)
    lists = [value for _name, value in _per_layer(config, count)]
    seen: dict[Any, int] = {}
    kinds = []
    for index, layer in enumerate(layers.modules):
        parts = [repr(value[index]) for value in lists]
        for path, module in layer.named_modules():
            scalars = sorted(
                (name, repr(value))
                for name, value in vars(module).items()
                if isinstance(value, (int, float, str, bool, type(None))) and name not in _NOT_KINDS
            )
            parts.append((path, type(module).__qualname__, tuple(scalars)))  # type: ignore[arg-type]
        for path, each in [*layer.named_parameters(), *layer.named_buffers()]:
            parts.append((path, tuple(each.shape), str(each.dtype), each.requires_grad))  # type: ignore[arg-type]
        kinds.append(seen.setdefault(tuple(parts), len(seen)))
    return kinds


def _per_layer(config: Any, count: int) -> list[tuple[str, list[Any]]]:
    return [(name, value) for name, value in vars(config).items() if isinstance(value, list) and len(value) == count]


def find_stack(kinds: list[int], path: str) -> Stack | None:
    """Return where kinds of layers repeat most, None where running them all is as well."""
    best: tuple[int, Stack] | None = None
    for period in range(1, min(MAX_PERIOD, len(kinds) // 2) + 1):
        start = 0
        for index in range(len(kinds) - period + 1):
            ends = index + period == len(kinds) or kinds[index] != kinds[index + period]
            if ends:
                units = (index + period - start) // period
                saved = (units - 2 * UNITS - 1) * period
                if saved > 0 and (best is None or saved > best[0]):
                    best = (saved, Stack(path=path, first=start, period=period, units=units))
                start = index + 1
    return best[1] if best else None


@contextmanager
def only(layers: Layers, config: Any, keep: list[int]) -> Iterator[None]:
    """Leave only some layers in a model, for as long as the context lasts."""
    count = len(layers.modules)
    before = dict(_per_layer(config, count))
    try:
        setattr(layers.holder, layers.name, torch.nn.ModuleList([layers.modules[index] for index in keep]))
        config.num_hidden_layers = len(keep)
        for name, value in before.items():
            setattr(config, name, [value[index] for index in keep])
        yield
    finally:
        setattr(layers.holder, layers.name, torch.nn.ModuleList(layers.modules))
        config.num_hidden_layers = count
        for name, value in before.items():
            setattr(config, name, value)


def trace_layers(model: Any, config: Any, job: TraceJob, *, stacks: bool) -> tuple[Trace, int]:
    """Trace a model of transformers; return (trace, layers that were run if others repeat them, else 0)."""
    count = getattr(config, "num_hidden_layers", 0)
    unroll = job.unroll and not job.ddp  # buckets of a fixed size do not repeat with the layers
    layers = find_layers(model, count) if unroll and count else None
    stack = find_stack(kinds_of(layers, config), clean_path(layers.path)) if layers is not None else None
    if layers is None or stack is None:
        return trace_model(model, config, job, stacks=stacks).trace, 0

    def traced(units: int) -> Trace:
        skipped = range(stack.first + units * stack.period, stack.first + stack.units * stack.period)
        with only(layers, config, [index for index in range(count) if index not in skipped]):
            return trace_model(model, config, job, stacks=stacks).trace

    # FSDP2's first unit gathers nothing ahead, the last is gathered by the root: both neighbours must be inner ones.
    # The first of a prepared base gets a stream of another dtype.
    units, middle = (UNITS + 1, 2) if job.fsdp else (UNITS, 2 if job.base else 1)
    few = Stack(path=stack.path, first=stack.first, period=stack.period, units=units, middle=middle)
    try:
        grown = grow(traced(units), traced(units + 1), few, stack.units - units)
    except CannotUnrollError:
        return trace_model(model, config, job, stacks=stacks).trace, 0
    return grown, count - (stack.units - units) * stack.period
