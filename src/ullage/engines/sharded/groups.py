"""A model as units of sharding: which parameters a rank gathers, stores and trains, unit by unit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from ullage.account.fsdp import Group
from ullage.account.parameters import Parameter, Role, layer_parameters, model_parameters
from ullage.spec import model as spec
from ullage.units import cdiv


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How parameters are spread: tensor and expert parallelism before sharding, then N ranks.

    ``num_expert_ranks``: ranks that share one routed expert's shard.
    """

    tensor_parallel_size: int = 1
    expert_parallel_size: int = 1
    num_ranks: int = 1
    num_expert_ranks: int = 1


def local_elements(parameter: Parameter, spread: Spread) -> int:
    """Elements of a parameter on a rank before sharding over data-parallel ranks."""
    total = math.prod(parameter.shape) * parameter.copies
    if parameter.role is Role.EXPERT:
        return total // spread.expert_parallel_size
    if parameter.split == "none" or spread.tensor_parallel_size == 1:
        return total
    if parameter.units and parameter.units < spread.tensor_parallel_size:
        return total // parameter.units
    return cdiv(total, spread.tensor_parallel_size)


@dataclass(frozen=True, kw_only=True)
class Formats:
    """Bytes of an element: ``stored`` in the shard, ``gathered`` to compute with, ``reduced`` on the wire."""

    stored: int = 4
    gathered: int = 2
    reduced: int = 4


def group_of(
    name: str,
    parameters: Iterable[Parameter],
    spread: Spread,
    formats: Formats,
    *,
    trained: Callable[[Parameter], bool] = lambda parameter: True,
    experts: bool | None = None,
    reshard_after_forward: bool = True,
) -> Group:
    """Return the unit of these parameters.

    Args:
        name: for people.
        parameters: its tensors.
        spread: how they are spread.
        formats: bytes an element.
        trained: which have gradients.
        experts: True: only routed experts; False: all else; None: both.
        reshard_after_forward: as in the engine.
    """
    chosen = [one for one in parameters if experts is None or (one.role is Role.EXPERT) == experts]
    sizes = [local_elements(one, spread) for one in chosen if not one.buffer]
    with_grad = sum(local_elements(one, spread) for one in chosen if trained(one) and not one.buffer)
    ranks = spread.num_expert_ranks if experts else spread.num_ranks
    stored = sum(cdiv(size, ranks) * formats.stored for size in sizes)
    return Group(
        name=name,
        gathered_bytes=tuple(size * formats.gathered for size in sizes),
        stored_bytes=stored,
        trained_gathered_bytes=with_grad * formats.gathered,
        reduced_bytes=with_grad * formats.reduced,
        num_ranks=ranks,
        reshard_after_forward=reshard_after_forward,
    )


@lru_cache(maxsize=256)
def frame_parameters(model: spec.Model) -> tuple[tuple[str, Parameter], ...]:
    """Embedding, final norm and head: (section, parameter). A tied head is not repeated."""
    bare = replace(model, layers=())
    return tuple((placed.section, placed.parameter) for placed in model_parameters(bare, mtp=False, towers=False))


def of_layer(model: spec.Model, index: int) -> tuple[Parameter, ...]:
    """Parameters of a layer."""
    return layer_parameters(model.layers[index], model.hidden_size)
