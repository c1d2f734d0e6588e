"""A training job in a file → :class:`~ullage.spec.training.TrainingJob`: a job file, or a launch file of a framework.

A job file has the fields of a record of a measured run (``kind``: train); ``megatron:run.sh`` is a script or line of
Megatron-LM's flags. The files that say only a part of a job are in :mod:`ullage.read.training_parts`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ullage.errors import InputError, LayoutError
from ullage.i18n import _
from ullage.spec.training import TrainingJob

#: Framework -> what its file is. Others have no reader.
LAUNCH_FILES = (
    "megatron",
    "deepspeed",
    "torchtitan",
    "accelerate",
    "trainer",
    "trl",
    "llamafactory",
    "axolotl",
    "swift",
    "torchtune",
    "litgpt",
)
#: Sizes that multiply to the number of GPUs.
_SIZES = ("tp", "pp", "cp")


def split_line(text: str) -> tuple[str, str, str]:
    """Split ``engine@version:FILE or line`` into engine, version and the rest.

    Raises:
        InputError: not of that form, or a framework without a reader.
    """
    head, colon, rest = text.partition(":")
    engine, _at, version = head.strip().lower().partition("@")
    if not colon or not rest.strip() or "\0" in rest:
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
    from ullage.read.jsonfile import is_file, missing
    from ullage.read.launch_line import line_of
    from ullage.read.machine import parse_machine
    from ullage.read.megatron_args import job_from_megatron_text
    from ullage.read.model_source import load_model

    if len(rest.split()) == 1 and not rest.startswith("-") and not is_file(Path(rest)):
        raise missing(Path(rest))
    return job_from_megatron_text(
        line_of(rest),
        machine=parse_machine(machine),
        engine_version=version,
        model=load_model(model, assume=assume, network=True) if model else None,
    )


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
