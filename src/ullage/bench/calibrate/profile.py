"""From samples to a profile: medians with their spread, slope and fixed part of NCCL, and a file written whole."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ullage.bench.curves import median
from ullage.catalog.calibration import FORMAT, read_profile
from ullage.errors import InputError
from ullage.files import set_aside, write_whole
from ullage.i18n import _

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")


def figure(samples: Sequence[float], unit: str) -> dict[str, Any]:
    """Return the median of ``samples`` with the least and the most of them.

    Raises:
        ValueError: there are none.
    """
    if not samples:
        raise ValueError("no samples")
    values = {"value": median(samples), "low": min(samples), "high": max(samples)}
    if unit == "bytes":
        values = {name: round(value) for name, value in values.items()}
    return {**values, "num_samples": len(samples), "unit": unit}


def slope_and_fixed(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return (slope, fixed part) of the line through ``points``: the median of the slopes of all pairs.

    One point that is off does not move it (Theil 1950; Sen, JASA 63, 1968).

    Raises:
        ValueError: fewer than two different x.
    """
    slopes = [
        (later[1] - earlier[1]) / (later[0] - earlier[0])
        for at, earlier in enumerate(points)
        for later in points[at + 1 :]
        if later[0] != earlier[0]
    ]
    if not slopes:
        raise ValueError("no two different x")
    slope = median(slopes)
    return slope, median([y - slope * x for x, y in points])


def communicators(totals: Sequence[Sequence[float]]) -> dict[str, dict[str, Any]]:
    """Return what the first communicator and each further one take.

    Args:
        totals: for each rank, the bytes taken after one, two, three ... communicators.

    Formula: total(n) = fixed + slope x n; first = total(1), next = slope; low and high over ranks and steps.
    """
    first = figure([rank[0] for rank in totals], "bytes")
    steps = [later - earlier for rank in totals for earlier, later in itertools.pairwise(rank)]
    if not steps:
        return {"nccl_first": first}
    slopes = [slope_and_fixed([(number, size) for number, size in enumerate(rank, 1)])[0] for rank in totals]
    further = figure([max(0.0, slope) for slope in slopes], "bytes")
    further["low"] = min(further["low"], round(max(0.0, min(steps))))
    further["high"] = max(further["high"], round(max(0.0, *steps)))
    return {"nccl_first": first, "nccl_next": {**further, "num_samples": len(steps)}}


def context_figures(stages: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Return the context as made and with a step's kernels loaded, of several processes.

    Formula: what the device lost to the process - what the process's allocator had reserved, at the same instant.
    """
    return {
        "cuda_context": figure([one["bare_used"] - one["bare_reserved"] for one in stages], "bytes"),
        "cuda_context_loaded": figure([one["loaded_used"] - one["loaded_reserved"] for one in stages], "bytes"),
    }


def make_profile(
    name: str,
    *,
    measured: str,
    gpu: Mapping[str, Any],
    software: Mapping[str, Any],
    nccl_ranks: int,
    figures: Mapping[str, Mapping[str, Any]],
    steps: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Return a profile as plain values; a negative amount is refused: something else ran on the device meanwhile.

    Raises:
        InputError: the name cannot be a file's, or a figure is negative.
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            _("{name!r} cannot be the name of a profile").format(name=name[:80]),
            remedy=_("use letters, digits, dots and dashes"),
        )
    for key, one in figures.items():
        if one["low"] < 0:
            raise InputError(
                _("{figure} came out negative: other processes used the device").format(figure=key),
                remedy=_("calibrate on an idle GPU"),
            )
    return {
        "ullage_calibration": FORMAT,
        "name": name,
        "measured": measured,
        "gpu": dict(gpu),
        "software": dict(software),
        "nccl_ranks": nccl_ranks,
        "figures": {key: dict(one) for key, one in figures.items()},
        "steps": [dict(step) for step in steps],
        "notes": list(notes),
    }


def save_profile(path: Path, profile: Mapping[str, Any]) -> None:
    """Write a profile whole or not at all; a corrupt one that lies there is kept aside, a good one is replaced.

    Raises:
        InputError: the folder or file cannot be written.
    """
    text = json.dumps(profile, indent=1, ensure_ascii=False, allow_nan=False)
    if path.is_file():
        _keep_if_corrupt(path)
    write_whole(path, text + "\n", make_folder=True)


def _keep_if_corrupt(path: Path) -> None:
    try:
        read_profile(path)
    except InputError:
        set_aside(path)
