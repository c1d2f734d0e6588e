"""What people type for a model → :class:`ullage.spec.model.Model`.

A name in the catalog, a folder with ``config.json``, a ``config.json`` itself, a ``.gguf`` file, or a hub id
``owner/name`` (only then, and only when allowed, the network is used).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from ullage.catalog import models as catalog
from ullage.errors import InputError, MissingExtraError, UnknownArchitectureError
from ullage.i18n import _
from ullage.spec.model import Model

SIDECAR = "hf_quant_config.json"
HUB = "https://huggingface.co"


def load_model(text: str, *, assume: bool = False, network: bool = False) -> Model:
    """Find and read the model that ``text`` names.

    Args:
        text: see the module.
        assume: go on over config keys that are not understood (they are listed in ``Model.assumed``).
        network: an id that is neither in the catalog nor on disk may be fetched from the hub.

    Raises:
        InputError: nothing of that name; the nearest names are given.
        UnknownArchitectureError: found, but not understood.
    """
    name = text.strip()
    if not name or len(name) > 4096 or "\0" in name:
        raise InputError(_("{text!r} is not a model").format(text=text[:80]), remedy=_remedy(""))
    path = Path(name).expanduser()
    if name.lower().endswith(".gguf"):
        return read_gguf_model(path)
    if _is_dir(path):
        return read_folder(path, assume=assume)
    if name.endswith(".json"):
        return read_folder(path.parent, config=path, assume=assume)
    found = catalog.find(name)
    if found is not None:
        return catalog.load_entry(found)
    if name.count("/") == 1 and network and not name.startswith((".", "/", "~")):
        return _from_hub(name, assume=assume)
    if _is_file(path):
        raise InputError(_("is neither a config.json nor a .gguf file"), where=name[:200])
    raise InputError(_("the model {text!r} is not in the catalog").format(text=name[:80]), remedy=_remedy(name))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _remedy(name: str) -> str:
    near = ", ".join(catalog.near_names(name)) if name else "deepseek-v3"
    return _("nearest are {names}; a config.json, its folder or a .gguf file will do too").format(names=near)


def read_folder(folder: Path, *, config: Path | None = None, assume: bool = False) -> Model:
    """Read ``config.json`` of a checkpoint folder, and what lies beside it.

    ``hf_quant_config.json`` states the quantisation where the config has none; a ``.gguf`` alone will do as well.
    """
    from ullage.read.hf_config import read_config, read_config_object
    from ullage.read.jsonfile import is_file, read_json_object

    config = config or folder / "config.json"
    if not is_file(config):
        files = sorted(folder.glob("*.gguf")) if _is_dir(folder) else []
        if files:
            return read_gguf_model(files[0])
        if config.name == "config.json" and _is_dir(folder):
            raise InputError(_("there is neither a config.json nor a .gguf file"), where=str(folder))
    sidecar = folder / SIDECAR
    if not is_file(sidecar) or config.name != "config.json":
        return read_config(config, assume=assume)
    values = read_json_object(config)
    if not values.get("quantization_config"):
        values = {**values, "quantization_config": _modelopt(read_json_object(sidecar), sidecar)}
    model = read_config_object(values, where=str(config), name=folder.resolve().name, assume=assume)
    return replace(model, source=f"{config}, {sidecar.name}")


def _modelopt(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return what a ModelOpt sidecar says, in the form of a ``quantization_config``.

    Source: vllm@0.33.0:vllm/model_executor/layers/quantization/modelopt.py:ModelOptQuantConfigBase.from_config.
    """
    stated = values.get("quantization")
    if not isinstance(stated, dict):
        raise InputError(_("the key is missing"), where=f"{path}: quantization")
    return {"quant_method": "modelopt", **stated}


def read_gguf_model(path: Path) -> Model:
    """Read the model that a ``.gguf`` file describes."""
    from ullage.read.jsonfile import is_file

    if not is_file(path):
        raise InputError(_("no such file"), where=str(path))
    model: Model = import_module("ullage.read.gguf").read_gguf_model(path)
    return model


def _hub_is_out_of_reach() -> bool:
    """Return whether the hub's name has no address, so that half a minute of retries would be in vain."""
    import os
    import socket

    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return False  # a proxy knows addresses that this machine does not
    address = os.environ.get("HF_ENDPOINT", HUB).partition("://")[2] or HUB
    host = address.partition("/")[0].rpartition("@")[2].partition(":")[0]
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return True
    return False


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the hub's log of its retries off stderr: one sentence says how it ended."""
    import logging

    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _from_hub(name: str, *, assume: bool) -> Model:
    try:
        hub = import_module("huggingface_hub")
    except ImportError:
        near = MissingExtraError("huggingface_hub", "hub")
        raise InputError(
            _("the model {name!r} is not in the catalog, and to fetch it {what}").format(
                name=name[:80], what=near.what
            ),
            remedy=near.remedy,
        ) from None
    near_only = _hub_is_out_of_reach()
    try:
        with _quiet():
            path = Path(hub.hf_hub_download(name, "config.json", local_files_only=near_only))
    except Exception as error:  # the hub has many kinds of errors, and all mean: not fetched
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        if near_only and "LocalEntryNotFound" in type(error).__name__:
            reason = _("its address is not found: no network?")
        raise InputError(
            _("the model {name!r} is not in the catalog and could not be fetched from the hub ({reason})").format(
                name=name[:80], reason=reason
            ),
            remedy=_remedy(name),
        ) from None
    with suppress(Exception), _quiet():  # most models have none
        hub.hf_hub_download(name, SIDECAR, local_files_only=near_only)
    try:
        return replace(read_folder(path.parent, assume=assume), name=name)
    except UnknownArchitectureError as error:
        raise UnknownArchitectureError(error.what, where=name, keys=error.keys) from None
