"""PyTorch's RMS norm as CUDA runs it: one kernel; on meta tensors PyTorch takes it apart."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

_HALVES = (torch.float16, torch.bfloat16)


class FusedRmsNorm(torch.autograd.Function):
    """The kernel's tensors: the output and one number per row; it keeps its input, the weight and those numbers.

    Source: torch@2.13.0:torchgen/packaged/ATen/native/native_functions.yaml:_fused_rms_norm, and its derivative
        (derivatives.yaml); aten/src/ATen/native/cuda/layer_norm_kernel.cu:_fused_rms_norm_cuda.
    Known error: partial sums of the weight's gradient over more than 65,536 rows are left out.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, shape: tuple[int, ...], weight: Any) -> Any:
        """Make the output and the numbers of the rows, in fp32 where the input is of 16 bits."""
        made = torch.empty_like(x)
        rows = (*x.shape[: x.dim() - len(shape)], *(1 for _size in shape))
        numbers = x.new_empty(rows, dtype=torch.float32 if x.dtype in _HALVES else x.dtype)
        ctx.save_for_backward(x, weight, numbers)
        return made

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        """Make the gradients of input and weight."""
        x, weight, _numbers = ctx.saved_tensors
        grad = _waited(grad).contiguous()  # a copy lives as long as the kernel
        of_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        return of_x, None, torch.empty_like(weight) if ctx.needs_input_grad[2] else None


def _waited(tensor: Any) -> Any:
    """Return a tensor that a collective gives once it is there, as any kernel that reads it does."""
    return tensor.trigger_wait() if hasattr(tensor, "trigger_wait") else tensor


def rms_norm(
    written_out: Any,
    input: Any,
    normalized_shape: Any,
    weight: Any = None,
    eps: float | None = None,
) -> Any:
    """Run the norm as on a GPU; ``written_out`` is PyTorch's own function.

    Weights of another dtype than the input's, and layouts that would be moved first, run as written out.
    Source: torch@2.13.0:aten/src/ATen/native/layer_norm.cpp:rms_norm_symint.
    """
    x, shape = input, tuple(normalized_shape)
    fused = x.device.type == "meta" and x.dtype.is_floating_point and (weight is None or weight.dtype == x.dtype)
    if not fused:
        return written_out(x, shape, weight, eps)
    if not hasattr(x, "placements") and not hasattr(weight, "placements"):
        return FusedRmsNorm.apply(x, shape, weight)
    return _distributed(written_out, x, shape, weight, eps)


def _distributed(written_out: Any, x: Any, shape: tuple[int, ...], weight: Any, eps: float | None) -> Any:
    """Run it on this rank's part of a DTensor whose rows are whole; the weight's gradient is a part of a sum.

    Source: torch@2.13.0:torch/distributed/tensor/_ops/_math_ops.py (aten._fused_rms_norm.default: rows may be split).
    """
    placed = import_module("torch.distributed.tensor")
    both = all(hasattr(each, "placements") for each in (x, weight) if each is not None)
    whole = x.dim() - len(shape)
    if not both or any(each.is_partial() or (each.is_shard() and each.dim >= whole) for each in x.placements):
        return written_out(x, shape, weight, eps)
    if weight is not None:
        if not all(each.is_replicate() for each in weight.placements):
            return written_out(x, shape, weight, eps)
        parts = [placed.Partial() if each.is_shard() else placed.Replicate() for each in x.placements]
        weight = weight.to_local(grad_placements=parts)
    made = FusedRmsNorm.apply(_waited(x.to_local()), shape, weight)
    return placed.DTensor.from_local(
        made, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride()
    )
