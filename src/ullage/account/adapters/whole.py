"""A method over a whole model: its targets, its tensors, what lies beside them, what layers and frame keep."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from ullage.account.activations.saved import SavedTensor, Shape
from ullage.account.adapters.names import rule_of
from ullage.account.adapters.naming import is_named
from ullage.account.adapters.rule import BASE, AdapterPrecision, Buffer, Rows, Target, key_value_width
from ullage.account.optimizer import Trained
from ullage.account.parameters import Parameter, Role, layer_parameters
from ullage.errors import InputError
from ullage.i18n import _
from ullage.spec import model as spec
from ullage.spec.training import Lora
from ullage.units import dtype_bytes

_LINEAR_ROLES = (Role.LINEAR, Role.EXPERT, Role.ROUTER)
#: More than any method has in one model: a count above it is a slip of the pen.
MOST_SOLVED = 1 << 24


def is_target(parameter: Parameter, targets: tuple[str, ...]) -> bool:
    """Return whether peft would wrap the linear layer of this weight.

    Source: peft@0.19.1:tuners/tuners_utils.py:check_target_module_exists.
    """
    if parameter.role not in _LINEAR_ROLES or not parameter.name.endswith(".weight") or len(parameter.shape) != 2:
        return False
    module = parameter.name.removesuffix(".weight")
    return targets == ("all-linear",) or is_named(module, targets)


@lru_cache(maxsize=256)
def layer_targets(layer: spec.Layer, hidden_size: int, lora: Lora) -> tuple[Target, ...]:
    """Return what a method wraps in one layer: linears, of LN tuning norms."""
    rule, found = rule_of(lora.kind), []
    names = lora.targets or rule.targets
    parameters = layer_parameters(layer, hidden_size)
    biases = {one.name.removesuffix(".bias") for one in parameters if one.name.endswith(".bias")}
    for one in parameters:
        module = re.sub(r"\{e\}\.", "", one.name.removesuffix(".weight"))
        if rule.names == ("ln_tuning",):
            if one.role is Role.NORM and is_named(module, names):
                found.append(Target(module=module, out_features=one.shape[0], in_features=1, copies=one.copies))
        elif is_target(one, names):
            rows, columns = one.shape
            found.append(
                Target(
                    module=module,
                    out_features=rows,
                    in_features=columns,
                    copies=one.copies,
                    routed=one.role is Role.EXPERT,
                    bias=one.name.removesuffix(".weight") in biases,
                )
            )
    return tuple(found)


def targets_of(model: spec.Model, lora: Lora) -> Iterator[Target]:
    """Yield what a method wraps, layer after layer; of LN tuning the last norms too."""
    for layer in model.layers:
        yield from layer_targets(layer, model.hidden_size, lora)
    if rule_of(lora.kind).names == ("ln_tuning",):
        yield from final_targets(model, lora)


def final_targets(model: spec.Model, lora: Lora) -> tuple[Target, ...]:
    """Return the norms after the layers that LN tuning copies."""
    rule = rule_of(lora.kind)
    if rule.names != ("ln_tuning",):
        return ()
    names = lora.targets or rule.targets
    return tuple(
        Target(module=norm.name, out_features=norm.size, in_features=1)
        for norm in model.final_norms
        if is_named(norm.name, names)
    )


def trained_tensors(model: spec.Model, lora: Lora) -> Trained:
    """Return the tensors that a method trains.

    A stated number of parameters wins over the rule's: then they are one tensor.

    Raises:
        InputError: no layer has a linear of that name.
    """
    if lora.num_parameters is not None:
        return Trained(tensors=(((lora.num_parameters,), 1),))
    return _by_rule(model, lora)


@lru_cache(maxsize=64)
def _by_rule(model: spec.Model, lora: Lora) -> Trained:
    rule, targets = rule_of(lora.kind), tuple(targets_of(model, lora))
    if not targets and rule.targets and rule.names != ("trainable_tokens",):
        raise InputError(
            _("no linear layer of {model} is called {targets}").format(
                model=model.name, targets=", ".join(lora.targets or rule.targets)[:200]
            ),
            where="lora targets",
            remedy=_("give names of its linear layers, such as q_proj, or all-linear"),
        )
    tensors: dict[tuple[int, ...], int] = {}
    for target in targets:
        for shape in rule.trained(target, lora):
            tensors[shape] = tensors.get(shape, 0) + target.copies
    for shape in rule.shared(model, targets, lora):
        tensors[shape] = tensors.get(shape, 0) + 1
    return Trained(tensors=tuple(tensors.items()))


def held_bytes(model: spec.Model, lora: Lora, precision: AdapterPrecision, *, base_width: float) -> int:
    """Return what lies frozen beside a method's targets, less what leaves of their base."""
    rule, targets = rule_of(lora.kind), tuple(targets_of(model, lora))
    found = _sum(rule.shared_held(model, targets, lora), precision, base_width)
    for target in targets:
        own = _sum(rule.held(target, lora), precision, base_width)
        found += target.copies * (own - rule.freed_bytes(target, lora, base_width))
    return found


