"""The model of a record: its id or config, and how its weights are held."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from ullage.catalog import models as catalog
from ullage.catalog.models import SUFFIXES
from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.hf_config import read_config_object
from ullage.read.hf_config.keys import Keys
from ullage.read.hf_config.quantization import read_quantization
from ullage.records.compare import NotComparableError
from ullage.records.schema import Record
from ullage.spec.model import Model

_W8A8_INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"type": "int", "num_bits": 8, "strategy": "channel", "symmetric": True},
        }
    },
}


@dataclass(frozen=True, kw_only=True)
class _Scheme:
    """Words of a record and the ``quantization_config`` of a usual checkpoint of the kind.

    ``replaces``: a catalog checkpoint that has another quantisation of its own is not the one these words speak of.
    """

    pattern: re.Pattern[str]
    config: dict[str, Any] | None
    method: str
    replaces: bool


#: Searched in order. Sources: :data:`ullage.catalog.models.SUFFIXES`; compressed-tensors@0.12:quant_scheme.py W8A8.
_SCHEMES = (
    _Scheme(pattern=re.compile(r"awq"), config=SUFFIXES["awq"], method="awq", replaces=True),
    _Scheme(pattern=re.compile(r"gptq|auto-?round"), config=SUFFIXES["gptq"], method="gptq", replaces=True),
    _Scheme(pattern=re.compile(r"nvfp4"), config=SUFFIXES["nvfp4"], method="modelopt", replaces=True),
    _Scheme(pattern=re.compile(r"int8"), config=_W8A8_INT8, method="compressed-tensors", replaces=True),
    _Scheme(pattern=re.compile(r"fp8.block"), config=SUFFIXES["fp8"], method="fp8", replaces=False),
    _Scheme(pattern=re.compile(r"fp8"), config=SUFFIXES["fp8-dynamic"], method="compressed-tensors", replaces=False),
)
_MADE_BY_ENGINE = re.compile(r"\b(online|on the fly)\b")


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
    """Find the model in the catalog alone: a record never makes the program open a file or the network."""
    found = catalog.find(re.sub(r"\s*\([^)]*\)", "", text).strip())
    if found is None:
        raise NotComparableError(_("the dimensions of {model} are not known").format(model=text[:80]))
    return catalog.load_entry(found)


def _quantised(model: Model, words: Any) -> tuple[Model, str | None]:
    if not isinstance(words, str):
        return model, None
    lower = words.lower()
    if lower.startswith("gguf"):
        return model, None if re.match(r"gguf\s*(\(|$)", lower) else words
    if _MADE_BY_ENGINE.search(lower):
        return model, lower.split()[0]
    scheme = next((one for one in _SCHEMES if one.pattern.search(lower)), None)
    own = model.quantization
    if own is not None and (scheme is None or not scheme.replaces or own.method == scheme.method):
        return model, None
    if scheme is None:
        return model, lower.split()[0]
    keys = Keys({"quantization_config": scheme.config}, f"quantization {words}")
    sentence = _("weights taken as the usual checkpoint of {scheme}").format(scheme=words)
    return replace(model, quantization=read_quantization(keys), assumed=(*model.assumed, sentence)), None
