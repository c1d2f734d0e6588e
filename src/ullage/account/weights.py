"""The weights term: every tensor a rank holds, in the format it is stored in.

The bytes are exact: the inventory (:mod:`ullage.account.parameters`), the split (:mod:`ullage.account.sharding`) and
the stored format of each tensor, scales included.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from ullage.account.parameters import Parameter, Placed, Role
from ullage.account.sharding import COMPONENTS, LocalParameter, RankShare, frame_share, layer_share, whole
from ullage.ledger import Term, exact, total
from ullage.spec import model as spec
from ullage.units import WeightFormat, canonical_dtype, plain


class _Keep:
    """The checkpoint's own quantisation."""

    def __repr__(self) -> str:
        return "KEEP"


#: Stands for "as the checkpoint stores it" where ``None`` means "not quantised".
KEEP: Final = _Keep()
KeepOr = spec.Quantization | None | _Keep

#: component -> format -> (number of layers or 1 -> values in each); see :func:`_describe`.
_Sums = dict[str, dict[str, list[tuple[int, int]]]]

_QUANTISED_ROLES = frozenset((Role.LINEAR, Role.EXPERT))
_HARMLESS_DIGITS = re.compile(r"\\d|\{\d*,?\d*\}|\[0-9\]")
_plain = lru_cache(maxsize=64)(plain)


@lru_cache(maxsize=256)
def _compiled(quantization: spec.Quantization) -> tuple[tuple[re.Pattern[str] | None, WeightFormat | None], ...]:
    return tuple((re.compile(rule.pattern) if rule.pattern else None, rule.format) for rule in quantization.rules)


@lru_cache(maxsize=256)
def _names_layers(quantization: spec.Quantization) -> bool:
    """Whether a rule may tell one layer from another: a number stands in a pattern."""
    return any(re.search(r"\d", _HARMLESS_DIGITS.sub("", rule.pattern)) for rule in quantization.rules)


def format_of(parameter: Parameter, *, dtype: str, quantization: spec.Quantization | None) -> WeightFormat:
    """Return how a tensor is stored: the first rule that hits its full name decides.

    A tensor with a dtype of its own keeps it; tensors of one axis (norms, biases) are never quantised; an empty
    pattern means every linear layer, experts included, and leaves embeddings, routers and convolutions alone.
    """
    if parameter.dtype is not None:
        return _plain(parameter.dtype)
    if quantization is not None and len(parameter.shape) > 1:
        name = parameter.name.replace("{e}", "0")
        linear = parameter.role in _QUANTISED_ROLES
        for pattern, format_ in _compiled(quantization):
            if (linear and pattern is None) or (pattern is not None and pattern.search(name)):
                return format_ or _plain(dtype)
    return _plain(dtype)


def stored_format(model: spec.Model, placed: Placed) -> WeightFormat:
    """Return how the checkpoint stores a tensor of ``model``."""
    return format_of(placed.parameter, dtype=model.dtype, quantization=model.quantization)


def weights_term(model: spec.Model, share: RankShare, *, quantization: KeepOr = KEEP, dtype: str | None = None) -> Term:
    """Return the weights that one rank holds.

    Formula: sum over tensors of copies x stored bytes of the rank's shape; scales and zero points included.
    Source: the shapes of published checkpoints; vllm@0.33.0:vllm/model_executor/layers/linear.py for the split.
    Known error: none against what a checkpoint stores; engines that repack weights at load add their own term.

    Args:
        model: the model.
        share: what the rank holds.
        quantization: another quantisation than the checkpoint's; None: none.
        dtype: of the tensors that are not quantised, when the engine converts them.

    Raises:
        LayoutError: an axis does not divide.
    """
    rules = model.quantization if isinstance(quantization, _Keep) else quantization
    base = canonical_dtype(dtype or model.dtype)
    num_bytes = dict.fromkeys(COMPONENTS, 0)
    sums: _Sums = {}
    for prefix, times, locals_ in _groups(model, share, rules):
        _add(locals_, prefix, times, base, rules, num_bytes, sums)
    children = [
        exact(component, size, formula=_describe(sums[component]), source="published checkpoint shapes")
        for component, size in num_bytes.items()
        if size
    ]
    return total("weights", children, source="account/weights.py:weights_term")


def checkpoint_bytes(model: spec.Model) -> int:
    """Return the bytes of all tensors that the model's checkpoint stores (files add their headers)."""
    return weights_term(model, whole(model)).bytes


def _groups(
    model: spec.Model, share: RankShare, rules: spec.Quantization | None
) -> Iterable[tuple[str, int, Iterable[LocalParameter]]]:
    """Yield (name prefix, number of equal layers, tensors): equal layers once, unless a rule names layers."""
    equal: dict[int, list[int]] = {}
    one_by_one = rules is not None and _names_layers(rules)
    for index in range(*share.layers):
        equal.setdefault(index if one_by_one else id(model.layers[index]), []).append(index)
    for indexes in equal.values():
        prefix = f"{model.layers_name}.{indexes[0]}."
        yield prefix, len(indexes), layer_share(model.layers[indexes[0]], model.hidden_size, share)
    frame = [
        LocalParameter(parameter=held.placed.parameter, component=held.component, shape=held.shape, copies=held.copies)
        for held in frame_share(model, share)
    ]
    yield "", 1, frame


def _add(
    locals_: Iterable[LocalParameter],
    prefix: str,
    times: int,
    dtype: str,
    rules: spec.Quantization | None,
    num_bytes: dict[str, int],
    sums: _Sums,
) -> None:
    """Add ``times`` equal groups of tensors to the sums by component and format."""
    values: dict[tuple[str, str], int] = {}
    for local in locals_:
        format_ = _prefixed_format(local.parameter, prefix, dtype, rules)
        num_bytes[local.component] += times * local.copies * format_.stored_bytes(local.shape)
        key = (local.component, format_.name)
        values[key] = values.get(key, 0) + local.copies * math.prod(local.shape)
    for (component, name), num_values in values.items():
        sums.setdefault(component, {}).setdefault(name, []).append((times, num_values))


def _prefixed_format(parameter: Parameter, prefix: str, dtype: str, rules: spec.Quantization | None) -> WeightFormat:
    if not prefix or rules is None:
        return format_of(parameter, dtype=dtype, quantization=rules)
    return _format_by_name(
        prefix + parameter.name, len(parameter.shape), parameter.role, parameter.dtype, dtype=dtype, rules=rules
    )


@lru_cache(maxsize=65536)
def _format_by_name(
    name: str, num_axes: int, role: Role, own_dtype: str | None, *, dtype: str, rules: spec.Quantization
) -> WeightFormat:
    """:func:`format_of` for a name; kept, because many layouts of one model are counted in a search."""
    parameter = Parameter(name=name, shape=(1,) * num_axes, role=role, dtype=own_dtype)
    return format_of(parameter, dtype=dtype, quantization=rules)


def _describe(by_format: dict[str, list[tuple[int, int]]]) -> str:
    """Return ``58 x 11,525,947,392 + 3 x 187,107,328 values in fp8 128x128``, one part per format."""
    parts = []
    for name, groups in by_format.items():
        merged: dict[int, int] = {}
        for times, num_values in groups:
            merged[num_values] = merged.get(num_values, 0) + times
        terms = [f"{times} x {values:,}" if times > 1 else f"{values:,}" for values, times in merged.items()]
        if len(terms) > 4:
            terms = [f"{sum(times * values for values, times in merged.items()):,}"]
        parts.append(" + ".join(terms) + f" values in {name}")
    return "; ".join(parts)