def hosted_bytes(model: spec.Model, lora: Lora, precision: AdapterPrecision) -> int:
    """Return the buffers that are made on the host, and lie on the GPU only where the model was moved as a whole."""
    rule = rule_of(lora.kind)
    return sum(one.copies * _sum(rule.hosted(one, lora), precision) for one in targets_of(model, lora))


def _sum(buffers: tuple[Buffer, ...], precision: AdapterPrecision, base_width: float = 0.0) -> int:
    def width(dtype: str) -> float:
        return base_width if dtype == BASE else float(dtype_bytes(dtype or precision.dtype))

    return sum(int(elements * width(dtype)) for elements, dtype in buffers)


def layer_rows(
    layer: spec.Layer,
    hidden_size: int,
    lora: Lora,
    precision: AdapterPrecision,
    shape: Shape,
    *,
    num_routed_tokens: int,
) -> tuple[SavedTensor, ...]:
    """Return what a method keeps of one layer's forward pass."""
    rule = rule_of(lora.kind)
    found: list[SavedTensor] = []
    shared: set[str] = set()
    for target in layer_targets(layer, hidden_size, lora):
        num_tokens = num_routed_tokens if target.routed else shape.num_tokens
        rows = Rows(target, num_tokens, precision, shared, rule.source)
        rule.keep(rows, target, lora)
        found += rows.found
    if rule.names[0] == "adaption_prompt":
        found += adaption_rows(layer, rule.whole(lora, "adapter_len"), precision, shape)
    return tuple(found)


def adaption_rows(layer: spec.Layer, length: int, precision: AdapterPrecision, shape: Shape) -> tuple[SavedTensor, ...]:
    """Return what a prompt that a layer attends to keeps.

    Formula: b sequences of s, a heads of size d, t tokens: keys and values 2btad, queries once more bsad, softmax in
        fp32 4bast, its cast and the gated scores.
    Source: peft@0.21.2:tuners/adaption_prompt/layer.py:AdaptedAttention.forward.
    """
    found: list[SavedTensor] = []
    for mixer in layer.mixers:
        if not isinstance(mixer, spec.Attention):
            continue
        heads, dim, sequences = mixer.num_heads, mixer.head_dim, shape.micro_batch_size
        scores = shape.num_tokens * heads * length
        for name, elements, dtype in (
            ("prompt keys", sequences * length * heads * dim, precision.compute_dtype),
            ("prompt values", sequences * length * heads * dim, precision.compute_dtype),
            ("prompt queries", shape.num_tokens * heads * dim, precision.compute_dtype),
            ("prompt softmax", scores, "float32"),
            ("prompt probabilities", scores, precision.compute_dtype),
            ("prompt scores", scores, precision.compute_dtype),
        ):
            module = mixer.prefix
            found.append(SavedTensor(name=f"{module}.{name}", module=module, num_elements=elements, dtype=dtype))
    return tuple(found)


def prefix_rows(
    layer: spec.Layer, prefix_tokens: int, shape: Shape, *, compute_dtype: str, repeats: bool
) -> tuple[SavedTensor, ...]:
    """Return the keys and values of prefix tokens that attention keeps: b t k 2d, repeated a heads instead of k."""
    found = []
    for mixer in layer.mixers if prefix_tokens else ():
        if isinstance(mixer, spec.Attention):
            heads = mixer.num_heads if repeats else mixer.num_kv_heads
            width = heads * (mixer.head_dim + (mixer.v_head_dim or mixer.head_dim))
            elements = shape.micro_batch_size * prefix_tokens * width
            found.append(
                SavedTensor(
                    name=f"{mixer.prefix}.prefix", module=mixer.prefix, num_elements=elements, dtype=compute_dtype
                )
            )
    return tuple(found)


