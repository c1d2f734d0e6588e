"""A trace as JSON: the keys of ``ullage schema trace``."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ullage.trace.result import TraceResult

SCHEMA_VERSION = 1
#: Tensors of the peak that are listed; the rest is summed.
MAX_TENSORS = 200


def trace_json(result: TraceResult) -> dict[str, Any]:
    """Return a trace as plain values; sizes are integers in bytes."""
    outcome = result.outcome
    return {
        "schema_version": SCHEMA_VERSION,
        "name": result.name,
        "num_parameters": result.num_parameters,
        "num_trained_parameters": result.num_trained,
        "job": _job(result),
        "peak_allocated_bytes": outcome.peak_allocated_bytes,
        "peak_reserved_bytes": outcome.peak_reserved_bytes,
        "final_allocated_bytes": outcome.final_allocated_bytes,
        "final_reserved_bytes": outcome.final_reserved_bytes,
        "num_segments_allocated": outcome.num_segments_allocated,
        "peak": _peak(result),
        "phases": [
            {"step": step, "phase": phase, "peak_allocated_bytes": size}
            for (step, phase), size in phase_peaks(result).items()
        ],
        "num_events": len(result.trace.events),
        "num_layers": result.num_layers,
        "num_layers_traced": result.num_layers_traced,
        "seconds": round(result.seconds, 3),
        "warnings": list(result.warnings),
    }


def _job(result: TraceResult) -> dict[str, Any]:
    job = {each.name: getattr(result.job, each.name) for each in fields(result.job)}
    if result.job.lora is not None:
        job["lora"] = {each.name: getattr(result.job.lora, each.name) for each in fields(result.job.lora)}
    return job | {"optimizer_impl": result.job.implementation, "clip": result.job.clips}


def _peak(result: TraceResult) -> dict[str, Any]:
    place = result.peak_place
    tensors = result.peak_tensors()
    return {
        "event": result.peak_event,
        "phase": place.phase,
        "module": place.module,
        "step": place.step,
        "micro_batch": place.micro_batch,
        "categories": result.categories(),
        "tensors": [
            {
                "category": each.category,
                "module": each.module,
                "parameter": each.owner,
                "op": each.op,
                "dtype": each.dtype,
                "shape": list(each.shape),
                "bytes": each.size_bytes,
                "count": each.count,
                "stack": list(result.trace.stacks[each.stack]) if each.stack >= 0 else [],
            }
            for each in tensors[:MAX_TENSORS]
        ],
        "other_tensors": {
            "count": sum(each.count for each in tensors[MAX_TENSORS:]),
            "bytes": sum(each.total_bytes for each in tensors[MAX_TENSORS:]),
        },
    }


def phase_peaks(result: TraceResult) -> dict[tuple[int, str], int]:
    """Return the most bytes in use within each phase of each step, in blocks of the allocator."""
    found: dict[tuple[int, str], int] = {}
    trace = result.trace
    keys = [(place.step, place.phase) for place in trace.places]
    for where, size in zip(trace.where, trace.running_bytes(), strict=True):
        key = keys[where]
        if size > found.get(key, -1):
            found[key] = size
    return found
