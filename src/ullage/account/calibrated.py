"""The one place where a measured amount replaces a modelled range: terms outside the allocator, and workspaces.

Which terms: ``cuda_context`` of every engine but Megatron and llama.cpp (whose one term holds more than the context),
``nccl`` of training on one node with as many GPUs as were measured, ``cublas_workspaces`` of hf_trainer.
"""

from __future__ import annotations

from dataclasses import replace

from ullage.ledger import Certainty, Ledger, Term, ranged, total
from ullage.spec.machine import Calibration, Figure, Gpu, Machine

#: Frameworks with one communicator; the others have one for the world and one to shard over.
ONE_COMMUNICATOR = frozenset(("hf_trainer", "single", "ddp"))


def calibrated(term: Term, gpu: Gpu, amount: tuple[int, int, int] | None) -> Term:
    """Return ``term`` with a measured (value, low, high) and its profile named; unchanged without a measurement."""
    if gpu.calibration is None or amount is None:
        return term
    return ranged(
        term.name,
        amount[0],
        low=amount[1],
        high=amount[2],
        formula=term.formula,
        source=f"calibration {gpu.calibration.name}, {gpu.calibration.measured[:10]}",
        certainty=Certainty.CALIBRATED,
    )


def serving_context(gpu: Gpu) -> tuple[int, int, int] | None:
    """Return the CUDA context of an engine's process: as made, up to what it was with kernels loaded."""
    bare, loaded = _contexts(gpu.calibration)
    return (bare.value, bare.low, max(loaded.high, bare.high)) if bare and loaded else None


def training_context(gpu: Gpu) -> tuple[int, int, int] | None:
    """Return the CUDA context of a training process.

    Formula: with a step's kernels loaded; low as made; high as much again on top as the probe's kernels took.
    Source: the profile's samples.
    Known error: libraries that the probe does not load (compiled kernels, Transformer Engine) may take more.
    """
    bare, loaded = _contexts(gpu.calibration)
    if bare is None or loaded is None:
        return None
    return loaded.value, min(bare.low, loaded.value), loaded.high + max(0, loaded.value - bare.value)


def _contexts(calibration: Calibration | None) -> tuple[Figure | None, Figure | None]:
    if calibration is None:
        return None, None
    return calibration.figure("cuda_context"), calibration.figure("cuda_context_loaded")


def communicators(machine: Machine, engine: str) -> tuple[int, int, int] | None:
    """Return what NCCL takes of a GPU.

    Formula: first + (n - 1) x next; n communicators: 1, or 2 where the framework shards; low one, high one more.
    Source: the profile's samples, taken between all GPUs of one node.
    """
    calibration = machine.gpu.calibration
    if calibration is None or machine.num_nodes != 1 or machine.num_gpus != calibration.num_ranks:
        return None
    first, further = calibration.figure("nccl_first"), calibration.figure("nccl_next")
    if first is None or further is None or machine.num_gpus == 1:
        return None
    extra = 0 if engine in ONE_COMMUNICATOR else 1
    return first.value + extra * further.value, first.low, first.high + (extra + 1) * further.high


def calibrated_ledger(ledger: Ledger, machine: Machine, engine: str) -> Ledger:
    """Return a training ledger with what was measured in the place of what is modelled."""
    gpu = machine.gpu
    if gpu.calibration is None:
        return ledger
    workspaces = gpu.calibration.figure("cublas_workspaces")
    amounts = {
        "cuda_context": training_context(gpu),
        "nccl": communicators(machine, engine),
        "cublas_workspaces": (workspaces.value, workspaces.low, workspaces.high) if workspaces else None,
    }
    return replace(
        ledger, allocated=_replaced(ledger.allocated, gpu, amounts), outside=_replaced(ledger.outside, gpu, amounts)
    )


def _replaced(term: Term, gpu: Gpu, amounts: dict[str, tuple[int, int, int] | None]) -> Term:
    if not term.children:
        return calibrated(term, gpu, amounts.get(term.name))
    children = tuple(_replaced(child, gpu, amounts) for child in term.children)
    if children == term.children:
        return term
    return total(term.name, children, formula=term.formula, source=term.source)
