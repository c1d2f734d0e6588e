"""An Accelerate configuration laid over a job: how it is spread, and the format that is computed in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ullage.errors import InputError, LayoutError
from ullage.i18n import _
from ullage.read.accelerate_yaml import AccelerateConfig, parse_accelerate, read_accelerate
from ullage.read.fsdp_words import FsdpWords, lay_fsdp
from ullage.read.jsonfile import is_file
from ullage.spec.training import Precision, Recompute, TrainingJob

_BF16 = {"mixed_precision": "bf16"}
_ZERO = {"distributed_type": "DEEPSPEED", **_BF16}
_FSDP = {"distributed_type": "FSDP", **_BF16}
#: Configurations that TRL brings along, by the names that ``--accelerate_config`` takes.
#: Source: trl@1.16.0:accelerate_configs/.
SHIPPED: dict[str, dict[str, Any]] = {
    "single_gpu": {"distributed_type": "NO", **_BF16},
    "multi_gpu": {"distributed_type": "MULTI_GPU", **_BF16},
    "zero1": {**_ZERO, "deepspeed_config": {"zero_stage": 1}},
    "zero2": {**_ZERO, "deepspeed_config": {"zero_stage": 2}},
    "zero3": {**_ZERO, "deepspeed_config": {"zero_stage": 3}},
    "fsdp1": {**_FSDP, "fsdp_config": {"fsdp_version": 1}},
    "fsdp2": {**_FSDP, "fsdp_config": {"fsdp_version": 2, "fsdp_reshard_after_forward": True}},
}


def with_accelerate(job: TrainingJob, path: Path) -> TrainingJob:
    """Lay an Accelerate configuration over a job: the framework, how it shards, mixed precision.

    Mixed precision keeps fp32 parameters under autocast (accelerate@1.10.0:accelerator.py:prepare_model).

    Raises:
        InputError: not such a configuration, or one for another number of GPUs.
    """
    config = read_accelerate(path)
    job = _checked(job, config, path)
    if config.engine == "deepspeed":
        return _with_plugin(replace(job, engine="deepspeed"), config.deepspeed, config.compute, path)
    offload = (("params", "cpu"), ("optimizer", "cpu")) if config.offload_params else ()
    alone = config.engine == "ddp" and job.machine.num_gpus == 1
    return replace(
        job,
        engine="single" if alone else config.engine,
        parallel=replace(job.parallel, fsdp=config.fsdp, zero_stage=0, shard_group_size=_group(job, config)),
        precision=Precision(compute=config.compute, params="float32", grads="float32"),
        recompute=Recompute(kind="full") if config.recompute else job.recompute,
        offload=offload,
    )


def under_accelerate(job: TrainingJob, source: dict[str, Any], path: Path) -> TrainingJob:
    """Lay the configuration that a recipe is launched with over its job; ``source``: its settings, or ``config_file``.

    The recipe's own number format stays; what is sharded is made fp32 (:func:`ullage.read.fsdp_words.lay_fsdp`).

    Raises:
        InputError: a file that is not there, or as for :func:`with_accelerate`.
    """
    config, path = _found(source, path)
    job = _checked(job, config, path)
    if config.compute != "float32" and job.precision.compute == "float32":
        # accelerate@1.15.0: ACCELERATE_MIXED_PRECISION, which TrainingArguments leave as it is
        job = replace(job, precision=Precision(compute=config.compute, params="float32", grads="float32"))
    if config.engine == "deepspeed":
        if job.base_quantization is None:
            job = replace(job, engine="deepspeed")
        own = {key: value for key, value in config.deepspeed.items() if key != "gradient_accumulation_steps"}
        return _with_plugin(job, own, job.precision.compute, path)
    if config.fsdp is None:
        return job
    version = 2 if config.engine == "fsdp2" else 1
    words = FsdpWords(
        sharding=config.fsdp,
        version=version,
        offload=config.offload_params,
        checkpoint=config.recompute,
        group=_group(job, config),
    )
    return lay_fsdp(job, words)


def _found(source: dict[str, Any], path: Path) -> tuple[AccelerateConfig, Path]:
    """Return the configuration: settings, a name that TRL ships, or a file beside the recipe or where it runs."""
    name = source.get("config_file")
    if name is None:
        return parse_accelerate(source, where=str(path)[:80]), path
    stated = {key: source[key] for key in ("num_processes",) if key in source}
    if name in SHIPPED:
        return parse_accelerate({**SHIPPED[name], **stated}, where=str(name)), path
    for place in (path.parent / name, Path(name)):
        if "\0" not in name and is_file(place):
            found = read_accelerate(place)
            return replace(found, num_gpus=stated.get("num_processes", found.num_gpus)), place
    raise InputError(
        _("the Accelerate file {name} is not there").format(name=name[:200]),
        where=str(path)[:80],
        remedy=_("run where the file is"),
    )


def _checked(job: TrainingJob, config: AccelerateConfig, path: Path) -> TrainingJob:
    """Return the job with what holds for every framework: the ranks of a sequence, torch.compile, unknown keys."""
    world = job.machine.num_gpus
    if config.num_gpus is not None and config.num_gpus != world:
        raise InputError(
            _("num_processes is {count} and the machine has {world} GPUs").format(count=config.num_gpus, world=world),
            where=str(path),
            remedy=_("give the machine of the file with --on"),
        )
    if config.compute.startswith("float8"):
        raise InputError(_("mixed_precision fp8 is not followed"), where=str(path), remedy=_("write bf16"))
    if config.engine == "megatron":
        raise InputError(
            _("Megatron-LM under Accelerate is not read"), where=str(path), remedy=_("write --from megatron:run.sh")
        )
    if config.context > 1:
        if world % config.context:
            raise LayoutError(_("the degrees do not make up {world} GPUs").format(world=world), where=str(path))
        shared = config.context
        parallel = replace(job.parallel, data_parallel_size=world // shared, context_parallel_size=shared)
        job = replace(job, parallel=parallel)
    if config.unknown:
        said = _("keys not known, taken as without memory: {keys}").format(keys=", ".join(config.unknown)[:400])
        job = replace(job, assumed=(*job.assumed, said))
    return replace(job, compile=job.compile or config.compile)


def _group(job: TrainingJob, config: AccelerateConfig) -> int | None:
    """Return the ranks of one shard group; a hybrid strategy without sizes shards within a node.

    Source: torch@2.13.0:torch/distributed/fsdp/_init_utils.py:_init_intra_and_inter_node_groups.
    """
    return config.group or (job.machine.gpus_per_node if config.fsdp == "hybrid" else None)


def _with_plugin(job: TrainingJob, section: dict[str, Any], compute: str, path: Path) -> TrainingJob:
    """Lay Accelerate's DeepSpeed section over a job: a file that it names, or its own few keys.

    Source: accelerate@1.10.0:utils/dataclasses.py:DeepSpeedPlugin.
    """
    from ullage.read.training_parts import with_deepspeed, with_deepspeed_values

    file = section.get("deepspeed_config_file")
    if isinstance(file, str) and file:
        place = path.parent / file
        return with_deepspeed(job, place if is_file(place) else Path(file))
    zero: dict[str, Any] = {"stage": section.get("zero_stage", 2)}
    for key in ("offload_optimizer", "offload_param"):
        device = section.get(f"{key}_device")
        if isinstance(device, str) and device != "none":
            zero[key] = {"device": device}
    values: dict[str, Any] = {"zero_optimization": zero}
    if compute != "float32":
        values["bf16" if compute == "bfloat16" else "fp16"] = {"enabled": True}
    if section.get("gradient_accumulation_steps") not in (None, "auto"):
        values["gradient_accumulation_steps"] = section["gradient_accumulation_steps"]
    return with_deepspeed_values(job, values, where=f"{path}: deepspeed_config")
