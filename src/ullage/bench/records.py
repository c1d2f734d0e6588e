"""A bench as records of measured runs, in the format that ``ullage validate`` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ullage.bench.outcome import BenchResult, Phase
from ullage.files import cannot_write

GROUP = "ullage-bench"
PRECISION = {
    "bf16": dict.fromkeys(("compute", "params", "grads", "moments"), "bf16") | {"master": None},
    "fp32": dict.fromkeys(("compute", "params", "grads", "moments"), "fp32") | {"master": None},
    "bf16-mixed": {"compute": "bf16", "params": "fp32", "grads": "fp32", "moments": "fp32", "master": None},
}


def records_of(result: BenchResult) -> list[dict[str, Any]]:
    """Return one record for each load that ran to its end, with what was measured of it."""
    found = []
    for phase in result.phases:
        measured = _training(phase) if result.kind == "train" else _serving(result, phase)
        if phase.died is None and measured and phase.name == "full_load":
            found.append(_record(result, phase, measured))
    return found


def write_records(path: Path, result: BenchResult) -> int:
    """Append the records to ``path``, one a line; return how many.

    Raises:
        InputError: the file cannot be written.
    """
    records = records_of(result)
    try:
        with path.open("a", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False, sort_keys=True) + "\n")
    except OSError as error:
        raise cannot_write(path, error) from None
    return len(records)


def _record(result: BenchResult, phase: Phase, measured: list[dict[str, Any]]) -> dict[str, Any]:
    job = _train_job(result, phase) if result.kind == "train" else result.job["record"]
    stamp = result.started.replace(":", "").replace("-", "").replace("+0000", "Z")
    return {
        "id": f"{GROUP}-{result.kind}-{stamp}-{phase.name}",
        "group": f"{GROUP}-{result.kind}",
        "completeness": "full" if result.kind == "train" and result.job.get("config") else "partial",
        "job": job,
        "measured": measured,
        "source": f"ullage bench {result.kind}, {result.started}",
    }


def _train_job(result: BenchResult, phase: Phase) -> dict[str, Any]:
    job, machine = result.job, result.machine
    last = phase.steps[-1]
    found = {
        "kind": "train",
        "model": {"config": job["config"]} if job["config"] else job["what"],
        "gpu": machine.get("name", ""),
        "num_gpus": machine.get("num_ranks", 1),
        "engine": "ddp" if machine.get("num_ranks", 1) > 1 else "single",
        "engine_version": f"torch {machine.get('torch', '')}",
        "parallel": {"dp": machine.get("num_ranks", 1)},
        "precision": PRECISION[job["dtype"]],
        "optimizer": job["optimizer"],
        "optimizer_impl": "foreach",
        "micro_batch_size": last.micro_batch,
        "seq_len": last.seq,
        "grad_accum": job["grad_accum"],
        "recompute": "full" if job["recompute"] else "none",
        "attention": "sdpa",
        "compile": False,
        "method": "lora" if job["lora"] else "full",
        "loss": "plain",
        "alloc_conf": job["alloc_conf"],
    }
    return found | ({"lora": {"rank": job["lora"], "targets": "all-linear", "dropout": 0.0}} if job["lora"] else {})


def _training(phase: Phase) -> list[dict[str, Any]]:
    """Return the figures of the fullest rank: torch's own on CUDA, the resident set on a CPU."""
    if not phase.steps or not phase.ranks:
        return []
    fullest = max(phase.ranks, key=lambda rank: rank.peak_used_bytes)
    if fullest.peak_allocated_bytes is None or fullest.peak_reserved_bytes is None:
        note = "resident set of the process: interpreter, libraries and tensors; no GPU"
        return [_bytes("host_used", fullest.peak_used_bytes, note)]
    last = phase.steps[-1].after
    assert last is not None and last.allocated_bytes is not None
    return [
        _bytes("max_allocated", fullest.peak_allocated_bytes),
        _bytes("max_reserved", fullest.peak_reserved_bytes),
        _bytes("device_used", fullest.peak_used_bytes, "total - free of the driver: other processes are counted"),
        _bytes("allocated_after_step", last.allocated_bytes),
    ]


def _serving(result: BenchResult, phase: Phase) -> list[dict[str, Any]]:
    found = []
    if phase.ranks and result.memory in ("nvml", "recording"):
        found.append(_bytes("device_used", max(rank.peak_used_bytes for rank in phase.ranks)))
    elif phase.ranks:
        found.append(_bytes("host_used", phase.ranks[0].peak_used_bytes, "resident set of the server's processes"))
    if result.break_point is not None:
        found.append({"quantity": "served_concurrency", "value": result.break_point.largest, "unit": "requests"})
    return found


def _bytes(quantity: str, size: int, note: str = "") -> dict[str, Any]:
    measured = {"quantity": quantity, "value": size, "unit": "bytes", "gib": round(size / 2**30, 6), "rank": "max"}
    return measured | ({"note": note} if note else {})
