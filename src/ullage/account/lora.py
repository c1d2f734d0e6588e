"""LoRA and DoRA: their parameters, and what they keep; other methods: :mod:`ullage.account.adapters`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

from ullage.account.activations.saved import SavedTensor
from ullage.account.adapters.rule import AdapterPrecision
from ullage.account.adapters.whole import is_target, trained_tensors
from ullage.account.optimizer import Trained
from ullage.account.parameters import Parameter, Role, layer_parameters, model_parameters
from ullage.errors import InputError
from ullage.i18n import _
from ullage.spec import model as spec
from ullage.spec.training import Lora


@lru_cache(maxsize=256)
def layer_targets(layer: spec.Layer, hidden_size: int, targets: tuple[str, ...]) -> tuple[Parameter, ...]:
    """Return the weights of one layer that get an adapter."""
    return tuple(one for one in layer_parameters(layer, hidden_size) if is_target(one, targets))


def adapter_parameters(model: spec.Model, lora: Lora) -> Trained:
    """Return the trained tensors of all adapters; a stated number of parameters wins over the formula.

    Formula: r x in + out x r per target; DoRA: + out; ``frozen`` a or b: without that factor.
    Source: arXiv:2106.09685 sec. 4.1; arXiv:2402.09353 eq. 5.
    Known error: none.

    Raises:
        InputError: no layer has a linear of that name.
    """
    if lora.kind != "lora":
        return trained_tensors(model, lora)
    tensors: dict[tuple[int, ...], int] = {}
    frozen = dict(lora.options).get("frozen")
    for parameter in _targets(model, lora.targets):
        rows, columns = parameter.shape
        shapes = [] if frozen == "a" else [(lora.rank, columns)]
        shapes += [] if frozen == "b" else [(rows, lora.rank)]
        for shape in (*shapes, *([(rows,)] if lora.dora else [])):
            tensors[shape] = tensors.get(shape, 0) + parameter.copies
    if not tensors:
        raise InputError(
            _("no linear layer of {model} is called {targets}").format(
                model=model.name, targets=", ".join(lora.targets)[:200]
            ),
            where="lora targets",
            remedy=_("give names of its linear layers, such as q_proj, or all-linear"),
        )
    if lora.num_parameters is not None:
        return Trained(tensors=(((lora.num_parameters,), 1),))
    return Trained(tensors=tuple(tensors.items()))


def frozen_elements(model: spec.Model, lora: Lora) -> int:
    """Return the elements of factors that lie there untrained: of LoRA-FA the first ones, of MiCA the second."""
    frozen = dict(lora.options).get("frozen")
    if lora.kind != "lora" or frozen is None:
        return 0
    side = 1 if frozen == "a" else 0
    return sum(lora.rank * one.shape[side] * one.copies for one in _targets(model, lora.targets))


def copied_parameters(model: spec.Model, lora: Lora) -> Trained:
    """Return the tensors of modules that are trained in full beside the adapters, each a copy of its own.

    A tied head is a copy apart from the embedding's.
    Source: peft@0.13.2:utils/other.py:ModulesToSaveWrapper.update (deep copy of the module).

    Raises:
        InputError: no module has that name.
    """
    tensors: list[tuple[tuple[int, ...], int]] = []
    for name in lora.trained_modules:
        found = [
            placed.parameter
            for placed in model_parameters(model)
            if placed.section in ("embedding", "head", "final")
            and name in placed.name.removesuffix(".weight").removesuffix(".bias").split(".")
        ]
        if not found and name == "lm_head" and model.tied_embeddings:
            found = [one.parameter for one in model_parameters(model) if one.section == "embedding"][:1]
        if not found:
            raise InputError(
                _("no module of {model} is called {targets}").format(model=model.name, targets=name[:80]),
                where="lora trained modules",
            )
        tensors += [(parameter.shape, parameter.copies) for parameter in found]
    return Trained(tensors=tuple(tensors))


def _targets(model: spec.Model, targets: tuple[str, ...]) -> Iterator[Parameter]:
    for layer in model.layers:
        yield from layer_targets(layer, model.hidden_size, targets)


def adapter_table(
    layer: spec.Layer,
    hidden_size: int,
    lora: Lora,
    precision: AdapterPrecision,
    *,
    num_tokens: int,
    num_routed_tokens: int,
) -> tuple[SavedTensor, ...]:
    """Return what the adapters of one layer keep.

    Formula: per target the input in the product's dtype (each adapter casts for itself) + with dropout a mask of one
        byte per element + the low-rank product. Without a cast and without dropout, adapters that read one input
        share it; the output of attention is kept by attention itself.
    Source: peft@0.13.2:tuners/lora/layer.py:Linear.forward (_cast_input_dtype, lora_dropout); tuners/lora/bnb.py:
        Linear4bit.forward (no cast under autocast).
    Known error: none against saved tensors of a wrapped model, DoRA's norms apart.
    """
    if precision.fused:
        return _fused_table(layer, hidden_size, lora, precision, num_tokens)
    product = precision.product
    shares_input = precision.compute_dtype in (precision.dtype, precision.uncast) and not lora.dropout
    read_anyway = _outputs_of_attention(layer) if precision.uncast is not None and not lora.dropout else ()
    frozen = dict(lora.options).get("frozen")
    found: list[SavedTensor] = []
    inputs_kept: set[tuple[str, int]] = set()
    for parameter in layer_targets(layer, hidden_size, lora.targets):
        module = re.sub(r"\{e\}\.", "", parameter.name.removesuffix(".weight"))
        routed = parameter.role is Role.EXPERT
        rows = num_routed_tokens if routed else num_tokens
        out_features, in_features = parameter.shape
        shared = (module.rpartition(".")[0], in_features)
        kept = module in read_anyway or (shares_input and shared in inputs_kept)
        if frozen != "a" and not kept:
            found.append(_row(f"{module}.lora input", module, rows * in_features, product))
            inputs_kept.add(shared)
        if lora.dropout:
            found.append(_row(f"{module}.lora dropout mask", module, rows * in_features, "bool"))
        if frozen != "b":
            found.append(_row(f"{module}.lora product", module, rows * lora.rank, product))
        if lora.dora:
            found.append(_row(f"{module}.base output", module, rows * out_features, precision.compute_dtype))
            found.append(_row(f"{module}.dora output", module, rows * out_features, product))
    return tuple(found)


def _fused_table(
    layer: spec.Layer, hidden_size: int, lora: Lora, precision: AdapterPrecision, num_tokens: int
) -> tuple[SavedTensor, ...]:
    """Return what adapters of attention keep as fused kernels.

    Formula: the input of queries, keys and values once; with dropout what is left of the input, for each.
    Source: fms-acceleration@876e2ed6:plugins/fused-ops-and-kernels/src/fms_acceleration_foak/fused_ops/unsloth_lora/
        bnb/fast_lora.py:LoRA_QKV, LoRA_W.
    """
    found: list[SavedTensor] = []
    kept: set[str] = set()
    outputs = _outputs_of_attention(layer)
    for parameter in layer_targets(layer, hidden_size, lora.targets):
        module = parameter.name.removesuffix(".weight")
        elements, parent = num_tokens * parameter.shape[1], module.rpartition(".")[0]
        if module not in outputs and parent not in kept:
            found.append(_row(f"{module}.lora input", module, elements, precision.compute_dtype))
            kept.add(parent)
        if lora.dropout:
            found.append(_row(f"{module}.lora input dropped", module, elements, precision.compute_dtype))
    return tuple(found)


def _outputs_of_attention(layer: spec.Layer) -> tuple[str, ...]:
    """Return the projections that read what the kernel of attention keeps."""
    return tuple(f"{mixer.prefix}.{mixer.o_name}" for mixer in layer.mixers if isinstance(mixer, spec.Attention))


def _row(name: str, module: str, num_elements: int, dtype: str) -> SavedTensor:
    return SavedTensor(
        name=name,
        module=module,
        num_elements=num_elements,
        dtype=dtype,
        source="peft@0.13.2:tuners/lora/layer.py:Linear.forward",
    )
