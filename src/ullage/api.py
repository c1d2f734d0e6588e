"""The public functions, in the words people use: names and machines as text, settings as keywords."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ullage.fitting import DEFAULT_RESERVE, FitResult, fit_serving
from ullage.spec.machine import Machine
from ullage.spec.model import Model
from ullage.spec.serving import ServingParallel

if TYPE_CHECKING:
    from ullage.observe.inspection import Inspection
    from ullage.records.validate import ValidationReport
    from ullage.spec.training import TrainingJob
    from ullage.training_fit import TrainingFit


def fit(
    model: str | Model,
    *,
    on: str | Machine,
    engine: str = "vllm",
    parallel: ServingParallel | None = None,
    context: int | None = None,
    concurrency: int | None = None,
    reserve: str = DEFAULT_RESERVE,
    advise: bool = True,
    **settings: Any,
) -> FitResult:
    """Judge whether a serving job fits.

    Args:
        model: a name, folder, ``config.json``, ``.gguf`` file, hub id, or a model.
        on: a machine such as ``8xH200``.
        engine: ``vllm``, ``sglang`` or ``llamacpp``, with ``@version`` or the newest that is mirrored.
        parallel: the layout; tensor parallel over all GPUs when not given.
        context: tokens per request; the model's own length when not given.
        concurrency: requests of that length at a time.
        reserve: memory to keep free on each GPU, such as ``20%`` or ``8GiB``.
        advise: look for the cheapest change too.
        settings: further fields of :class:`ullage.ServingJob`, such as ``kv_cache_dtype="fp8"``.

    Raises:
        InputError: something given cannot be used.
        UnknownArchitectureError: the model is not understood.
    """
    from ullage.read.machine import parse_machine
    from ullage.read.model_source import load_model
    from ullage.request import serving_job

    job = serving_job(
        load_model(model, network=True) if isinstance(model, str) else model,
        parse_machine(on) if isinstance(on, str) else on,
        engine=engine,
        parallel=parallel,
        max_model_len=context,
        **settings,
    )
    return fit_serving(job, context=context, concurrency=concurrency, reserve=reserve, advise=advise)


def fit_train(job: TrainingJob, *, reserve: str = DEFAULT_RESERVE, advise: bool = True) -> TrainingFit:
    """Judge whether a training job fits: its fullest rank at its worst moment.

    Args:
        job: model, machine, framework, layout, precision and step (:class:`ullage.TrainingJob`).
        reserve: memory to keep free on each GPU, such as ``20%`` or ``8GiB``.
        advise: look for the cheapest change too.

    Raises:
        InputError: something given cannot be used, or a framework whose rules are not written.
    """
    from ullage.training_fit import fit_training

    return fit_training(job, reserve=reserve, advise=advise)


def fit_json(result: FitResult) -> dict[str, Any]:
    """Return a fit as plain values, as ``ullage fit --json`` prints it."""
    from ullage.report.json import fit_json as as_json

    return as_json(result)


def validate(paths: Sequence[str | Path]) -> ValidationReport:
    """Judge the predictions by measured runs."""
    from ullage.records.validate import validate_files

    return validate_files([Path(path) for path in paths])


def inspect(path: str | Path, *, device: int | None = None) -> Inspection:
    """Inspect a file that a run left behind: a log, an error message, a memory snapshot, a trace or a recording.

    Args:
        path: the file; what it is is told by its content.
        device: of several; the one with most events when not given.

    Raises:
        InputError: it cannot be read, or nothing in it is understood.
    """
    from io import BytesIO

    from ullage.observe.formats import inspect_source

    return inspect_source(str(path), BytesIO(), device)