def work_bytes(layer: spec.Layer, hidden_size: int, lora: Lora, precision: AdapterPrecision) -> int:
    """Return what the largest target's backward takes for a moment."""
    rule = rule_of(lora.kind)
    most = max((rule.work_elements(one, lora) for one in layer_targets(layer, hidden_size, lora)), default=0)
    return int(most * dtype_bytes(precision.product))


def frame_bytes(model: spec.Model, lora: Lora, shape: Shape, compute_dtype: str) -> int:
    """Return what a method keeps outside the layers.

    Formula: LN tuning: the normalised input of the last norm; trainable tokens with a tied head: the embedding written
        anew Vh and the head's input; prefix: keys and values of the prompt, once more b t width.
    """
    rule, width = rule_of(lora.kind), dtype_bytes(compute_dtype)
    found = sum(shape.num_tokens * one.out_features for one in final_targets(model, lora))
    if rule.names == ("trainable_tokens",) and model.tied_embeddings:
        found += model.vocab_size * model.hidden_size + shape.num_tokens * model.hidden_size
    found += shape.micro_batch_size * rule.prefix_tokens(lora) * key_value_width(model)
    return int(found * width)


def solved_for(model: spec.Model, lora: Lora, num_parameters: int, *, rank_known: bool = False) -> Lora:
    """Return a method with the setting that a stated count of trained parameters determines, and with the count.

    An alternative that fits the count is taken; else the rule's number is solved for. Where nothing fits, only the
    count is taken.
    """
    rule = rule_of(lora.kind)
    options = [lora, *(_with(lora, name, value) for name, values in rule.alternatives.items() for value in values)]
    found = next((one for one in options if _by_rule(model, one).num_elements == num_parameters), None)
    if found is None and rule.solved and not (rank_known and rule.solved == "rank"):
        share = isinstance(rule.options.get(rule.solved), float)
        found = _solved_share(model, lora, num_parameters) if share else _solved_number(model, lora, num_parameters)
    return replace(found or lora, num_parameters=num_parameters)


def _solved_number(model: spec.Model, lora: Lora, num_parameters: int) -> Lora | None:
    """Solve for a whole number with each unit of which the count grows by the same step."""
    name = rule_of(lora.kind).solved
    first, second = (_by_rule(model, _with(lora, name, value)).num_elements for value in (1, 2))
    if second <= first or num_parameters < first:
        return None
    value = 1 + (num_parameters - first) // (second - first)
    found = _with(lora, name, value) if value <= MOST_SOLVED else None
    return found if found and _by_rule(model, found).num_elements == num_parameters else None


def _solved_share(model: spec.Model, lora: Lora, num_parameters: int) -> Lora | None:
    """Solve for a share of the weights: the count is linear in it, but for rounding."""
    name = rule_of(lora.kind).solved
    none, every = (_by_rule(model, _with(lora, name, value)).num_elements for value in (0.0, 1.0))
    value = (num_parameters - none) / (every - none) if every != none else -1.0
    return _with(lora, name, round(value, 6)) if 0 <= value <= 1 else None


def least_held_bytes(model: spec.Model, lora: Lora, precision: AdapterPrecision, *, base_width: float) -> int:
    """Return the least that may lie beside the targets: settings that are not said may have their other values."""
    return min(held_bytes(model, one, precision, base_width=base_width) for one in unsaid_variants(model, lora))


def unsaid_variants(model: spec.Model, lora: Lora) -> tuple[Lora, ...]:
    """Return a method, and it with other usual values of settings that are not said, that train as many parameters."""
    rule, said = rule_of(lora.kind), {name for name, _value in lora.options}
    others = ((name, value) for name, values in rule.alternatives.items() if name not in said for value in values)
    count = _by_rule(model, lora).num_elements
    options = (_with(lora, name, value) for name, value in others)
    return (lora, *(one for one in options if _by_rule(model, one).num_elements == count))


def _with(lora: Lora, name: str, value: int | float | str) -> Lora:
    if name == "rank":
        return replace(lora, rank=int(value))
    return replace(lora, options=(*((key, old) for key, old in lora.options if key != name), (name, value)))
