"""A training job in a file → :class:`~ullage.spec.training.TrainingJob`: a job file, or a launch file of a framework.

A job file has the fields of a record of a measured run (``kind``: train); ``megatron:run.sh`` is a script or line of
Megatron-LM's flags, ``deepspeed:ds.json`` a DeepSpeed configuration beside the flags of ``ullage fit train``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ullage.errors import InputError, LayoutError
from ullage.i18n import _
from ullage.spec.training import Precision, TrainingJob

#: Framework -> what its file is. Others have no reader.
LAUNCH_FILES = ("megatron", "deepspeed")
#: Sizes that multiply to the number of GPUs.
_SIZES = ("tp", "pp", "cp")


def split_line(text: str) -> tuple[str, str, str]:
    """Split ``engine@version:FILE or line`` into engine, version and the rest.

    Raises:
        InputError: not of that form, or a framework without a reader.
    """
    head, colon, rest = text.partition(":")
    engine, _at, version = head.strip().lower().partition("@")
    if not colon or not rest.strip():
        raise InputError(
            _("{text!r} is no launch file").format(text=text[:60]),
            where="--from",
            remedy=_("write for example --from megatron:run.sh"),
        )
    if engine not in LAUNCH_FILES:
        raise InputError(
            _("launch files of {engine!r} are not read").format(engine=engine[:40]),
            where="--from",
            remedy=_("known are {known}").format(known=", ".join(LAUNCH_FILES)),
        )
    return engine, version, rest.strip()


def megatron_job(rest: str, version: str, *, machine: str, model: str | None, assume: bool) -> TrainingJob:
    """Return the job of a script or line of Megatron-LM's flags; MODEL wins over the one that the flags describe."""
    from ullage.read.launch_line import line_of
    from ullage.read.machine import parse_machine
    from ullage.read.megatron_args import job_from_megatron_text
    from ullage.read.model_source import load_model

    return job_from_megatron_text(
        line_of(rest),
        machine=parse_machine(machine),
        engine_version=version,
        model=load_model(model, assume=assume, network=True) if model else None,
    )


def with_deepspeed(job: TrainingJob, path: Path) -> TrainingJob:
    """Lay a DeepSpeed configuration over a job: what it leaves out or calls ``"auto"`` stays the job's.

    Raises:
        InputError: not such a configuration.
    """
    import json

    from ullage.read.deepspeed_json import parse_deepspeed
    from ullage.read.jsonfile import read_json_object
    from ullage.read.training_words import parse_precision

    values = read_json_object(path)
    config = parse_deepspeed(values, where=str(path))
    stated = not _leaves_precision(values)
    usual = parse_precision(None, "deepspeed")[1] if stated else ()
    said = [_('{key} is "auto": as the flags say').format(key=key) for key in config.auto]
    if config.unknown:
        said.append(_("keys not known, taken as without memory: {keys}").format(keys=", ".join(config.unknown)[:400]))
    zero = config.zero
    kept = (("optimizer", zero.offload_optimizer), ("params", zero.offload_params))
    offload = {**dict(job.offload), **{what: where for what, where in kept if where}}
    return replace(
        job,
        parallel=replace(job.parallel, zero_stage=zero.stage),
        precision=_precision(config.compute) if stated else job.precision,
        optimizer=config.optimizer or job.optimizer,
        micro_batch_size=max(1, config.micro_batch_size or job.micro_batch_size),
        grad_accum=max(1, config.grad_accum or job.grad_accum),
        offload=tuple(offload.items()),
        native=json.dumps(values),
        assumed=(*(one for one in job.assumed if one not in usual), *said),
    )


def _leaves_precision(values: Mapping[str, Any]) -> bool:
    """Say whether a configuration leaves the number format to the flags: ``"auto"``."""
    sections = [values.get(key) for key in ("bf16", "bfloat16", "fp16")]
    return any(one == "auto" or (isinstance(one, dict) and one.get("enabled") == "auto") for one in sections)


def _precision(compute: str) -> Precision:
    """Return DeepSpeed's recipe: gradients as the model, an fp32 master copy beside 16-bit parameters.

    Source: deepspeed@0.17.0:deepspeed/runtime/engine.py:get_data_types.
    """
    master = None if compute == "float32" else "float32"
    return Precision(compute=compute, params=compute, grads=compute, master=master)


def job_of_fields(fields: Mapping[str, Any], *, where: str, machine: str | None = None) -> TrainingJob:
    """Build the training job that the fields of a job file state.

    Raises:
        InputError: a field is missing or cannot be used. LayoutError: the sizes do not make up the GPUs.
    """
    from ullage.engines.training import TRAINING_ENGINES
    from ullage.read.machine import parse_machine
    from ullage.read.training_words import filled_pipeline
    from ullage.records.schema import read_record
    from ullage.records.training import record_job

    flags = _native_flags(fields)
    for key in ("engine",) if flags else ("model", "engine", "seq_len"):
        if not fields.get(key):
            raise InputError(_("the key is missing"), where=f"{where}: {key}")
    engine = str(fields["engine"]).lower()
    if engine not in TRAINING_ENGINES:
        raise InputError(
            _("unknown engine {engine!r}").format(engine=engine[:40]),
            where=f"{where}: engine",
            remedy=_("known are {known}").format(known=", ".join(TRAINING_ENGINES)),
        )
    if machine is None and not fields.get("gpu"):
        raise InputError(_("the key is missing"), where=f"{where}: gpu", remedy=_("or give the machine with --on"))
    stated = parse_machine(machine or f"{fields.get('num_gpus') or 1}x{fields['gpu']}")
    fields = {**fields, "engine": engine, "gpu": stated.gpu.name, "num_gpus": stated.num_gpus}
    if not flags:
        fields["parallel"] = _filled(fields.get("parallel"), stated.num_gpus, where)
    record = read_record({"id": Path(where).stem, "group": "job", "completeness": "full", "job": fields}, where)
    job, _unjudged = record_job(record)
    said = [] if fields.get("precision") or flags else [_("precision: bf16 throughout")]
    said += [] if fields.get("micro_batch_size") or flags else [_("micro-batch: 1")]
    if not fields.get("grad_accum") and not flags and job.parallel.pipeline_parallel_size > 1:
        count = filled_pipeline(job.parallel)
        said.append(_("passes per step: {count}, so that the pipeline is full").format(count=count))
        job = replace(job, grad_accum=count)
    return replace(job, machine=stated, assumed=(*job.assumed, *said))


def _native_flags(fields: Mapping[str, Any]) -> bool:
    native = fields.get("native")
    return isinstance(native, dict) and isinstance(native.get("megatron_args"), dict)


def _filled(value: Any, num_gpus: int, where: str) -> Any:
    """Return the layout with the data-parallel size that the other sizes leave."""
    if not isinstance(value, (dict, type(None))):
        return value  # the reader of records refuses it
    found = dict(value or {})
    sizes = [found.get(key) for key in _SIZES]
    others = math.prod(size for size in sizes if isinstance(size, int) and not isinstance(size, bool) and size > 0)
    data = found.get("dp")
    if data is None and num_gpus % others == 0:
        data = num_gpus // others
    if not isinstance(data, int) or data * others != num_gpus:
        raise LayoutError(
            _("the layout does not make up {world} GPUs").format(world=num_gpus),
            where=f"{where}: parallel",
            remedy=_("dp x tp x pp x cp must be the number of GPUs"),
        )
    return {**found, "dp": data}
