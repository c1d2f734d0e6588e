"""A bench as JSON: the keys of ``ullage schema bench``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ullage.bench.outcome import BenchResult, Phase, RankMemory

SCHEMA_VERSION = 1


def bench_json(result: BenchResult) -> dict[str, Any]:
    """Return a bench as plain values; sizes are integers in bytes, times in seconds."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": result.kind,
        "started": result.started,
        "memory": result.memory,
        "job": result.job,
        "machine": result.machine,
        "phases": [_phase(phase) for phase in result.phases],
        "break_point": None if result.break_point is None else asdict(result.break_point),
        "stability": None if result.stability is None else asdict(result.stability),
        "warnings": list(result.warnings),
    }


def _phase(phase: Phase) -> dict[str, Any]:
    return {
        "name": phase.name,
        "seconds": phase.seconds,
        "peak_used_bytes": phase.peak_used_bytes,
        "ranks": [_rank(rank) for rank in phase.ranks],
        "steps": [asdict(step) for step in phase.steps],
        "waves": list(phase.waves),
        "figures": phase.figures,
        "died": phase.died,
    }


def _rank(rank: RankMemory) -> dict[str, Any]:
    return {
        **{name: value for name, value in vars(rank).items() if name not in ("curve", "marks")},
        "curve": [asdict(sample) for sample in rank.curve],
        "marks": {name: asdict(sample) for name, sample in rank.marks},
    }
