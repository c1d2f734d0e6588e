"""What a version does when nothing is said: lookups in the catalog by date.

llama.cpp has no releases but builds, so a version is a build number or a day; ``5437``, ``b5437``,
``build 3737 (58f08e43)``, ``2025-05`` and ``PR 11446, 2025-02`` all name one.
"""

from __future__ import annotations

import datetime
import itertools
import re
from typing import Any

from ullage.catalog import load
from ullage.units import GiB

FILE = "engines/llamacpp.json"
#: engines of the family, by the names of jobs
ENGINES = ("llamacpp", "ik_llama.cpp", "ollama")
_DAY = re.compile(r"(20\d\d)-(\d\d)(?:-(\d\d))?")
_BUILD = re.compile(r"\bb?(\d{3,5})\b")


def version_day(engine: str, version: str) -> tuple[str, bool]:
    """Return the day (ISO) of a version, and whether it was named at all: else the latest day known.

    A month without a day is taken at its middle.
    """
    match = _DAY.search(version)
    if match:
        return f"{match[1]}-{match[2]}-{match[3] or '15'}", True
    tags: list[list[Any]] = load(FILE)["builds"][engine]["tags"]
    build = _BUILD.search(version)
    if build and tags:
        return _interpolated(int(build[1]), tags), True
    return str(load(FILE)["latest"][engine]), False


def _interpolated(build: int, tags: list[list[Any]]) -> str:
    """Return the day of a build between two known tags, or the nearest tag's day outside them."""
    for (low, first), (high, last) in itertools.pairwise(tags):
        if low <= build <= high:
            start, end = datetime.date.fromisoformat(first), datetime.date.fromisoformat(last)
            day = start + (end - start) * ((build - low) / (high - low))
            return str(day.isoformat())
    return str(tags[0][1] if build < tags[0][0] else tags[-1][1])


def default_entry(engine: str, name: str, day: str) -> dict[str, Any]:
    """Return the fact behind :func:`default`; empty when the engine has no such setting."""
    found: dict[str, Any] = {}
    for entry in load(FILE)["defaults"]:
        if entry["engine"] in (engine, "any") and entry["name"] == name and (not found or entry["since"] <= day):
            found = entry
    return found


def default(engine: str, name: str, day: str) -> Any:
    """Return the default of ``name`` on ``day``; None when the engine has no such setting."""
    return default_entry(engine, name, day).get("value")


def by_memory(value: Any, total_bytes: int) -> Any:
    """Return a default that steps with the memory of all devices together, or the value as it is.

    Source: ollama/ollama@0334ffa62:server/routes.go (thresholds of 47 and 23 GiB).
    """
    if not isinstance(value, dict):
        return value
    return next(step for gib, step in value["by_total_gib"] if total_bytes >= gib * GiB)


#: days on which a default changed, and the last day read; any build number or day between them is a version
VERSIONS: tuple[str, ...] = tuple(
    sorted({str(entry["since"]) for entry in load(FILE)["defaults"]} | {str(load(FILE)["latest"]["llamacpp"])})
)
