"""``quantization_config`` → the format of every stored tensor, as rules in the order they decide.

One file per kind of description; :mod:`~ullage.read.hf_config.quantization.formats` has the formats they share. A
method that is not understood is an error that names it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.hf_config.keys import Keys
from ullage.read.jsonfile import read_json_object
from ullage.spec.model import Model, Quantization

__all__ = ["named_quantization", "read_quantization", "read_quantization_values", "read_sidecar", "sidecar_of"]


def read_quantization(keys: Keys) -> Quantization | None:
    """Read the ``quantization_config`` of a config, None when there is none.

    Raises:
        InputError: it is not usable.
        UnknownArchitectureError: the method, or a scheme in it, is not understood.
    """
    values = keys.raw("quantization_config") or keys.raw("compression_config")
    keys.skip("quantization_config", "compression_config", "expert_dtype")
    if values is None:
        return None
    return read_quantization_values(values, keys.values, keys.at("quantization_config"))


def read_quantization_values(values: Any, config: dict[str, Any], where: str) -> Quantization:
    """Read a quantisation description that belongs to ``config`` (see :func:`read_quantization`)."""
    from ullage.read.hf_config.quantization import compressed_tensors, modelopt, others
    from ullage.read.hf_config.quantization.methods import SIMPLE, Context, unknown

    if not isinstance(values, dict):
        raise InputError(_("{value} is not an object").format(value=repr(values)[:60]), where=where)
    part = Keys(values, where)
    method = _method_of(part)
    text = config.get("text_config")
    num_layers = (text if isinstance(text, dict) else config).get("num_hidden_layers")
    expert_dtype = config.get("expert_dtype")
    context = Context(
        model_type=str(config.get("model_type", "")),
        num_layers=num_layers if isinstance(num_layers, int) and 0 < num_layers <= 10_000 else 0,
        expert_dtype=expert_dtype if isinstance(expert_dtype, str) else None,
    )
    if method == "fp8" and part.raw("quantized_layers"):
        rules = modelopt.read(part, context, base=SIMPLE["fp8"](part, context))
    elif method in SIMPLE:
        rules = SIMPLE[method](part, context)
    elif method in ("compressed-tensors", "compressed_tensors"):
        rules = compressed_tensors.read(part, context)
    elif method.startswith("modelopt"):
        rules = modelopt.read(part, context)
    elif method in ("quark", "torchao"):
        rules = getattr(others, method)(part, context)
    else:
        raise unknown(method, where)
    return Quantization(method=method, rules=rules, kv_cache_dtype=_kv_cache_dtype(part))


def named_quantization(name: str, model: Model) -> Quantization:
    """Return a quantisation by name: see :func:`ullage.read.quantization_names.named_quantization`."""
    from ullage.read import quantization_names

    return quantization_names.named_quantization(name, model)


def _method_of(part: Keys) -> str:
    """Return ``quant_method``, or what the keys of descriptions without it show."""
    method = part.text("quant_method", "")
    if method:
        return str(method).lower()
    producer = part.raw("producer")
    if "quant_algo" in part or (isinstance(producer, dict) and producer.get("name") == "modelopt"):
        return "modelopt"
    if part.raw("load_in_4bit") or part.raw("load_in_8bit"):
        return "bitsandbytes"
    if "config_groups" in part or "sparsity_config" in part:
        return "compressed-tensors"
    return _("(no quant_method)")


def _kv_cache_dtype(part: Keys) -> str | None:
    """Return the cache format that a checkpoint asks for, None when it does not."""
    scheme = part.raw("kv_cache_scheme")
    algorithm = part.raw("kv_cache_quant_algo")
    if isinstance(scheme, dict) and scheme.get("num_bits") == 8 and scheme.get("type") == "float":
        return "fp8"
    for name in (scheme, algorithm):
        if isinstance(name, str) and name.upper() in ("FP8", "NVFP4", "INT8"):
            return name.lower()
    return None


def sidecar_of(path: Path) -> Path | None:
    """Return the ModelOpt description beside a config: ``hf_quant_config.json``, or ``NAME__hf_quant_config.json``."""
    beside = "hf_quant_config.json" if path.name == "config.json" else f"{path.stem}__hf_quant_config.json"
    found = path.with_name(beside)
    return found if found.is_file() else None


def read_sidecar(path: Path, config: dict[str, Any]) -> Quantization:
    """Read a ModelOpt ``hf_quant_config.json`` that stands beside ``config``.

    Raises:
        InputError: not usable.
        UnknownArchitectureError: an algorithm that is not understood.
    """
    values = read_json_object(path)
    inner = values.get("quantization", values)
    if isinstance(inner, dict):
        inner = {**inner, "quant_method": "modelopt"}
    return read_quantization_values(inner, config, str(path))
