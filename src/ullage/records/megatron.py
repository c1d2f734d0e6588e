"""Records of Megatron-LM: jobs in its own flags, and models cut in ways that only its tables follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.machine import parse_machine
from ullage.read.megatron_args import job_from_megatron_args, smallest_world
from ullage.records import words
from ullage.records.schema import Record
from ullage.spec.model import Attention, DenseFFN, Layer, Model
from ullage.spec.training import TrainingJob

#: Keys of ``model_overrides`` that change layers.
LAYER_KEYS = frozenset(("num_key_value_heads", "first_k_dense_replace", "num_nextn_predict_layers"))
GPUS_OF_A_NODE = 8


def megatron_job(record: Record) -> TrainingJob | None:
    """Return the job that ``job.native.megatron_args`` describes, or None where there are no such flags.

    A record without a number of GPUs is taken to have run on one node where its sizes divide it, else on the fewest
    GPUs that its sizes need.
    """
    native = record.job.get("native")
    args = native.get("megatron_args") if isinstance(native, Mapping) else None
    if record.engine != "megatron" or not isinstance(args, Mapping):
        return None
    environment = native.get("env") if isinstance(native, Mapping) else None
    if environment is not None and not isinstance(environment, Mapping):
        raise InputError(_("job.native.env is not an object"), where=record.where)
    number = words.integer(record.job, "num_gpus", record.where)
    if number is None:
        least = smallest_world(args)
        number = GPUS_OF_A_NODE if GPUS_OF_A_NODE % least == 0 else least
    gpu = words.text(record.job, "gpu", record.where)
    machine = parse_machine(f"{number}x{gpu}")
    version = str(record.job.get("engine_version") or "")
    return job_from_megatron_args(args, environment, machine=machine, engine_version=version)


def with_layers(model: Model, overrides: Mapping[str, Any]) -> Model:
    """Apply overrides of layers: KV heads, how many layers are dense, no multi-token prediction."""
    layers = list(model.layers)
    dense = overrides.get("first_k_dense_replace")
    if isinstance(dense, int) and layers:
        plain = next((layer for layer in layers if _is_dense(layer)), None)
        mixture = next((layer for layer in layers if not _is_dense(layer)), None)
        if plain is not None and mixture is not None:
            layers = [plain if index < dense else mixture for index in range(len(layers))]
    heads = overrides.get("num_key_value_heads")
    if isinstance(heads, int) and heads > 0:
        kinds = {id(layer): _with_kv_heads(layer, heads) for layer in layers}
        layers = [kinds[id(layer)] for layer in layers]
    mtp = () if overrides.get("num_nextn_predict_layers") == 0 else model.mtp
    return replace(model, layers=tuple(layers), mtp=mtp)


def _is_dense(layer: Layer) -> bool:
    return all(isinstance(block, DenseFFN) for block in layer.ffns)


def _with_kv_heads(layer: Layer, heads: int) -> Layer:
    mixers = tuple(
        replace(mixer, num_kv_heads=heads) if isinstance(mixer, Attention) else mixer for mixer in layer.mixers
    )
    return replace(layer, mixers=mixers)
