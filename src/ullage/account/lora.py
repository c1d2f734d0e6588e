"""Low-rank adapters: their parameters, and what they keep of a forward pass."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

from ullage.account.activations.saved import SavedTensor
from ullage.account.optimizer import Trained
from ullage.account.parameters import Parameter, Role, layer_parameters, model_parameters
from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.spec import model as spec
from ullage.spec.training import Lora

_LINEAR_ROLES = (Role.LINEAR, Role.EXPERT, Role.ROUTER)


class AdapterPrecision(Frozen):
    """Number formats around an adapter.

    Attributes:
        dtype: of the adapter's weights; peft makes 16-bit ones fp32 (autocast_adapter_dtype).
        autocast: its products run in ``compute_dtype`` although the weights are fp32.
        input_shared: the input needs no cast and no dropout, so that all adapters on it keep one tensor.
    """

    dtype: str = "float32"
    compute_dtype: str = "bfloat16"
    autocast: bool = True


def is_target(parameter: Parameter, targets: tuple[str, ...]) -> bool:
    """Return whether peft would wrap the linear layer of this weight.

    Source: peft@0.19.1:tuners/tuners_utils.py:check_target_module_exists (suffix of the module's name).
    """
    if parameter.role not in _LINEAR_ROLES or not parameter.name.endswith(".weight") or len(parameter.shape) != 2:
        return False
    module = parameter.name.removesuffix(".weight")
    if targets == ("all-linear",):
        return True
    return any(module == target or module.endswith(f".{target}") for target in targets)


@lru_cache(maxsize=256)
def layer_targets(layer: spec.Layer, hidden_size: int, targets: tuple[str, ...]) -> tuple[Parameter, ...]:
    """Return the weights of one layer that get an adapter."""
    return tuple(one for one in layer_parameters(layer, hidden_size) if is_target(one, targets))


def adapter_parameters(model: spec.Model, lora: Lora) -> Trained:
    """Return the tensors of all adapters.

    Formula: r x in + out x r per target; DoRA: + out.
    Source: arXiv:2106.09685 sec. 4.1; arXiv:2402.09353 eq. 5.
    Known error: none.

    Raises:
        InputError: no layer has a linear of that name.
    """
    tensors: dict[tuple[int, ...], int] = {}
    for parameter in _targets(model, lora.targets):
        rows, columns = parameter.shape
        for shape in ((lora.rank, columns), (rows, lora.rank), *([(rows,)] if lora.dora else [])):
            tensors[shape] = tensors.get(shape, 0) + parameter.copies
    if not tensors:
        raise InputError(
            _("no linear layer of {model} is called {targets}").format(
                model=model.name, targets=", ".join(lora.targets)[:200]
            ),
            where="lora targets",
            remedy=_("give names of its linear layers, such as q_proj, or all-linear"),
        )
    return Trained(tensors=tuple(tensors.items()))


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
        share it.
    Source: peft@0.13.2:tuners/lora/layer.py:Linear.forward (_cast_input_dtype, lora_dropout).
    Known error: none against saved tensors of a wrapped model, DoRA's norms apart.
    """
    product = precision.compute_dtype if precision.autocast else precision.dtype
    shares_input = precision.dtype == precision.compute_dtype and not lora.dropout
    found: list[SavedTensor] = []
    inputs_kept: set[tuple[str, int]] = set()
    for parameter in layer_targets(layer, hidden_size, lora.targets):
        module = re.sub(r"\{e\}\.", "", parameter.name.removesuffix(".weight"))
        routed = parameter.role is Role.EXPERT
        rows = num_routed_tokens if routed else num_tokens
        out_features, in_features = parameter.shape
        shared = (module.rpartition(".")[0], in_features)
        if not (shares_input and shared in inputs_kept):
            found.append(_row(f"{module}.lora input", module, rows * in_features, product))
            inputs_kept.add(shared)
        if lora.dropout:
            found.append(_row(f"{module}.lora dropout mask", module, rows * in_features, "bool"))
        found.append(_row(f"{module}.lora product", module, rows * lora.rank, product))
        if lora.dora:
            found.append(_row(f"{module}.dora output", module, rows * out_features, product))
    return tuple(found)


def _row(name: str, module: str, num_elements: int, dtype: str) -> SavedTensor:
    return SavedTensor(
        name=name,
        module=module,
        num_elements=num_elements,
        dtype=dtype,
        source="peft@0.13.2:tuners/lora/layer.py:Linear.forward",
    )
