"""Measuring the steps of :mod:`~ullage.bench.calibrate.cases` on this GPU, and what the closed form says of each."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ullage.bench.calibrate.cases import MODELS, Case
from ullage.bench.loads import steady_script
from ullage.bench.ranks import Alone
from ullage.bench.target import Target
from ullage.bench.tries import Outcome, run_order
from ullage.bench.worker import Order
from ullage.records.schema import Record

#: The first makes the optimizer's states; from the second on, a step is like the one before.
STEPS_PER_CASE = 3
CASE_TIMEOUT = 300.0
#: Processes at a time: torch's own counters do not see each other. Each step stays below this many bytes.
MAX_WORKERS = 4
STEP_BYTES = 8 * 2**30
GROUP = "ullage-calibrate-steps"
#: The variable, and its name before torch 2.9: both are set, so that nothing of this environment comes through.
_CONFS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One case and what torch counted over its steps; ``died`` when it could not be measured."""

    case: Case
    max_allocated_bytes: int | None = None
    max_reserved_bytes: int | None = None
    allocated_after_step_bytes: int | None = None
    step_seconds: float | None = None
    died: str = ""


def workers_for(total_bytes: int) -> int:
    """Return how many steps fit on a device at a time, at most :data:`MAX_WORKERS`."""
    return max(1, min(MAX_WORKERS, total_bytes // STEP_BYTES))


@contextmanager
def configs() -> Iterator[dict[str, Path]]:
    """Write the configs of the models into a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="ullage-calibrate-") as folder:
        paths = {name: Path(folder) / f"{name}.json" for name in MODELS}
        for name, path in paths.items():
            path.write_text(json.dumps(MODELS[name]), encoding="utf-8")
        yield paths


def target_of(case: Case, config: Path) -> Target:
    """Return what a bench runs for a case."""
    return Target(
        what=str(config),
        dtype=case.dtype,
        optimizer=case.optimizer,
        recompute=case.recompute,
        lora=case.lora,
        grad_accum=case.grad_accum,
    )


def measure(
    cases: Sequence[Case], progress: Callable[[str], None], *, device: str = "cuda", workers: int = 1
) -> list[Measured]:
    """Run every case in a process of its own, a few at a time."""
    with configs() as paths, ThreadPoolExecutor(max_workers=workers) as pool:

        def one(case: Case) -> Measured:
            script = tuple(steady_script(case.micro_batch, case.seq, STEPS_PER_CASE))
            order = Order(target=target_of(case, paths[case.model]), device=device, script=script)
            settings = dict.fromkeys(_CONFS, case.alloc_conf)
            outcome = run_order(order, Alone(), CASE_TIMEOUT, environment=settings)
            progress(case.name)
            return measured_of(case, outcome)

        return list(pool.map(one, cases))


def measured_of(case: Case, outcome: Outcome) -> Measured:
    """Return the peaks over all steps of a case: the first step too, whose optimizer makes its states."""
    if outcome.died is not None:
        return Measured(case=case, died=f"{outcome.died['cause']}: {outcome.died['detail']}")
    answer = outcome.answers[0]
    last = answer["rows"][-1]
    return Measured(
        case=case,
        max_allocated_bytes=answer["peaks"]["allocated_bytes"],
        max_reserved_bytes=answer["peaks"]["reserved_bytes"],
        allocated_after_step_bytes=last["after"]["allocated_bytes"],
        step_seconds=last["seconds"],
    )


def record_of(found: Measured, *, gpu: str, torch_version: str, measured: str) -> dict[str, Any]:
    """Return a case as a record that ``ullage validate`` reads; its figures are those that torch counted."""
    from ullage.bench.records import PRECISION

    case = found.case
    job: dict[str, Any] = {
        "kind": "train",
        "model": {"config": MODELS[case.model]},
        "gpu": gpu,
        "num_gpus": 1,
        "engine": "single",
        "engine_version": f"torch {torch_version}",
        "parallel": {"dp": 1},
        "precision": PRECISION[case.dtype],
        "optimizer": case.optimizer,
        "optimizer_impl": "foreach",
        "micro_batch_size": case.micro_batch,
        "seq_len": case.seq,
        "grad_accum": case.grad_accum,
        "recompute": "full" if case.recompute else "none",
        "attention": "sdpa",
        "compile": False,
        "method": "lora" if case.lora else "full",
        "loss": "plain",
        "alloc_conf": case.alloc_conf,
    }
    if case.lora:
        job["lora"] = {"rank": case.lora, "targets": "all-linear", "dropout": 0.0}
    sizes = {
        "max_allocated": found.max_allocated_bytes,
        "max_reserved": found.max_reserved_bytes,
        "allocated_after_step": found.allocated_after_step_bytes,
    }
    return {
        "id": f"{GROUP}-{case.name}",
        "group": GROUP,
        "completeness": "full",
        "job": job,
        "measured": [
            {"quantity": name, "value": size, "unit": "bytes", "gib": round(size / 2**30, 6), "rank": "0"}
            for name, size in sizes.items()
            if size is not None
        ],
        "source": f"ullage calibrate, {measured}",
    }


def predicted(record: dict[str, Any]) -> dict[str, float]:
    """Return what the closed form says of a record's figures; empty where it has no rules for the job."""
    from ullage.errors import UllageError
    from ullage.records.schema import read_record
    from ullage.records.training import predict

    read: Record = read_record(record, record["id"])
    try:
        figures = predict(read).figures
    except UllageError:
        return {}
    return {measured.quantity: figures[measured.quantity].value for measured in read.measured}
