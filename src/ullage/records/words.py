"""The free text of records: cards, sizes in flags. What is not understood goes on to the engine as it is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ullage.errors import InputError
from ullage.i18n import _
from ullage.units import GiB, MiB, canonical_dtype

_GIB = r"([\d.]+)\s*(?:GiB|GB|G)"  # engines print 2**30 and call it GB
_FREE_IN_CARD = re.compile(_GIB + r" free before", re.IGNORECASE)
_FREE_OF_TOTAL = re.compile(r"([\d.]+)\s*/\s*" + _GIB, re.IGNORECASE)
_MIB_OF_TOTAL = re.compile(r"([\d.,a-z ]+?)\s*MiB of ([\d.]+)\s*MiB", re.IGNORECASE)
#: Flags that name what the job already has a field for: field -> flags, first wins.
_SAME_AS = {
    "max_num_batched_tokens": ("max_num_batched_tokens", "n_ubatch", "chunked_prefill_size"),
    "max_num_seqs": ("max_num_seqs", "max_running_requests", "n_seq_max"),
    "block_size": ("block_size",),
    "cuda_graph_max_batch_size": ("max_cudagraph_capture_size", "cuda_graph_max_bs"),
    "max_model_len": ("max_model_len", "n_ctx", "ctx-size", "num_ctx"),
}
_FRACTIONS = ("gpu_memory_utilization", "mem_fraction_static")
_USED = {name for names in _SAME_AS.values() for name in names} | {"command", "outcome", "speculative_config"}


def flags(value: Any, where: str) -> dict[str, str]:
    """Return the record's flags as text; structures as JSON."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(_("job.flags is not an object"), where=where)
    return {key: item if isinstance(item, str) else json.dumps(item) for key, item in value.items() if item is not None}


def sentences(fields: Mapping[str, Any], key: str = "unknown") -> list[str]:
    """Return the sentences under a key; what is no list of them says nothing."""
    found = fields.get(key)
    return [str(one) for one in found] if isinstance(found, list) else []


def integer(fields: Mapping[str, Any], key: str, where: str) -> int | None:
    """Return a whole number of at least 0, or None when it is missing or null."""
    value = fields.get(key)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and value.isdecimal() and len(value) < 16:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**48:
        raise InputError(_("{value} is not a count").format(value=repr(value)[:60]), where=f"{where}: job.{key}")
    return value


def text(fields: Mapping[str, Any], key: str, where: str) -> str | None:
    """Return a string, or None when it is missing or null."""
    value = fields.get(key)
    if value is None or isinstance(value, str):
        return value
    raise InputError(_("{value} is not a string").format(value=repr(value)[:60]), where=f"{where}: job.{key}")


def number(value: Any) -> float | None:
    """Return the number that a value is or begins with: ``0.9200 (printed default)``; None for ``auto``."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**63:
        return float(value)
    match = re.match(r"\s*(\d+(?:\.\d+)?)", value) if isinstance(value, str) else None
    return float(match.group(1)) if match else None


def fraction(value: Any, where: str) -> float:
    """Return a share of the device: a number above 0 and up to 1."""
    share = number(value)
    if share is None or not 0 < share <= 1:
        raise InputError(_("{value} is not a share of the device").format(value=repr(value)[:60]), where=where)
    return share


def device_memory(gpu: str, flags: Mapping[str, str]) -> tuple[int | None, int | None]:
    """Return the device's total and free bytes as far as the record states them."""
    total = free = None
    free_in_card = _FREE_IN_CARD.search(gpu)
    if free_in_card:
        free = _gib(free_in_card.group(1))
    for key in ("device_total", "total_gpu_memory"):
        match = re.fullmatch(_GIB, flags.get(key, "").strip(), re.IGNORECASE)
        if match:
            total = _gib(match.group(1))
    match = _FREE_OF_TOTAL.search(flags.get("free_memory_on_device", ""))
    if match:
        free, total = _gib(match.group(1)), _gib(match.group(2))
    match = _MIB_OF_TOTAL.search(flags.get("free_before", ""))
    if match:
        amounts = [float(one) for one in re.findall(r"\d+(?:\.\d+)?", match.group(1))]
        free = round(min(amounts) * MiB) if amounts else None
    return total, free


def _gib(digits: str) -> int | None:
    value = number(digits)
    return None if value is None or value > 2**20 else round(value * GiB)


def layer_counts(value: str, where: str) -> tuple[int, ...]:
    """Return the layers per stage of ``16,32``."""
    parts = value.split(",")
    if len(parts) > 1000 or not all(part.strip().isdecimal() and len(part) < 8 for part in parts):
        raise InputError(_("{value!r} is not a list of layer counts").format(value=value[:60]), where=where)
    return tuple(int(part) for part in parts)


def engine_settings(fields: Mapping[str, Any], flags: Mapping[str, str], where: str) -> dict[str, Any]:
    """Return the settings that a record gives as fields or flags, by the names of :class:`ServingJob`."""
    found: dict[str, Any] = {}
    for field, names in _SAME_AS.items():
        given = [fields[name] for name in names if fields.get(name) is not None]
        given += [flags[name] for name in names if name in flags]
        if given:
            found[field] = integer({field: given[0]}, field, where)
    shares = [source.get(name) for source in (fields, flags) for name in _FRACTIONS]
    found["memory_fraction"] = next((fraction(one, where) for one in shares if one not in (None, "auto")), None)
    eager = fields.get("enforce_eager", False if "enforce_eager" in fields else None)
    found["enforce_eager"] = eager if isinstance(eager, bool) or eager is None else None
    if "enforce_eager" in fields and eager is None:
        found["enforce_eager"] = False  # null: known to be off
    dtype = text(fields, "weights_dtype", where) or flags.get("dtype")
    found["weights_dtype"] = canonical_dtype(dtype) if dtype and dtype != "auto" else None
    found["kv_cache_dtype"] = text(fields, "kv_cache_dtype", where)
    offload = number(flags.get("cpu_offload_gb"))
    found["cpu_offload_bytes"] = round(offload * GiB) if offload is not None and offload < 2**20 else 0
    sizes = [int(one) for one in re.findall(r"\d{1,6}", flags.get("cuda_graph_bs", ""))]
    found["cuda_graph_sizes"] = tuple(sizes) or None
    found.update(_speculative(flags.get("speculative_config")))
    found["flags"] = tuple((key.replace("-", "_"), value) for key, value in flags.items() if key not in _USED)
    return found


def _speculative(value: str | None) -> dict[str, Any]:
    if value is None:
        return {}
    try:
        config = json.loads(value)
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        return {}
    tokens = config.get("num_speculative_tokens")
    return {
        "speculative": str(config.get("method") or "draft"),
        "num_speculative_tokens": tokens if isinstance(tokens, int) and not isinstance(tokens, bool) else None,
    }
