"""The model of a record: its id or config, and how its weights are held."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ullage.errors import InputError, UnknownArchitectureError
from ullage.i18n import _
from ullage.read.hf_config import read_config_object
from ullage.read.hf_config.keys import Keys
from ullage.read.hf_config.quantization import read_quantization
from ullage.read.model_source import load_model
from ullage.records.compare import NotComparableError
from ullage.records.schema import Record
from ullage.spec.model import Model

#: What checkpoints of a method write as ``quantization_config`` when their makers changed nothing.
#: Sources: autoawq@0.2.9:awq/models/_config.py:AwqConfig (4 bits, group 128, zero point);
#: auto-gptq@0.7.1:auto_gptq/modeling/_base.py:BaseQuantizeConfig; DeepSeek-V3's config.json (fp8, 128 x 128);
#: compressed-tensors@0.12:quant_scheme.py presets FP8_DYNAMIC and W8A8; fbgemm: Meta-Llama-3.1-405B-FP8's config.json.
_CHANNEL = {"type": "float", "num_bits": 8, "strategy": "channel", "symmetric": True}
STANDARD_CONFIGS: dict[str, dict[str, Any]] = {
    "awq_int4": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "gptq_int4": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "fp8_block": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "fp8_channel": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": _CHANNEL}},
    },
    "w8a8_int8": {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {**_CHANNEL, "type": "int"}}},
    },
}
#: Words of a record -> standard config; searched in order.
_SCHEMES = (
    (re.compile(r"awq"), "awq_int4"),
    (re.compile(r"gptq|auto-?round"), "gptq_int4"),
    (re.compile(r"fp8.block"), "fp8_block"),
    (re.compile(r"w8a8.int8|int8"), "w8a8_int8"),
    (re.compile(r"fp8.*(compressed-tensors|fbgemm|dynamic)"), "fp8_channel"),
)
_MADE_BY_ENGINE = re.compile(r"\b(online|on the fly|dynamic quantization)\b")
_QUANTISED_NAME = re.compile(
    r"[-_.]?(awq|gptq|fp8|nvfp4|mxfp4|int4|int8|w4a16|w8a8|gguf|bnb|4bit|8bit|dynamic|static|block|quantized)$",
    re.IGNORECASE,
)


def record_model(record: Record) -> tuple[Model, str | None]:
    """Return the model, and the engine's quantisation setting where the checkpoint does not carry it.

    Raises:
        NotComparableError: the model's dimensions are not known.
    """
    value = record.job.get("model")
    overrides = record.job.get("model_overrides")
    if isinstance(value, dict):
        config = value.get("config")
        if not isinstance(config, dict):
            raise InputError(_("model.config is not an object"), where=record.where)
        model = read_config_object({**config, **(overrides or {})}, where=record.where, name=record.record_id)
    elif isinstance(value, str):
        if overrides:
            raise NotComparableError(_("a model of the catalog with changed dimensions (model_overrides)"))
        model = _by_name(value)
    else:
        raise InputError(_("model is missing or neither a name nor a config"), where=record.where)
    return _quantised(model, record.job.get("quantization"))


def _by_name(text: str) -> Model:
    for name in _names(text):
        model = _in_catalog(name)
        if model is not None:
            return model
    raise NotComparableError(_("the dimensions of {model} are not known").format(model=text[:80]))


def _in_catalog(name: str) -> Model | None:
    try:
        return load_model(name)
    except UnknownArchitectureError:
        raise
    except InputError:
        return None


def _names(text: str) -> Iterator[str]:
    """Yield the id, then the id without remarks, then what a quantised copy was made of."""
    bare = re.sub(r"\s*\([^)]*\)", "", text).strip()
    yield bare
    name = bare.rpartition("/")[2]
    shorter = _QUANTISED_NAME.sub("", name)
    while shorter != name:
        yield shorter
        name, shorter = shorter, _QUANTISED_NAME.sub("", shorter)


def _quantised(model: Model, words: Any) -> tuple[Model, str | None]:
    if not isinstance(words, str):
        return model, None
    lower = words.lower()
    if lower.startswith("gguf"):
        return model, None if re.match(r"gguf\s*(\(|$)", lower) else words
    if model.quantization is not None:
        return model, None
    if _MADE_BY_ENGINE.search(lower):
        return model, lower.split()[0]
    for pattern, name in _SCHEMES:
        if pattern.search(lower):
            keys = Keys({"quantization_config": STANDARD_CONFIGS[name]}, f"quantization {words}")
            sentence = _("weights taken as the standard {scheme} checkpoint").format(scheme=name)
            return replace(model, quantization=read_quantization(keys), assumed=(*model.assumed, sentence)), None
    return model, lower.split()[0]
