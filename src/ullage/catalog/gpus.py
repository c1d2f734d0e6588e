"""The catalog of accelerators: ``gpus.json`` → :class:`ullage.spec.machine.Gpu`."""

from __future__ import annotations

from typing import Any

from ullage.catalog import load
from ullage.spec.machine import Gpu


def entries() -> list[dict[str, Any]]:
    """Return all entries, in catalog order: of several that share an alias, the first is the usual one."""
    found: list[dict[str, Any]] = load("gpus.json")["gpus"]
    return found


def source_text(key: str) -> str:
    """Return what a source key stands for."""
    text: str = load("gpus.json")["sources"][key]["text"]
    return text


def gpu_of(entry: dict[str, Any]) -> Gpu:
    """Return the :class:`Gpu` of an entry."""
    total = entry["total"]
    capability = entry.get("compute_capability", {}).get("value")
    certain = "" if total["certainty"] == "measured" else f"{total['certainty']}: "
    return Gpu(
        name=entry["name"],
        total_bytes=total["value"],
        total_low_bytes=total["low"],
        total_high_bytes=total["high"],
        bandwidth_bytes_per_s=entry.get("bandwidth", {}).get("value"),
        flops=tuple((name, value["value"]) for name, value in entry.get("flops", {}).items()),
        link_bytes_per_s=entry.get("link", {}).get("value"),
        gpus_per_node=entry["gpus_per_node"]["value"],
        vendor=entry["vendor"],
        compute_capability=(capability[0], capability[1]) if capability else None,
        unified=entry.get("unified", False),
        source=certain + source_text(total["source"]),
    )
