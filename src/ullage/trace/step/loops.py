"""The steps that are traced: training as the Trainer or a plain loop does it, and inference."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._pytree import tree_map

from ullage.trace.job import DTYPES, TraceJob
from ullage.trace.ranks.tensor_parallel import loss_context
from ullage.trace.recorder import events as names
from ullage.trace.step.optimizers import by_mesh, make_optimizer


def token_batch(job: TraceJob, vocab_size: int) -> dict[str, Any]:
    """Return a batch of token ids and labels, on the host: tokens differ as far as the vocabulary goes."""
    ids = torch.arange(job.micro_batch * job.seq_len).remainder(vocab_size).reshape(job.micro_batch, job.seq_len)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if job.sp:  # the model sees a part of the sequence, and would count that
        batch["position_ids"] = torch.arange(job.seq_len).unsqueeze(0)
    return batch


def to_device(tracker: Any, batch: Any) -> Any:
    """Copy a batch to the device, as input."""

    def move(each: Any) -> Any:
        if not isinstance(each, torch.Tensor) or each.device.type == "meta":
            return each
        moved = each.to("meta")
        tracker.mark(moved, names.INPUT)
        return moved

    return tree_map(move, batch)


def autocast(job: TraceJob) -> AbstractContextManager[Any]:
    """Return the context in which the forward pass computes."""
    if job.autocast is None:
        return nullcontext()
    made: AbstractContextManager[Any] = torch.autocast("cuda", dtype=getattr(torch, DTYPES[job.autocast]))
    return made


def run_training(
    tracker: Any, job: TraceJob, model: Any, batch: Any, loss_of: Callable[[Any, Any], Any], optimizer: Any = None
) -> None:
    """Run the job's steps.

    Source: transformers@5.23.0:trainer.py:_inner_training_loop, training_step (inputs are dropped before backward;
        clip, step, zero_grad); accelerate@1.10:accelerator.py:prepare_model (outputs are made fp32 under autocast).
    """
    optimizer = optimizer if optimizer is not None else make_optimizer(job, model)
    tracker.kept.append(optimizer)
    for step in range(job.steps):
        tracker.positions.step = step
        if job.engine == "plain" and optimizer is not None:
            optimizer.zero_grad(set_to_none=True)
        for micro_batch in range(job.grad_accum):
            tracker.positions.micro_batch = micro_batch
            _micro_batch(tracker, job, model, batch, loss_of)
        _finish(tracker, job, model, optimizer)


def _micro_batch(tracker: Any, job: TraceJob, model: Any, batch: Any, loss_of: Callable[[Any, Any], Any]) -> None:
    inputs = to_device(tracker, batch)
    with loss_context(job):
        loss = _loss(job, model, inputs, loss_of)
        if job.engine == "hf":
            del inputs
        if job.grad_accum > 1:
            loss = loss / job.grad_accum
        loss.backward()


def _loss(job: TraceJob, model: Any, inputs: Any, loss_of: Callable[[Any, Any], Any]) -> Any:
    """Run the forward pass; its outputs but the loss are dropped on the way out."""
    with autocast(job):
        outputs = loss_of(model, inputs)
    if job.engine == "hf" and job.autocast is not None:
        outputs = tree_map(_to_fp32, dict(outputs) if hasattr(outputs, "keys") else outputs)
    if isinstance(outputs, torch.Tensor):
        return outputs if outputs.dim() == 0 else outputs.float().sum()
    return outputs["loss"] if isinstance(outputs, dict) else outputs.loss


def _to_fp32(value: Any) -> Any:
    is_half = isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if is_half else value


def _finish(tracker: Any, job: TraceJob, model: Any, optimizer: Any) -> None:
    if optimizer is None:
        return
    if job.clips:
        with tracker.positions.phase(names.OPTIMIZER):
            _clip([each for each in model.parameters() if each.grad is not None])
    optimizer.step()
    if job.engine == "hf":
        with tracker.positions.phase(names.OPTIMIZER):
            model.zero_grad(set_to_none=True)


def _clip(parameters: list[Any]) -> None:
    """Clip gradients to a norm; where they lie on several meshes, each has a norm of its own first.

    Source: transformers@5.23.0:trainer.py:_clip_grad_norm, _mixed_mesh_grad_norm.
    """
    groups = by_mesh(parameters)
    if len(groups) < 2:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        return
    norms = [torch.nn.utils.get_total_norm([each.grad for each in group]) for group in groups]
    total = torch.linalg.vector_norm(
        torch.stack([each.full_tensor() if hasattr(each, "full_tensor") else each for each in norms])
    )
    for group in groups:
        torch.nn.utils.clip_grads_with_norm_(group, 1.0, total)


def run_inference(tracker: Any, job: TraceJob, model: Any, batch: Any, call: Callable[[Any, Any], Any]) -> None:
    """Run one forward pass without a graph."""
    inputs = to_device(tracker, batch)
    with torch.inference_mode(mode=False), torch.no_grad(), autocast(job):
        call(model, inputs)
