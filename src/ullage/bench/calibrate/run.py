"""``ullage calibrate``: the probes one after another, then the steps, then the profile."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from ullage.bench.calibrate import profile as arithmetic
from ullage.bench.calibrate.cases import Case, matrix
from ullage.bench.calibrate.steps import Measured, measure, predicted, record_of, workers_for
from ullage.bench.ranks import free_port
from ullage.errors import InputError, MissingExtraError
from ullage.i18n import _

#: Processes whose context is measured.
CONTEXT_SAMPLES = 5
PROBE_TIMEOUT = 300.0


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """The profile, and the steps as records for ``ullage validate``."""

    profile: dict[str, Any]
    records: list[dict[str, Any]]


def need_cuda() -> None:
    """Refuse to go on without a CUDA device.

    Raises:
        InputError: torch finds none.
        MissingExtraError: torch is not installed.
    """
    try:
        import torch
    except ImportError:
        raise MissingExtraError("torch", "torch") from None
    if not torch.cuda.is_available():
        raise InputError(_("no CUDA device was found, and only a real one can be calibrated"))


def calibrate(
    name: str | None, progress: Callable[[str], None], *, steps: bool = True, keep_uuid: bool = True
) -> Calibrated:
    """Measure the first device, and NCCL between all of them.

    Args:
        name: of the profile; made of the GPU and torch's version when not given.
        progress: told what is measured now.
        steps: also measure the peaks of a matrix of small training steps.
        keep_uuid: note a hash of the device's UUID, to tell two cards of a kind apart.

    Raises:
        InputError: no CUDA device, a probe that failed, or a device that was not idle.
    """
    need_cuda()
    measured = datetime.now(timezone.utc).isoformat(timespec="seconds")
    progress(_("the device"))
    facts = probe("facts")
    progress(_("CUDA context"))
    figures = arithmetic.context_figures([probe("context") for _sample in range(CONTEXT_SAMPLES)])
    progress(_("cuBLAS workspaces"))
    figures["cublas_workspaces"] = arithmetic.figure([probe("workspaces")["step"]], "bytes")
    progress(_("allocator"))
    figures |= allocator_figures(probe("allocator"))
    progress(_("NCCL"))
    ranks = facts["num_devices"]
    figures |= arithmetic.communicators(nccl_totals(ranks)) if facts["nccl"] else {}
    progress(_("bandwidth and FLOP/s"))
    figures |= rate_figures(probe("rates"))
    found = measure(matrix(), progress, workers=workers_for(facts["total_bytes"])) if steps else []
    gpu = gpu_of(facts, keep_uuid=keep_uuid)
    records = [
        record_of(one, gpu=gpu["name"], torch_version=facts["torch"], measured=measured)
        for one in found
        if not one.died
    ]
    profile = arithmetic.make_profile(
        name or f"{gpu['name']}-torch{facts['torch'].partition('+')[0]}",
        measured=measured,
        gpu=gpu,
        software={key: facts[key] for key in ("driver", "cuda", "torch", "nccl", "python")},
        nccl_ranks=ranks,
        figures=figures,
        steps=[step_summary(one, gpu["name"]) for one in found],
        notes=notes_on(figures),
    )
    return Calibrated(profile=profile, records=records)


def probe(name: str, *arguments: int) -> Any:
    """Run a probe in a process of its own and return what it printed last.

    Raises:
        InputError: it failed; its last words are in the message.
    """
    return _answer(_start(name, *arguments), name)


def _start(name: str, *arguments: int) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "ullage.bench.calibrate.probes", name, *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _answer(process: subprocess.Popen[str], name: str) -> Any:
    try:
        output, complaints = process.communicate(timeout=PROBE_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise InputError(_("the probe {name} did not end in time").format(name=name)) from None
    if process.returncode != 0:
        lines = complaints.strip().splitlines() or [""]
        raise InputError(_("the probe {name} failed: {last}").format(name=name, last=lines[-1][:300]))
    return json.loads(output.strip().splitlines()[-1])


def nccl_totals(num_ranks: int) -> list[list[float]]:
    """Run the NCCL probe on every device at once; return the totals of each rank."""
    port = free_port()
    running = [_start("nccl", rank, num_ranks, port) for rank in range(num_ranks)]
    try:
        answers = [_answer(process, "nccl") for process in running]
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
    return [answer["totals"] for answer in sorted(answers, key=lambda answer: int(answer["rank"]))]


def allocator_figures(found: dict[str, dict[str, int]]) -> dict[str, dict[str, Any]]:
    """Return the allocator's constants as measured."""
    figures = {"allocator_block": arithmetic.figure([found["block"]["allocated"]], "bytes")}
    for name in ("small_segment", "large_segment", "large_request"):
        figures[f"allocator_{name}"] = arithmetic.figure([found[name]["reserved"]], "bytes")
    return figures


def rate_figures(found: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Return bandwidth and FLOP/s with their spread."""
    figures = {"bandwidth": arithmetic.figure(found["bandwidth"], "bytes/s")}
    formats = (name for name in found if name != "bandwidth")
    return figures | {f"flops_{name}": arithmetic.figure(found[name], "FLOP/s") for name in formats}


def gpu_of(facts: dict[str, Any], *, keep_uuid: bool) -> dict[str, Any]:
    """Return the card: its name in the catalog, so that a fit finds the profile, and what the driver calls it."""
    from ullage.read.machine import parse_gpu

    try:
        name = parse_gpu(facts["reported"]).name
    except InputError:
        name = facts["reported"]
    kept = ("reported", "total_bytes", "compute_capability", "multiprocessors", "num_devices")
    hashed = hashlib.sha256(facts["uuid"].encode()).hexdigest()[:16] if keep_uuid and facts["uuid"] else None
    return {"name": name, **{key: facts[key] for key in kept}, "uuid_sha256": hashed}


def notes_on(figures: dict[str, dict[str, Any]]) -> list[str]:
    """Return sentences on constants of the allocator that are not those the simulator has."""
    from ullage.allocator import constants

    known = {
        "allocator_block": constants.MIN_BLOCK_BYTES,
        "allocator_small_segment": constants.SMALL_SEGMENT_BYTES,
        "allocator_large_segment": constants.DEFAULT_LARGE_SEGMENT_BYTES,
    }
    sentence = _("{name} is {measured:,} bytes here, the allocator's rules say {known:,}")
    return [
        sentence.format(name=name, measured=figures[name]["value"], known=size)
        for name, size in known.items()
        if name in figures and figures[name]["value"] != size
    ]


def step_summary(found: Measured, gpu: str) -> dict[str, Any]:
    """Return a measured step and what the closed form says of it."""
    case: Case = found.case
    summary = {"case": case.name, **{name: value for name, value in vars(found).items() if name != "case"}}
    if found.died:
        return summary
    record = record_of(found, gpu=gpu, torch_version="", measured="")
    return {**summary, "closed_form": {name: round(value) for name, value in predicted(record).items()}}
