"""Every tensor of a model, by name, shape and the way it is split: the inventory that all else counts.

The inventory holds what a checkpoint of the model holds, under the checkpoint's names, so that parameter counts,
stored bytes under a quantisation, a rank's share under an engine's rules and GGUF types all come from one list.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

from ullage.account.parameters import attention, ffn, linear, residual
from ullage.account.parameters.parameter import Parameter, Role, norm_parameters, of_extra
from ullage.frozen import Frozen
from ullage.spec import model as spec

__all__ = ["Counts", "Parameter", "Placed", "Role", "count", "layer_parameters", "model_parameters"]


class Placed(Frozen):
    """A parameter in its place. ``section``: embedding, layer, final, head, mtp, tower; ``layer``: its number or -1."""

    section: str
    layer: int
    parameter: Parameter

    @property
    def name(self) -> str:
        """The full checkpoint name."""
        return self.parameter.name


class Counts(Frozen):
    """Exact parameter counts. ``total``: tied weights once, buffers and MTP left out, towers included.

    ``active``: parameters a token meets = total - routed x (1 - top_k / num_experts), embeddings included.
    """

    total: int
    active: int
    mtp: int
    towers: int
    embedding: int
    routed_experts: int


_MIXERS: dict[type, Callable[[Any, int], list[Parameter]]] = {
    spec.Attention: attention.attention,
    spec.LatentAttention: attention.latent_attention,
    spec.CompressedAttention: attention.compressed_attention,
    spec.GatedDeltaNet: linear.gated_delta_net,
    spec.KimiDeltaAttention: linear.kimi_delta_attention,
    spec.LightningAttention: linear.lightning_attention,
    spec.Mamba: linear.mamba,
    spec.Mamba2: linear.mamba2,
    spec.ShortConvolution: linear.short_convolution,
}
_FFNS: dict[type, Callable[[Any, int], list[Parameter]]] = {
    spec.DenseFFN: ffn.dense,
    spec.MoEFFN: ffn.mixture_of_experts,
}


@lru_cache(maxsize=4096)
def layer_parameters(layer: spec.Layer, hidden_size: int) -> tuple[Parameter, ...]:
    """Return the parameters of one layer, names relative to the layer."""
    found: list[Parameter] = []
    for mixer in layer.mixers:
        found += _MIXERS[type(mixer)](mixer, hidden_size)
    for block in layer.ffns:
        found += _FFNS[type(block)](block, hidden_size)
    for norm in layer.norms:
        found += norm_parameters(norm)
    if layer.residual is not None:
        found += residual.hyper_connections(layer.residual, hidden_size)
    found += [of_extra(extra) for extra in layer.extras]
    return tuple(found)


def model_parameters(model: spec.Model, *, mtp: bool = True, towers: bool = True) -> Iterator[Placed]:
    """Yield every stored tensor of the model once, in checkpoint order; a tied head is not repeated."""
    for parameter in _embedding_parameters(model):
        yield Placed(section="embedding", layer=-1, parameter=parameter)
    kinds: dict[int, tuple[Parameter, ...]] = {}
    for index, layer in enumerate(model.layers):
        parameters = kinds.get(id(layer))
        if parameters is None:
            parameters = kinds[id(layer)] = layer_parameters(layer, model.hidden_size)
        for parameter in parameters:
            yield _placed("layer", index, f"{model.layers_name}.{index}.", parameter)
    for norm in model.final_norms:
        for parameter in norm_parameters(norm):
            yield Placed(section="final", layer=-1, parameter=parameter)
    for extra in model.extras:
        yield Placed(section="final", layer=-1, parameter=of_extra(extra))
    for parameter in _head_parameters(model):
        yield Placed(section="head", layer=-1, parameter=parameter)
    if mtp:
        yield from _mtp_parameters(model)
    if towers:
        for tower in model.towers:
            for extra in tower.tensors:
                yield Placed(section="tower", layer=-1, parameter=replace(of_extra(extra), copies=tower.copies))


def _embedding_parameters(model: spec.Model) -> Iterator[Parameter]:
    rows = model.vocab_size + model.extra_embedding_rows
    yield Parameter(
        name=f"{model.embedding_name}.weight",
        shape=(rows, model.embedding_size or model.hidden_size),
        role=Role.EMBEDDING,
        split="vocab",
    )
    if model.learned_positions:
        shape = (model.learned_positions, model.hidden_size)
        yield Parameter(name=f"{model.positions_name}.weight", shape=shape, role=Role.OTHER)


def _head_parameters(model: spec.Model) -> Iterator[Parameter]:
    if not model.tied_embeddings:
        shape = (model.vocab_size, model.embedding_size or model.hidden_size)
        yield Parameter(name=f"{model.head_name}.weight", shape=shape, role=Role.EMBEDDING, split="vocab")
    if model.lm_head_bias:
        yield Parameter(name=f"{model.head_name}.bias", shape=(model.vocab_size,), role=Role.BIAS, split="vocab")


def _placed(section: str, index: int, prefix: str, parameter: Parameter) -> Placed:
    return Placed(section=section, layer=index, parameter=replace(parameter, name=prefix + parameter.name))


def mtp_prefix(model: spec.Model, offset: int) -> str:
    """Return what the names of MTP module ``offset`` begin with, dot included."""
    prefix = model.mtp[offset].prefix
    return f"{model.layers_name}.{len(model.layers) + offset}." if prefix is None else prefix


def _mtp_parameters(model: spec.Model) -> Iterator[Placed]:
    for offset, module in enumerate(model.mtp):
        index = len(model.layers) + offset
        prefix = mtp_prefix(model, offset)
        for norm in module.norms:
            for parameter in norm_parameters(norm):
                yield _placed("mtp", index, prefix, parameter)
        for extra in module.extras:
            yield _placed("mtp", index, prefix, of_extra(extra))
        for parameter in layer_parameters(module.layer, model.hidden_size):
            yield _placed("mtp", index, prefix, parameter)


def _kinds(layers: tuple[spec.Layer, ...]) -> list[tuple[spec.Layer, int]]:
    """Return each kind of layer once with its number; readers make equal layers one object."""
    kinds: dict[int, list[Any]] = {}
    for layer in layers:
        kinds.setdefault(id(layer), [layer, 0])[1] += 1
    return [(layer, times) for layer, times in kinds.values()]


def count(model: spec.Model) -> Counts:
    """Count parameters exactly (see :class:`Counts`)."""
    sums = dict.fromkeys(("embedding", "layer", "final", "head", "mtp", "tower"), 0)
    routed = active_routed = 0
    for layer, times in _kinds(model.layers):
        for parameter in layer_parameters(layer, model.hidden_size):
            if parameter.buffer:
                continue
            size = math.prod(parameter.shape) * parameter.copies * times
            sums["layer"] += size
            if parameter.role is Role.EXPERT:
                routed += size
                active_routed += size * parameter.active_copies // parameter.copies
    for placed in model_parameters(replace(model, layers=())):
        parameter = placed.parameter
        if parameter.buffer:
            continue
        sums[placed.section] += math.prod(parameter.shape) * parameter.copies
    total = sum(size for section, size in sums.items() if section != "mtp")
    return Counts(
        total=total,
        active=total - routed + active_routed,
        mtp=sums["mtp"],
        towers=sums["tower"],
        embedding=sums["embedding"],
        routed_experts=routed,
    )
