"""``ullage.trace``: run a step on meta tensors and say what memory it takes."""

from __future__ import annotations

import time
from typing import Any

from ullage.errors import InputError, MissingExtraError
from ullage.trace.job import TraceJob, parse_lora
from ullage.trace.result import TraceResult


def trace(
    target: Any,
    *,
    settings: str = "",
    torch_version: str = "2.13",
    capacity_bytes: int | None = None,
    stacks: bool = False,
    **options: Any,
) -> TraceResult:
    """Trace a training or inference step without a GPU.

    Args:
        target: a model's name, folder or config.json; ``"module:function"``; a function as
            :mod:`ullage.trace.models.function` has it; or a ``torch.nn.Module`` of transformers.
        settings: of the allocator, as PYTORCH_ALLOC_CONF; torch_version: whose defaults it has.
        capacity_bytes: what the driver can give; no limit when not given.
        stacks: take Python stacks.
        options: fields of :class:`ullage.trace.job.TraceJob`, such as ``micro_batch=1, seq_len=4096,
            recompute="full"``; ``lora`` may be written ``"r=16,alpha=32"``.

    Raises:
        InputError: something cannot be traced; the sentence says what, and what would be right.
        MissingExtraError: torch or transformers is not installed.
    """
    started = time.perf_counter()
    job = _job(options)
    try:
        import torch  # noqa: F401
    except ImportError:
        raise MissingExtraError("torch", "trace") from None
    from ullage.allocator.run import run_workload
    from ullage.allocator.settings import parse_settings, parse_version
    from ullage.trace.internals import ALWAYS, check_names

    check_names(ALWAYS)
    from ullage.trace.targets import run

    parsed = parse_settings(settings, version=parse_version(torch_version))
    done = run(target, job, stacks=stacks)
    outcome = run_workload(done.trace.workload(), parsed, capacity_bytes=capacity_bytes)
    return TraceResult(
        name=done.name,
        job=job,
        trace=done.trace,
        outcome=outcome,
        peak_event=done.trace.peak()[0],
        num_parameters=done.num_parameters,
        num_trained=done.num_trained,
        num_layers=done.num_layers,
        num_layers_traced=done.num_layers_traced,
        seconds=time.perf_counter() - started,
        warnings=done.trace.assumed,
    )


def _job(options: dict[str, Any]) -> TraceJob:
    if isinstance(options.get("lora"), str):
        options["lora"] = parse_lora(options["lora"])
    try:
        return TraceJob(**options)
    except TypeError as error:
        raise InputError(str(error), where="trace") from None
