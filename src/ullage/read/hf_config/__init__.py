"""Hugging Face ``config.json`` → :class:`ullage.spec.model.Model`, by explicit evidence.

Each model type names the reader that understands it (:data:`FAMILIES`); a reader takes the keys it understands, and a
key that is left over is an error that names it. Nothing falls back to multi-head attention.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from ullage.errors import InputError, UnknownArchitectureError
from ullage.i18n import _
from ullage.read.hf_config.defaults import fill_in
from ullage.read.hf_config.families import FAMILIES
from ullage.read.hf_config.keys import Keys
from ullage.read.hf_config.quantization import read_sidecar, sidecar_of
from ullage.read.jsonfile import read_json_object
from ullage.spec.model import Model

__all__ = ["FAMILIES", "read_config", "read_config_object"]


def read_config(path: Path, *, assume: bool = False) -> Model:
    """Read a ``config.json``, and the ModelOpt ``hf_quant_config.json`` beside it if there is one.

    Args:
        path: the file.
        assume: go on when keys are not understood; they are listed in ``Model.ignored_keys`` and ``assumed``.

    Raises:
        InputError: not a usable config.
        UnknownArchitectureError: an architecture or key that is not understood.
    """
    values = read_json_object(path)
    model = read_config_object(values, where=str(path), name=_name_of(path), assume=assume)
    sidecar = sidecar_of(path) if model.quantization is None else None
    return replace(model, quantization=read_sidecar(sidecar, values)) if sidecar else model


def read_config_object(values: dict[str, Any], *, where: str, name: str, assume: bool = False) -> Model:
    """Read a config that is already parsed (see :func:`read_config`)."""
    keys = Keys(values, where)
    model_type = keys.text("model_type", "")
    reader = FAMILIES.get(model_type) or _by_evidence(keys, model_type, assume=assume)
    fill_in(keys, model_type)
    module, function = reader.split(":")
    model: Model = getattr(import_module(f"ullage.read.hf_config.families.{module}"), function)(keys)
    ignored = keys.finish(model_type or module, assume=assume)
    assumed = (_("keys not understood, taken to be without effect: {keys}").format(keys=", ".join(ignored)),)
    return replace(
        model,
        name=name or model.name,
        source=where,
        ignored_keys=ignored,
        rotary_sections=module == "vision_qwen" or _rotates_by_sections(values),
        assumed=model.assumed + (assumed if ignored else ()),
    )


def _rotates_by_sections(values: dict[str, Any]) -> bool:
    """Tell whether the decoder's rotation is cut into sections of time, height and width.

    Qwen's vision families always rotate so, whether or not the file says it.
    Source: transformers@5.23.0:models/qwen3_vl/modeling_qwen3_vl.py:Qwen3VLTextRotaryEmbedding (default sections).
    """
    inner = (values.get(name) for name in ("text_config", "llm_config", "language_config"))
    for part in (values, *(one for one in inner if isinstance(one, dict))):
        for name in ("rope_scaling", "rope_parameters"):
            rope = part.get(name)
            if isinstance(rope, dict) and "mrope_section" in rope:
                return True
    return False


def _by_evidence(keys: Keys, model_type: str, *, assume: bool) -> str:
    """Return the reader of a config whose model type is not in the registry, going by its keys alone."""
    from ullage.read.hf_config.families import generic, native

    if native.is_native(keys.values):
        return "native:read"
    if not model_type and "quantization" in keys and "hidden_size" not in keys:
        raise InputError(
            _("this is ModelOpt's hf_quant_config.json, which names no sizes"),
            where=keys.where,
            remedy=_("give the config.json that stands beside it"),
        )
    if assume and generic.is_plain(keys.values):
        return "generic:read"
    if model_type:
        what = _("the model type {model_type!r} is not understood").format(model_type=model_type[:80])
    else:
        what = _("there is no model_type, so this is no model config that ullage understands")
    raise UnknownArchitectureError(what, where=keys.where, keys=sorted(keys.values)[:40])


def _name_of(path: Path) -> str:
    stem = path.parent.name if path.name == "config.json" else path.stem
    if not stem:
        raise InputError(_("no model name can be read from this path"), where=str(path))
    return stem.replace("__", "/", 1)
