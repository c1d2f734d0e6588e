"""Launch files that say a part of a job, laid over the flags: DeepSpeed, torchtitan, Accelerate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ullage.errors import InputError, LayoutError
from ullage.i18n import _
from ullage.spec.training import Precision, Recompute, TrainingJob

#: Options of the command line that each file states itself.
STATED = {
    "deepspeed": ("engine", "zero", "fsdp", "offload"),
    "torchtitan": ("engine", "dp", "tp", "pp", "cp", "ep", "sp", "zero", "fsdp", "micro_batch", "seq", "recompute",
                   "compile"),
    "accelerate": ("engine", "zero", "fsdp", "offload", "precision"),
}  # fmt: skip


def with_deepspeed(job: TrainingJob, path: Path) -> TrainingJob:
    """Lay a DeepSpeed configuration over a job: what it leaves out or calls ``"auto"`` stays the job's.

    Raises:
        InputError: not such a configuration.
    """
    from ullage.read.jsonfile import read_json_object

    return with_deepspeed_values(job, read_json_object(path), where=str(path))


def with_deepspeed_values(job: TrainingJob, values: dict[str, Any], *, where: str) -> TrainingJob:
    """Lay the values of a DeepSpeed configuration over a job."""
    import json

    from ullage.read.deepspeed_json import parse_deepspeed
    from ullage.read.training_words import parse_precision

    config = parse_deepspeed(values, where=where)
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


def with_torchtitan(job: TrainingJob, path: Path) -> TrainingJob:
    """Lay a torchtitan configuration over a job; the model is named beside it, and must be the file's flavour.

    Raises:
        InputError: not such a configuration. LayoutError: its degrees do not make up the GPUs.
    """
    from ullage.read.torchtitan import read_torchtitan
    from ullage.read.training_words import filled_pipeline

    config = read_torchtitan(path)
    layout, world = config.parallel, job.machine.num_gpus
    others = layout.tensor_parallel_size * layout.pipeline_parallel_size * layout.context_parallel_size
    shards = config.data_shards if config.data_shards > 0 else world // (others * config.data_replicas)
    if shards * config.data_replicas * others != world or not shards:
        raise LayoutError(_("the degrees do not make up {world} GPUs").format(world=world), where=str(path))
    group = shards if config.data_replicas > 1 else None
    layout = replace(layout, data_parallel_size=shards * config.data_replicas, shard_group_size=group)
    if layout.pipeline_parallel_size > 1:
        layout = replace(layout, schedule=job.parallel.schedule or "1f1b")
    said = [_("the model is the one named, of flavour {flavour!r}").format(flavour=config.flavor[:40])]
    if config.unknown:
        said.append(_("keys not known, taken as without memory: {keys}").format(keys=", ".join(config.unknown)[:400]))
    precision = replace(job.precision, fp8_recipe="tensorwise") if config.float8 else job.precision
    return replace(
        job,
        parallel=layout,
        precision=precision,
        micro_batch_size=max(1, config.micro_batch_size),
        seq_len=max(1, config.seq_len),
        grad_accum=max(job.grad_accum, filled_pipeline(layout)),
        compile=config.compile,
        recompute=config.recompute,
        assumed=(*job.assumed, *said),
    )


def with_accelerate(job: TrainingJob, path: Path) -> TrainingJob:
    """Lay an Accelerate configuration over a job: the framework, how it shards, mixed precision.

    Mixed precision keeps fp32 parameters under autocast (accelerate@1.10.0:accelerator.py:prepare_model).

    Raises:
        InputError: not such a configuration, or one for another number of GPUs.
    """
    from ullage.read.accelerate_yaml import read_accelerate

    config = read_accelerate(path)
    if config.num_gpus != job.machine.num_gpus:
        raise InputError(
            _("num_processes is {count} and the machine has {world} GPUs").format(
                count=config.num_gpus, world=job.machine.num_gpus
            ),
            where=str(path),
            remedy=_("give the machine of the file with --on"),
        )
    if config.compute.startswith("float8"):
        raise InputError(_("mixed_precision fp8 is not followed"), where=str(path), remedy=_("write bf16"))
    job = replace(job, engine=config.engine)
    if config.unknown:
        said = _("keys not known, taken as without memory: {keys}").format(keys=", ".join(config.unknown)[:400])
        job = replace(job, assumed=(*job.assumed, said))
    if config.engine == "megatron":
        raise InputError(
            _("Megatron-LM under Accelerate is not read"), where=str(path), remedy=_("write --from megatron:run.sh")
        )
    if config.engine == "deepspeed":
        return _with_plugin(job, config.deepspeed, config.compute, path)
    offload = (("params", "cpu"), ("optimizer", "cpu")) if config.offload_params else ()
    return replace(
        job,
        parallel=replace(job.parallel, fsdp=config.fsdp, zero_stage=0),
        precision=Precision(compute=config.compute, params="float32", grads="float32"),
        recompute=Recompute(kind="full") if config.recompute else job.recompute,
        offload=offload,
    )


def _with_plugin(job: TrainingJob, section: dict[str, Any], compute: str, path: Path) -> TrainingJob:
    """Lay Accelerate's DeepSpeed section over a job: a file that it names, or its own few keys.

    Source: accelerate@1.10.0:utils/dataclasses.py:DeepSpeedPlugin.
    """
    file = section.get("deepspeed_config_file")
    if isinstance(file, str) and file:
        return with_deepspeed(job, path.parent / file)
    zero: dict[str, Any] = {"stage": section.get("zero_stage", 2)}
    for key in ("offload_optimizer", "offload_param"):
        device = section.get(f"{key}_device")
        if isinstance(device, str) and device != "none":
            zero[key] = {"device": device}
    values: dict[str, Any] = {"zero_optimization": zero}
    if compute != "float32":
        values["bf16" if compute == "bfloat16" else "fp16"] = {"enabled": True}
    if section.get("gradient_accumulation_steps") is not None:
        values["gradient_accumulation_steps"] = section["gradient_accumulation_steps"]
    return with_deepspeed_values(job, values, where=f"{path}: deepspeed_config")


OVERLAYS: dict[str, Callable[[TrainingJob, Path], TrainingJob]] = {
    "deepspeed": with_deepspeed,
    "torchtitan": with_torchtitan,
    "accelerate": with_accelerate,
}
