"""Published runs of the Trainer family as traces: a record's job on meta tensors, with stand-ins for kernels."""

from __future__ import annotations

from typing import Any

import torch

from ullage.engines.hf_trainer.defaults import NO_SHIFT_COPY, UPCAST_IN_LOSS, fused_kernels, transformers_version
from ullage.errors import InputError
from ullage.i18n import _
from ullage.spec.training import TrainingJob
from ullage.trace.agreement import build
from ullage.trace.events import Trace
from ullage.trace.job import LoraOptions, TraceJob
from ullage.trace.layers import trace_layers
from ullage.trace.losses import use_loss
from ullage.trace.models import Built
from ullage.trace.running import prepare


class FusedNorm(torch.autograd.Function):
    """RMSNorm as one kernel: keeps its input and one fp32 number a row; backward writes one gradient.

    Source: fms-acceleration@876e2ed6:plugins/fused-ops-and-kernels/src/fms_acceleration_foak/kernels/unsloth/
        rms_layernorm.py:Fast_RMS_Layernorm.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any) -> Any:
        """Keep the input and the root of each row."""
        rows = torch.empty(hidden.numel() // hidden.shape[-1], dtype=torch.float32, device=hidden.device)
        ctx.save_for_backward(hidden, weight, rows)
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        """Return the gradient, and that of a trained weight."""
        _hidden, weight, _rows = ctx.saved_tensors
        return torch.empty_like(grad), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


def trace_record(job: TrainingJob) -> Trace:
    """Trace a training record's job on one GPU.

    Raises:
        InputError: what has no stand-in: a quantised base, several GPUs.
    """
    if job.base_quantization is not None:
        raise InputError(_("a quantised base has no stand-in on meta tensors"))
    if job.machine.num_gpus > 1:
        raise InputError(_("a record of several GPUs is not traced"))
    options = _options(job)
    built = build(job.model, options)
    _open_windows(built)
    if "rms_norm" in fused_kernels(job):
        _fuse_norms(built.model)
    use_loss(built.model, _loss(job))
    model = prepare(built.model, options)
    if _fuses_adapters(job):
        for name, each in model.named_parameters():
            each.data = each.data.to(torch.bfloat16) if "lora_" in name else each.data
    return trace_layers(model, built.config, options, stacks=False)[0]


def _options(job: TrainingJob) -> TraceJob:
    lora = job.lora
    return TraceJob(
        micro_batch=job.micro_batch_size,
        seq_len=job.seq_len,
        grad_accum=min(2, job.grad_accum),  # a third pass repeats the second
        recompute="full" if job.recompute.kind == "full" else "none",
        lora=LoraOptions(r=lora.rank, dropout=lora.dropout, targets=lora.targets) if lora is not None else None,
        autocast="bfloat16" if lora is not None and not _fuses_adapters(job) else None,
        optimizer_impl=job.optimizer_impl.replace("_", "") if job.optimizer_impl else "foreach",
        compute_capability=job.machine.gpu.compute_capability or (8, 0),
        attention="flash" if job.attention == "flash" else "auto",
    )


def _fuses_adapters(job: TrainingJob) -> bool:
    """Return whether adapters run as fused kernels: one input is kept for all that read it, and nothing is cast.

    The stand-in has 16-bit adapters, which do the same; their states are counted too small by some MiB.
    Source: fms-acceleration@876e2ed6:plugins/fused-ops-and-kernels/src/fms_acceleration_foak/fused_ops/unsloth_lora/
        fast_lora.py:LoRA_QKV.
    """
    return job.lora is not None and "rms_norm" in fused_kernels(job) and job.loss != "plain"


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


def _fuse_norms(model: Any) -> None:
    for each in model.modules():
        if type(each).__name__.endswith("RMSNorm"):
            each.forward = lambda hidden, norm=each: FusedNorm.apply(hidden, norm.weight)
