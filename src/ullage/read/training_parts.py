"""Launch files that say a part of a job, laid over the flags: DeepSpeed, torchtitan, Accelerate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ullage.errors import LayoutError
from ullage.i18n import _
from ullage.spec.training import Precision, TrainingJob

#: Options of the command line that each file states itself.
STATED = {
    "deepspeed": ("engine", "zero", "fsdp", "offload"),
    "torchtitan": ("engine", "dp", "tp", "pp", "cp", "ep", "sp", "zero", "fsdp", "micro_batch", "seq", "recompute",
                   "compile", "optimizer", "optimizer_impl"),
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

    from ullage.read.deepspeed_json import HARMLESS, parse_deepspeed, refuse_deepspeed
    from ullage.read.training_words import parse_precision

    refuse_deepspeed(values, where=where)
    values, filled = _with_hidden_size(values, job)
    config = parse_deepspeed(values, where=where)
    stated = not _leaves_precision(values)
    usual = parse_precision(None, "deepspeed")[1] if stated else ()
    said = [_('{key} is "auto": as the flags say').format(key=key) for key in config.auto if key not in HARMLESS]
    said += filled
    if config.unknown:
        said.append(_("keys not known, taken as without memory: {keys}").format(keys=", ".join(config.unknown)[:400]))
    zero = config.zero
    kept = (("optimizer", zero.offload_optimizer), ("params", zero.offload_params))
    offload = {**dict(job.offload), **{what: where for what, where in kept if where}}
    return replace(
        job,
        parallel=replace(job.parallel, zero_stage=zero.stage, fsdp=None),
        precision=own_precision(config.compute) if stated else job.precision,
        optimizer=config.optimizer or job.optimizer,
        micro_batch_size=max(1, config.micro_batch_size or job.micro_batch_size),
        grad_accum=max(1, config.grad_accum or job.grad_accum),
        offload=tuple(offload.items()),
        native=json.dumps(values),
        assumed=(*(one for one in job.assumed if one not in usual), *said),
    )


def _with_hidden_size(values: dict[str, Any], job: TrainingJob) -> tuple[dict[str, Any], list[str]]:
    """Return the values with the buckets that "auto" makes out of the hidden size h, and what to say of it.

    Formula: reduce_bucket_size h*h; stage 3: stage3_prefetch_bucket_size 0.9*h*h, stage3_param_persistence_threshold
        10*h. DeepSpeed alone knows no "auto": the Trainer or Accelerate fills it in.
    Source: transformers@5.23.0:integrations/deepspeed.py:HfTrainerDeepSpeedConfig.trainer_config_finalize;
        accelerate@1.15.0:accelerator.py:Accelerator._prepare_deepspeed.
    """
    section = values.get("zero_optimization")
    if not isinstance(section, dict):
        return values, []
    hidden = job.model.hidden_size
    sizes = {
        "reduce_bucket_size": hidden**2,
        "stage3_prefetch_bucket_size": 9 * hidden**2 // 10,
        "stage3_param_persistence_threshold": 10 * hidden,
    }
    filled = {key: size for key, size in sizes.items() if section.get(key) == "auto"}
    said = [_('{key} is "auto": {size:,} elements').format(key=key, size=size) for key, size in filled.items()]
    return {**values, "zero_optimization": {**section, **filled}}, said


def _leaves_precision(values: Mapping[str, Any]) -> bool:
    """Say whether a configuration leaves the number format to the flags: ``"auto"``."""
    sections = [values.get(key) for key in ("bf16", "bfloat16", "fp16")]
    return any(one == "auto" or (isinstance(one, dict) and one.get("enabled") == "auto") for one in sections)


def own_precision(compute: str) -> Precision:
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

    config = read_torchtitan(path)
    layout, world = config.parallel, job.machine.num_gpus
    others = layout.tensor_parallel_size * layout.pipeline_parallel_size * layout.context_parallel_size
    shards = config.data_shards if config.data_shards > 0 else world // (others * config.data_replicas)
    if shards * config.data_replicas * others != world or not shards:
        raise LayoutError(_("the degrees do not make up {world} GPUs").format(world=world), where=str(path))
    group = shards if config.data_replicas > 1 else None
    layout = replace(layout, data_parallel_size=shards * config.data_replicas, shard_group_size=group)
    if layout.pipeline_parallel_size > 1:
        layout = replace(layout, schedule=job.parallel.schedule or config.schedule)
    said = [_("the model is the one named, of flavour {flavour!r}").format(flavour=config.flavor[:40])]
    if config.unknown:
        said.append(_("keys not known, taken as without memory: {keys}").format(keys=", ".join(config.unknown)[:400]))
    if config.doubtful:
        said.append(
            _("settings that can change the memory and are not followed: {keys}").format(
                keys=", ".join(config.doubtful)[:400]
            )
        )
    precision = replace(job.precision, fp8_recipe="tensorwise") if config.float8 else job.precision
    batch = max(1, config.micro_batch_size)
    micro = config.pipeline_micro_batch or batch
    passes = (config.global_batch_size or 0) // (batch * layout.data_parallel_size)
    if config.pipeline_micro_batch is not None:
        passes = batch // micro  # a step of the schedule; the next begins when none is in flight
    return replace(
        job,
        parallel=layout,
        precision=precision,
        optimizer=config.optimizer,
        optimizer_impl=config.optimizer_impl,
        offload=config.offload or job.offload,
        micro_batch_size=micro,
        seq_len=max(1, config.seq_len),
        grad_accum=max(job.grad_accum, passes, 1),
        compile=config.compile,
        recompute=config.recompute,
        assumed=(*job.assumed, *said),
    )


def with_accelerate(job: TrainingJob, path: Path) -> TrainingJob:
    """Lay an Accelerate configuration over a job (:mod:`ullage.read.accelerate_parts`)."""
    from ullage.read.accelerate_parts import with_accelerate as laid

    return laid(job, path)


OVERLAYS: dict[str, Callable[[TrainingJob, Path], TrainingJob]] = {
    "deepspeed": with_deepspeed,
    "torchtitan": with_torchtitan,
    "accelerate": with_accelerate,
}
