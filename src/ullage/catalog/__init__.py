"""Facts in data files: GPUs, model dimensions, engine defaults. Every value has a unit, a source and a date."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


@lru_cache(maxsize=64)
def load(name: str) -> dict[str, Any]:
    """Return the catalog file ``name`` (such as ``gpus.json``), parsed once."""
    data: dict[str, Any] = json.loads((FOLDER / name).read_bytes())
    return data


def nearest(name: str, known: list[str], *, limit: int = 4) -> list[str]:
    """Return the names of ``known`` that look most like ``name``, best first."""
    from difflib import SequenceMatcher  # only on the way to an error

    def likeness(candidate: str) -> float:
        return SequenceMatcher(None, name.lower(), candidate.lower()).ratio()

    return sorted(sorted(known), key=likeness, reverse=True)[:limit]
