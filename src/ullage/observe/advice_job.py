"""Advice for a death whose job is known: the catalogue of changes, each weighed by the fit of the changed job."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ullage.fitting import DEFAULT_RESERVE
from ullage.observe.advice import Piece
from ullage.observe.inspection import Inspection
from ullage.spec.machine import Machine
from ullage.spec.serving import ServingJob
from ullage.spec.training import TrainingJob

#: Causes that a change of the job does not mend: what the text says comes first, and the job's changes after it.
_NOT_THE_JOB = ("other_process", "waiting", "host", "cascade", "fragmentation", "start_budget")


def with_job_advice(found: Inspection, job: ServingJob | TrainingJob) -> Inspection:
    """Return an inspection whose advice has the gains that are predicted for the job."""
    if isinstance(job, TrainingJob):
        pieces, trusted = _of_training(found, job), True
    else:
        pieces, trusted = _of_serving(found, job)
    if found.cause in _NOT_THE_JOB or not trusted:
        return replace(found, advice=_merged(found.advice, pieces))
    told = [piece for piece in found.advice if piece.flags or piece.gain_bytes]  # the job's are less general
    return replace(found, advice=_merged(pieces, told if pieces else found.advice))


def _merged(first: Iterable[Piece], then: Iterable[Piece]) -> tuple[Piece, ...]:
    """Return both, without a second word on what is typed the same way."""
    kept = list(first)
    said = {_setting(piece) for piece in kept}
    return (*kept, *(piece for piece in then if not piece.flags or _setting(piece) not in said))


def _setting(piece: Piece) -> str:
    return piece.flags.partition(" ")[0].partition("=")[0].rstrip(":")


def _of_training(found: Inspection, job: TrainingJob) -> list[Piece]:
    """Return what frees memory; where it died though the prediction fits, what frees more than was missing."""
    from ullage.training_fit import fit_training

    result, reserve = fit_training(job, advise=False), DEFAULT_RESERVE
    if found.kind == "death" and result.verdict != "does_not_fit":
        missing = dict(found.sizes).get("gap", 0) or dict(found.sizes).get("requested", 0)
        size = result.ledger.device_used.bytes - max(missing, 1)
        job, reserve = replace(job, machine=_of_size(job.machine, size)), "0"
    return [
        Piece(change=item.change, flags=item.typed or item.flags, gain_bytes=item.gain_bytes, cost=item.cost)
        for item in fit_training(job, reserve=reserve).advice
    ]


def _of_size(machine: Machine, size: int) -> Machine:
    gpu = replace(machine.gpu, total_bytes=size, total_low_bytes=size, total_high_bytes=size)
    return replace(machine, gpu=gpu)


def _of_serving(found: Inspection, job: ServingJob) -> tuple[list[Piece], bool]:
    """Return what helps, and whether the prediction agrees with what happened: else the text's advice comes first.

    An engine that died did not miss the reserve: it is judged without one.
    """
    from ullage.fitting import fit_serving

    result = fit_serving(job, reserve="0" if found.kind == "death" else DEFAULT_RESERVE)
    pieces = [
        Piece(change=item.change, flags=item.typed or item.flags, gain_bytes=item.gain_bytes, cost=item.cost)
        for item in result.advice
    ]
    return pieces, found.kind != "death" or result.verdict != "fits"
