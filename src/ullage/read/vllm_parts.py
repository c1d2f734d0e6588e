"""What a ``vllm serve`` line says about drafts, config overrides, transfer of the cache, and a file of settings.

Source: vllm@0.33.0:vllm/config/speculative.py:SpeculativeConfig, vllm/config/kv_transfer.py:KVTransferConfig,
vllm/utils/argparse_utils.py:FlexibleArgumentParser.load_config_file.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.model_overrides import overridden, parse_overrides
from ullage.spec.model import Model

#: Methods that have no weights of their own, or those of the model's own checkpoint.
_NO_WEIGHTS = ("ngram", "ngram_gpu", "suffix", "extract_hidden_states")
#: Flags that override keys of the config, as JSON → the key that the value stands under; "": the value holds keys.
_OVERRIDES = {"hf_overrides": "", "rope_scaling": "rope_scaling"}


def with_overrides(model: Model, flags: tuple[tuple[str, str], ...]) -> Model:
    """Return the model with what ``--hf-overrides`` and the older ``--rope-scaling`` change.

    Raises:
        InputError: the value is no JSON object.
    """
    nested: dict[str, Any] = {}
    for name, text in flags:
        base, _dot, rest = name.partition(".")
        if base not in _OVERRIDES:
            continue
        flag = "--" + base.replace("_", "-")
        if rest:
            _lay(nested, rest.split("."), text)
            continue
        values = parse_overrides(text, flag)
        nested.update({_OVERRIDES[base]: values} if _OVERRIDES[base] else values)
    return overridden(model, nested, "--hf-overrides") if nested else model


def _lay(values: dict[str, Any], path: list[str], text: str) -> None:
    """Lay a dotted part (``--hf-overrides.text_config.max_position_embeddings 8192``) into ``values``."""
    for key in path[:-1]:
        inner = values.setdefault(key, {})
        values = inner if isinstance(inner, dict) else {}
    try:
        values[path[-1]] = float(text) if "." in text else int(text)
    except ValueError:
        values[path[-1]] = text


def optimization(words: list[str], at: int, flags: list[tuple[str, str]]) -> int:
    """Read ``-O3``, ``-O=3``, ``-O 3`` and the older ``-O.level=3`` and ``-O '{…}'``.

    Source: vllm@0.33.0:vllm/utils/argparse_utils.py:FlexibleArgumentParser.parse_args.
    """
    value = words[at][2:].removeprefix("=")
    if not value and at + 1 < len(words) and re.fullmatch(r"O?[0-3]|\{.*\}", words[at + 1], re.DOTALL):
        value, at = words[at + 1], at + 1
    if value.startswith((".", "{")):
        key, _equals, text = value.partition("=") if value.startswith(".") else ("", "", value)
        flags.append((f"compilation_config{key}", text))
    else:
        flags.append(("optimization_level", value.removeprefix("O") or "2"))
    return at + 1


def draft_model(
    method: str, name: str, target: str, load: Callable[[str], Model] | None
) -> tuple[Model | None, tuple[str, ...]]:
    """Return the model that drafts, where it is another than the target, and what was assumed.

    One that cannot be found is no reason to give no answer: the answer then says that it is not counted.
    """
    if not name or name == target or method in _NO_WEIGHTS or method.endswith("mtp"):
        return None, ()
    try:
        return (load(name) if load is not None else None), ()
    except InputError:
        said = _("the draft model {name} is not in the catalog: its weights and its cache are not counted")
        return None, (said.format(name=name[:80]),)


def transfer_assumed(config: dict[str, Any]) -> tuple[str, ...]:
    """Return what is said of a KV connector: its own buffers depend on its settings, which lie elsewhere."""
    name = config.get("kv_connector")
    if not name:
        return ()
    said = _("--kv-transfer-config: what {name} takes beside the KV cache is not counted")
    return (said.format(name=str(name)[:60]),)


def file_flags(path: str) -> tuple[tuple[str, str], ...] | None:
    """Return the settings in the YAML file of ``--config``, None where it is not here.

    Raises:
        InputError: the file is not understood.
    """
    from pathlib import Path

    from ullage.read.jsonfile import is_file

    if not is_file(Path(path)):
        return None
    from ullage.read.yamlfile import read_yaml

    values = read_yaml(Path(path))
    if not isinstance(values, dict):
        raise InputError(_("the file holds no settings"), where=path)
    return tuple((str(name).replace("-", "_"), _text(value)) for name, value in values.items())


def _text(value: Any) -> str:
    import json

    if isinstance(value, list):
        return " ".join(str(part) for part in value)
    if isinstance(value, dict):
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
