"""One tensor of a model, and the helpers that make tensors of linear layers, norms and extras."""

from __future__ import annotations

from enum import Enum
from typing import Literal

from ullage.frozen import Frozen
from ullage.spec import model as spec

Split = Literal["none", "out", "in", "vocab"]


class Role(str, Enum):
    """What a tensor is for: quantisation and sharding rules go by it."""

    LINEAR = "linear"
    EXPERT = "expert"  # a tensor of a routed expert
    EMBEDDING = "embedding"
    NORM = "norm"
    BIAS = "bias"
    ROUTER = "router"
    CONV = "conv"
    OTHER = "other"


class Parameter(Frozen):
    """One tensor, or ``copies`` equal ones (the routed experts).

    Attributes:
        name: checkpoint name; routed experts carry ``{e}`` where the expert's number stands.
        shape: as stored, (out_features, in_features) for linear layers.
        split: how tensor parallelism divides it: "out" the first axis, "in" the second (of the last two),
            "vocab" the padded first axis, "none" replicated.
        units: indivisible pieces along the split axis (KV heads): more ranks than units replicate them. 0: any.
        whole: pieces of the split axis that every rank holds beside its share (a single Mamba-2 group).
        copies, active_copies: experts in all, and those that one token uses.
        buffer: stored and loaded, but no parameter.
        dtype: when it differs from the model's, whatever the quantisation.
    """

    name: str
    shape: tuple[int, ...]
    role: Role = Role.LINEAR
    split: Split = "none"
    units: int = 0
    whole: int = 0
    copies: int = 1
    active_copies: int = 1
    buffer: bool = False
    dtype: str | None = None


def linear_parameters(
    name: str,
    out_features: int,
    in_features: int,
    *,
    bias: bool = False,
    split: Split = "none",
    units: int = 0,
    role: Role = Role.LINEAR,
) -> list[Parameter]:
    """Return weight and, if any, bias of a linear layer. A bias is split only with the output axis."""
    found = [Parameter(name=f"{name}.weight", shape=(out_features, in_features), role=role, split=split, units=units)]
    if bias:
        found.append(
            Parameter(
                name=f"{name}.bias",
                shape=(out_features,),
                role=Role.BIAS,
                split="out" if split == "out" else "none",
                units=units,
            )
        )
    return found


def norm_parameters(norm: spec.Norm) -> list[Parameter]:
    """Return the learned tensors of a norm; none for a norm without weight."""
    found = []
    if norm.weight:
        found.append(Parameter(name=f"{norm.name}.weight", shape=(norm.size,), role=Role.NORM))
    if norm.bias:
        found.append(Parameter(name=f"{norm.name}.bias", shape=(norm.size,), role=Role.NORM))
    return found


def of_extra(extra: spec.ExtraTensor, prefix: str = "") -> Parameter:
    """Return the parameter of an extra tensor, under ``prefix`` (which ends with a dot when it is given)."""
    is_matrix = extra.linear and len(extra.shape) == 2 and extra.name.endswith(".weight")
    return Parameter(
        name=prefix + extra.name,
        shape=extra.shape,
        role=Role.LINEAR if is_matrix else Role.OTHER,
        split=extra.split,
        buffer=extra.buffer,
        dtype=extra.dtype,
    )
