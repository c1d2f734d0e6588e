"""The model of a record: its id or config, and how its weights are held."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from ullage.catalog import models as catalog
from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.hf_config import read_config_object
from ullage.read.quantization_names import assumption, named_quantization
from ullage.records.compare import NotComparableError
from ullage.records.overrides import with_overrides
from ullage.records.schema import Record
from ullage.spec.model import Model

_MADE_BY_ENGINE = re.compile(r"\b(online|on the fly)\b")
_GGUF_WITHOUT_TYPE = re.compile(r"gguf\s*(\(|$)")


def record_model(record: Record) -> tuple[Model, str | None]:
    """Return the model, and the engine's quantisation setting where the checkpoint does not carry it.

    Raises:
        NotComparableError: the model's dimensions are not known.
    """
    value = record.job.get("model")
    overrides = record.job.get("model_overrides")
    if isinstance(value, dict):
        config = value.get("config")
        if not isinstance(config, dict) or not isinstance(overrides or {}, dict):
            raise InputError(_("model.config is not an object"), where=record.where)
        model = read_config_object({**config, **(overrides or {})}, where=record.where, name=record.record_id)
    elif isinstance(value, str):
        model = with_overrides(_by_name(value), overrides, where=record.where)
    else:
        raise InputError(_("model is missing or neither a name nor a config"), where=record.where)
    return _quantised(model, record.job.get("quantization"))


def gguf_type_missing(quantization: Any) -> bool:
    """Return whether a GGUF is said without its type: ``gguf (type not stated)``."""
    return isinstance(quantization, str) and bool(_GGUF_WITHOUT_TYPE.match(quantization.lower()))


def _by_name(text: str) -> Model:
    """Find the model in the catalog alone: a record never makes the program open a file or the network."""
    found = catalog.find(re.sub(r"\s*\([^)]*\)", "", text[:400]).strip())
    if found is None:
        raise NotComparableError(_("the dimensions of {model} are not known").format(model=text[:80]))
    return catalog.load_entry(found)


def _quantised(model: Model, words: Any) -> tuple[Model, str | None]:
    if not isinstance(words, str) or gguf_type_missing(words):
        return model, None
    lower = words.lower()
    if lower.startswith("gguf"):
        return model, words
    if _MADE_BY_ENGINE.search(lower):
        return model, lower.split()[0]
    quantization = named_quantization(words, model)
    if quantization == model.quantization:
        return model, None
    sentences = [_("weights taken as a usual checkpoint in {scheme}").format(scheme=words)]
    sentences += [assumption(words)] if assumption(words) else []
    return replace(model, quantization=quantization, assumed=(*model.assumed, *sentences)), None
