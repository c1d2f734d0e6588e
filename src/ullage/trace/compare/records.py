"""Published runs of the Trainer family as traces: a record's job on meta tensors, with stand-ins for kernels."""

from __future__ import annotations

import re

from ullage.engines.hf_trainer.defaults import (
    CASTS_FOR_GPTQ,
    NO_SHIFT_COPY,
    NOT_REENTRANT,
    REPEATED_BEFORE,
    REPEATS_FOR_FLASH,
    UPCAST_IN_LOSS,
    fused_kernels,
    transformers_version,
)
from ullage.errors import InputError
from ullage.i18n import _
from ullage.records.frameworks import Framework, framework, gptq_group_size
from ullage.records.schema import Record
from ullage.records.training import record_job
from ullage.spec.training import TrainingJob
from ullage.trace.job import LoraOptions, TraceJob
from ullage.trace.models.hf import Built, build_described
from ullage.trace.models.prepare import prepare
from ullage.trace.recorder.events import Trace
from ullage.trace.repeat.layers import trace_layers
from ullage.trace.stand_ins.fused_ops import fuse_norms, fused_rotary, repeated_heads
from ullage.trace.stand_ins.looped_experts import loop_experts
from ullage.trace.stand_ins.losses import use_loss
from ullage.trace.stand_ins.quantised.fused import fuse_adapters

#: Experts are one tensor, and run as grouped products. Source: transformers@5.23.0:models/mixtral/modeling_mixtral.py.
TENSOR_EXPERTS = (5, 0)


def trace_record(record: Record) -> Trace:
    """Trace a training record's job on one GPU.

    Raises:
        InputError: what has no stand-in: several GPUs, a quantised base of another kind.
    """
    job = record_job(record)[0]
    if job.machine.num_gpus > 1:
        raise InputError(_("a record of several GPUs is not traced"))
    through = framework(record) or _assumed_framework(job)
    options = _options(job, through, gptq_group_size(record))
    built = build_described(job.model, options)
    _open_windows(built)
    if _before(job, TENSOR_EXPERTS):
        loop_experts(built.model)
    if "rms_norm" in through.fused:
        fuse_norms(built.model)
    use_loss(built.model, _loss(job))
    model = prepare(built.model, options)
    if "adapters" in through.fused:
        fuse_adapters(model)
    repeats = _before(job, REPEATED_BEFORE) and job.model.architecture in REPEATS_FOR_FLASH
    with fused_rotary(model, fused="rope" in through.fused), repeated_heads(repeated=repeats):
        return trace_layers(model, built.config, options, stacks=False)[0]


def _assumed_framework(job: TrainingJob) -> Framework:
    """Return what a record that names no configuration of a framework runs through: the Trainer, as TRL sets it up."""
    return Framework(
        autocast="bfloat16" if job.lora is not None else None,
        prepared=job.base_quantization is not None,
        fused=fused_kernels(job),
    )


def _options(job: TrainingJob, through: Framework, group_size: int | None) -> TraceJob:
    lora, base = job.lora, job.base_quantization
    return TraceJob(
        micro_batch=job.micro_batch_size,
        seq_len=job.seq_len,
        grad_accum=min(2, job.grad_accum),  # a third pass repeats the second
        recompute="full" if job.recompute.kind == "full" else "none",
        reentrant=_before(job, NOT_REENTRANT),
        dtype="float16" if base == "gptq" else "bfloat16",
        lora=LoraOptions(r=lora.rank, dropout=lora.dropout, targets=lora.targets) if lora is not None else None,
        base=base,
        group_size=128 if group_size is None else group_size,
        prepare="trl" if through.prepared else "none",
        earlier_adapters=_peft_version(job) < CASTS_FOR_GPTQ,
        autocast=through.autocast,
        optimizer_impl=job.optimizer_impl.replace("_", "") if job.optimizer_impl else "foreach",
        compute_capability=job.machine.gpu.compute_capability or (8, 0),
        attention="flash" if job.attention == "flash" else "auto",
    )


def _before(job: TrainingJob, version: tuple[int, int]) -> bool:
    """Return whether the record's transformers is older; one that is not named is not."""
    return (transformers_version(job.engine_version) or version) < version


def _peft_version(job: TrainingJob) -> tuple[int, int]:
    found = re.search(r"peft (\d{1,3})\.(\d{1,3})", job.engine_version)
    return (int(found.group(1)), int(found.group(2))) if found else (0, 21)


def _open_windows(built: Built) -> None:
    """Let FlashAttention do windows: on a GPU it takes no mask for them."""
    for config in (built.config, built.model.config):
        if getattr(config, "sliding_window", None):
            config.sliding_window = None


def _loss(job: TrainingJob) -> str:
    """Return the loss that the record's version of transformers runs.

    Raises:
        InputError: a version whose loss has no stand-in.
    """
    if job.loss == "liger":
        return "liger"
    version = transformers_version(job.engine_version)
    if version is None or version >= NO_SHIFT_COPY:
        raise InputError(_("the loss of this version has no stand-in"))
    place = "head upcast" if version < UPCAST_IN_LOSS else "loss upcast"
    return f"fused {place}" if job.loss == "fused" else place
