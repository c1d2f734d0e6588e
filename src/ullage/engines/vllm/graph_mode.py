"""Which CUDA graphs a start captures: the version's default, or what ``--compilation-config`` and ``-O`` ask for."""

from __future__ import annotations

import json
from typing import Any

from ullage.engines.vllm.defaults import Setup
from ullage.errors import InputError
from ullage.i18n import _

NONE, PIECEWISE, FULL = "none", "piecewise", "full"
FULL_DECODE_ONLY, FULL_AND_PIECEWISE = "full_decode_only", "full_and_piecewise"
#: Numbers that stand for names.
_MODES = {"0": NONE, "1": PIECEWISE, "2": FULL}
#: Graphs without those cut at attention, which only vLLM's own compilation makes.
_WITHOUT_PIECES = {PIECEWISE: NONE, FULL_AND_PIECEWISE: FULL_DECODE_ONLY}
_COMPILED = ("3", "vllm_compile", "piecewise")
_CONFIG = "compilation_config"


def graph_mode(setup: Setup) -> str:
    """Return the mode in use, before it is cut back for what attention cannot do.

    Rule: ``cudagraph_mode`` as asked, or the older ``full_cuda_graph`` and ``use_cudagraph``; else of level -O0 none,
        of -O1 piecewise, else the version's default. Where vLLM's own compilation is off, no pieces are captured.
    Source: vllm@0.33.0:vllm/config/vllm.py:OPTIMIZATION_LEVEL_TO_CONFIG, _normalize_piecewise_cudagraph_mode;
        vllm@0.10.0:vllm/config.py:CompilationConfig.

    Raises:
        InputError: a mode that does not exist.
    """
    if setup.job.enforce_eager:
        return NONE
    config = compilation_config(setup)
    level = setup.flag("optimization_level")
    asked = config.get("cudagraph_mode")
    mode = _default(setup)
    if asked is not None:
        mode = _MODES.get(str(asked), str(asked).lower().removeprefix("cudagraphmode."))
    elif _off(config.get("use_cudagraph")) or level == "0":
        mode = NONE
    elif config.get("full_cuda_graph") in (True, "true", "True"):
        mode = FULL
    elif level == "1":
        mode = PIECEWISE
    if mode not in (*_MODES.values(), FULL_DECODE_ONLY, FULL_AND_PIECEWISE):
        raise InputError(_("{mode!r} is no mode of CUDA graphs").format(mode=mode[:40]), where="--compilation-config")
    compiled = config.get("mode", config.get("level", "0" if level == "0" else "3"))
    return mode if str(compiled).lower() in _COMPILED else _WITHOUT_PIECES.get(mode, mode)


def compilation_config(setup: Setup) -> dict[str, Any]:
    """Return ``--compilation-config``: its JSON, or a level alone, with its dotted parts laid over it."""
    alone = setup.flag(_CONFIG).strip()
    return {**({"level": alone} if alone.isdigit() else {}), **json_flag(setup, _CONFIG)}


def json_flag(setup: Setup, flag: str) -> dict[str, Any]:
    """Return a flag that holds JSON, with its dotted parts (``--attention-config.backend``) laid over it."""
    found: dict[str, Any] = {}
    for name, value in setup.job.flags:
        if name == flag:
            try:
                parsed = json.loads(value)
            except (ValueError, RecursionError):
                parsed = None  # the reader of the line refuses it
            found.update(parsed if isinstance(parsed, dict) else {})
        elif name.startswith(f"{flag}."):
            found[name.removeprefix(f"{flag}.")] = value
    return found


def _default(setup: Setup) -> str:
    return FULL if setup.version.engine == "V0" else str(setup.version.setting("graph_mode"))


def _off(value: Any) -> bool:
    return value is not None and str(value).lower() in ("false", "0")
