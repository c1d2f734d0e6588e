"""The catalog of models: names and aliases → the file that holds the model, opened one at a time."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from ullage.catalog import FOLDER, load, nearest
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.spec.model import Model

INDEX = "models/index.json"
#: Endings of re-uploads → the name of the quantisation (see :mod:`ullage.read.quantization_names`); None: a GGUF file.
SUFFIXES: dict[str, str | None] = {
    "awq": "awq",
    "awq-int4": "awq",
    "gptq": "gptq",
    "gptq-int4": "gptq",
    "gptq-int8": "gptq_int8",
    "fp8": "fp8_block",
    "fp8-dynamic": "fp8_dynamic",
    "nvfp4": "nvfp4",
    "mxfp4": "mxfp4",
    "w8a8": "w8a8_int8",
    "w4a16": "int4",
    "int4": "int4",
    "int8": "w8a8_int8",
    "bnb-4bit": "bnb_nf4",
    "bnb-8bit": "bnb_int8",
    "fp4": "nvfp4",
    "mxfp8": "mxfp8",
    "quantized.w8a8": "w8a8_int8",
    "quantized.w4a16": "int4",
    "gguf": None,
}
#: Endings that people leave out, in the order in which they are tried.
RELEASES = ("-instruct", "-chat", "-it", "-base", "-hf", "-v0.1", "-instruct-hf", "-bf16")
#: Endings of further training and of releases: the shape is that of the model without them.
_TUNED = re.compile(
    r"-(instruct|chat|it|base|hf|preview|thinking|reasoning|sft|dpo|rl|qat|abliterated|dequantized|\d{4}|v\d+(\.\d+)?)$"
)


class Found(Frozen):
    """An entry of the catalog. ``quantization`` names that of a quantised copy; ``assumed`` says what was taken."""

    entry: dict[str, Any]
    name: str
    quantization: str | None = None
    assumed: tuple[str, ...] = ()


def entries() -> list[dict[str, Any]]:
    """Return the index: one object per model with name, file, aliases and counts."""
    found: list[dict[str, Any]] = load(INDEX)["models"]
    return found


def keys_of(found: list[dict[str, Any]]) -> dict[str, tuple[int, str]]:
    """Return every name and alias, with and without owner → (place in the index, its name). Full names win.

    The maker of the catalog writes it into the index, so that one lookup computes nothing.
    """
    keys: dict[str, tuple[int, str]] = {}
    for at, entry in enumerate(found):
        for name in (entry["name"], *entry.get("aliases", ())):
            keys[_key(name)] = (at, name)
    for at, entry in enumerate(found):
        for name in (entry["name"], *entry.get("aliases", ())):
            keys.setdefault(_key(name.rpartition("/")[2]), (at, name))
    return keys


def _by_key() -> dict[str, tuple[int, str]]:
    found: dict[str, tuple[int, str]] = load(INDEX)["keys"]
    return found


def _key(name: str) -> str:
    return re.sub(r"[\s_]+", "-", name.strip().lower())


def find(text: str) -> Found | None:
    """Find the model that ``text`` names: a name or alias, a quantised copy of one, or a tuned release of one."""
    keys = _by_key()
    key = _key(text)
    for candidate in (key, key.rpartition("/")[2]):
        if candidate in keys:
            at, name = keys[candidate]
            return Found(entry=entries()[at], name=name)
    short = key.rpartition("/")[2]
    for ending in RELEASES:
        if short + ending in keys:
            at, name = keys[short + ending]
            return Found(entry=entries()[at], name=name)
    base, quantization, suffix = _without_suffix(short)
    plain = next((base + ending for ending in ("", *RELEASES) if base + ending in keys), "")
    if suffix and plain:
        at, name = keys[plain]
        return _copy_of(text, entries()[at], name, suffix, quantization)
    tuned = base.removeprefix("huihui-")
    while match := _TUNED.search(tuned):
        tuned = tuned[: match.start()]
        candidate = next((tuned + ending for ending in ("", *RELEASES) if tuned + ending in keys), "")
        if candidate:
            at, name = keys[candidate]
            if suffix:
                return _copy_of(text, entries()[at], name, suffix, quantization)
            said = _stored_like(name) if entries()[at]["quantization"] else _dimensions_of(name)
            return Found(entry=entries()[at], name=text.strip(), assumed=(said,))
    return _without_hyphens(short, keys)


def _without_hyphens(short: str, keys: dict[str, tuple[int, str]]) -> Found | None:
    """Find a name whose hyphens are set otherwise, such as ``deepseekv3`` or ``llama3-70b``, if it is one model's."""
    for ending in ("", *RELEASES):
        plain = (short + ending).replace("-", "")
        found = {(place[0], place[1]) for key, place in keys.items() if key.replace("-", "") == plain}
        if len({at for at, _name in found}) == 1:
            at, name = min(found)
            return Found(entry=entries()[at], name=name)
    return None


def _without_suffix(short: str) -> tuple[str, str | None, str]:
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if short.endswith(f"-{suffix}"):
            return short[: -len(suffix) - 1], SUFFIXES[suffix], suffix
    return short, None, ""


def _dimensions_of(name: str) -> str:
    return _("the dimensions are those of {name}").format(name=name)


def _stored_like(name: str) -> str:
    return _("the dimensions and the number formats are those of {name}").format(name=name)


def _copy_of(text: str, entry: dict[str, Any], name: str, suffix: str, quantization: str | None) -> Found:
    how = (
        _("the weights are taken as its ending -{suffix} says, as its usual tool writes them").format(suffix=suffix)
        if quantization
        else _("the type of the GGUF file is not known from its name")
    )
    return Found(entry=entry, name=text.strip(), quantization=quantization, assumed=(_dimensions_of(name), how))


def load_entry(found: Found) -> Model:
    """Open the one file of a found entry and build its model."""
    from ullage.spec.codec import decode_model

    file = found.entry["file"]
    model = decode_model(load(f"models/{file}")["model"], where=f"catalog: {file}")
    model = replace(model, name=found.name, assumed=(*model.assumed, *found.assumed))
    if found.quantization is None:
        return model
    from ullage.read.quantization_names import assumption, named_quantization

    said = assumption(found.quantization)
    quantized = named_quantization(found.quantization, model)
    return replace(model, quantization=quantized, assumed=(*model.assumed, *((said,) if said else ())))


def near_names(text: str) -> list[str]:
    """Return the names of the catalog that look most like ``text``."""
    by_short = {entry["name"].rpartition("/")[2]: entry["name"] for entry in entries()}
    return [by_short[short] for short in nearest(text.rpartition("/")[2], list(by_short))]


def folder_exists() -> bool:
    """Say whether the catalog was built (a checkout without it cannot name models)."""
    return (FOLDER / INDEX).is_file()
