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
MAX_REMEMBERED = 200_000
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

    A tensor with a dtype of its own keeps it; tensors of one axis (norms, biases) are never quantised, though a rule
    can give them another plain dtype; an empty pattern means every linear layer, experts included, and leaves
    embeddings, routers and convolutions alone.
    """
    if parameter.dtype is not None:
        return _plain(parameter.dtype)
    if quantization is not None:
        name = parameter.name.replace("{e}", "0")
        linear = parameter.role in _QUANTISED_ROLES
        for pattern, format_ in _compiled(quantization):
            if len(parameter.shape) < 2 and format_ is not None and format_.name != format_.dtype:
                continue
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
    sizes: dict[tuple[int, tuple[int, ...]], int] = {}
    for prefix, times, locals_ in _groups(model, share, rules):
        _add(locals_, prefix, times, base, rules, num_bytes, sums, sizes)
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
    sizes: dict[tuple[int, tuple[int, ...]], int],
) -> None:
    """Add ``times`` equal groups of tensors to the sums by component and format; ``sizes``: bytes found so far."""
    values: dict[tuple[str, str], int] = {}
    memo = _memo(rules, dtype) if rules is not None else {}
    for local in locals_:
        if rules is None:
            format_ = format_of(local.parameter, dtype=dtype, quantization=None)
        else:
            format_ = _remembered(local.parameter, prefix, dtype, rules, memo)
        size = sizes.get((id(format_), local.shape))
        if size is None:
            size = sizes[id(format_), local.shape] = format_.stored_bytes(local.shape)
        num_bytes[local.component] += times * local.copies * size
        key = (local.component, format_.name)
        values[key] = values.get(key, 0) + local.copies * math.prod(local.shape)
    for (component, name), num_values in values.items():
        sums.setdefault(component, {}).setdefault(name, []).append((times, num_values))


#: (name, role, axes, own dtype) -> format, of one quantisation and dtype.
_Memo = dict[tuple[str, Role, int, str | None], WeightFormat]


@lru_cache(maxsize=16)
def _memo(rules: spec.Quantization, dtype: str) -> _Memo:
    """Formats found so far; kept, because a search counts many layouts of one model."""
    return {}


def _remembered(parameter: Parameter, prefix: str, dtype: str, rules: spec.Quantization, memo: _Memo) -> WeightFormat:
    key = (prefix + parameter.name, parameter.role, len(parameter.shape), parameter.dtype)
    format_ = memo.get(key)
    if format_ is None:
        named = Parameter(name=key[0], shape=parameter.shape, role=parameter.role, dtype=parameter.dtype)
        format_ = memo[key] = format_of(named, dtype=dtype, quantization=rules)
        if len(memo) > MAX_REMEMBERED:
            memo.clear()
    return format_


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
