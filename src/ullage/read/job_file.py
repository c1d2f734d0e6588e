"""A job file → a serving or a training job: the job's fields as records of measured runs write them.

Either ``{"job": {...}}`` or the fields themselves: ``kind`` (serve or train), ``model``, ``gpu``, ``num_gpus``,
``engine``, ``engine_version``, ``parallel`` {tp, pp, dp, ep, dp_attention, dcp}, ``max_model_len``,
``kv_cache_dtype``, or for training ``seq_len``, ``micro_batch_size``, ``recompute``, ``precision`` ...
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ullage.errors import InputError, UllageError
from ullage.i18n import _
from ullage.read.jsonfile import read_json_object
from ullage.spec.serving import ServingJob
from ullage.spec.training import TrainingJob


def read_job_file(path: Path, *, machine: str | None = None, assume: bool = False) -> ServingJob | TrainingJob:
    """Read a job file.

    Args:
        path: the file.
        machine: wins over the file's gpu and num_gpus when given.
        assume: go on over config keys that are not understood.

    Raises:
        InputError: not a job file, or a job that cannot be sized.
    """
    values = read_json_object(path)
    job = values.get("job", values)
    if not isinstance(job, dict):
        raise InputError(_("is not an object"), where=f"{path}: job")
    if job.get("kind") == "train":
        from ullage.read.training_file import job_of_fields as training_job

        return training_job(job, where=str(path), machine=machine)
    return job_of_fields(job, where=str(path), machine=machine)


def job_of_fields(fields: dict[str, Any], *, where: str, machine: str | None = None) -> ServingJob:
    """Build the job that the fields state (see the module)."""
    from ullage.read.machine import parse_machine
    from ullage.records.schema import read_record
    from ullage.records.serving import ENGINE_ROOMS, record_job

    kind = fields.get("kind", "serve")
    if kind != "serve":
        raise InputError(
            _("the kind {kind!r} cannot be fitted").format(kind=str(kind)[:40]),
            where=f"{where}: kind",
            remedy=_("write serve or train"),
        )
    for key in ("model", "engine"):
        if not fields.get(key):
            raise InputError(_("the key is missing"), where=f"{where}: {key}")
    engine = str(fields["engine"]).lower().split()[0]
    if engine not in ENGINE_ROOMS:
        raise InputError(
            _("unknown engine {engine!r}").format(engine=engine[:40]),
            where=f"{where}: engine",
            remedy=_("known are {known}").format(known=", ".join(ENGINE_ROOMS)),
        )
    if machine is None and not fields.get("gpu"):
        raise InputError(_("the key is missing"), where=f"{where}: gpu", remedy=_("or give the machine with --on"))
    if machine is not None:
        stated = parse_machine(machine)
        fields = {**fields, "gpu": stated.gpu.name, "num_gpus": stated.num_gpus}
    fields = {"num_gpus": 1, **fields}
    if not fields.get("engine_version"):
        from ullage.request import newest_version

        fields["engine_version"] = newest_version(ENGINE_ROOMS[engine])
    record = read_record({"id": Path(where).stem, "group": "job", "completeness": "full", "job": fields}, where)
    try:
        job, _unjudged = record_job(record, ENGINE_ROOMS[engine])
    except UllageError as error:
        if isinstance(error, InputError) or type(error).__module__ == "ullage.errors":
            raise
        raise InputError(str(error), where=where) from None
    return replace(job, machine=parse_machine(machine)) if machine is not None else job
