"""Scaled dot product attention as CUDA runs it: which kernel, and what that kernel keeps for backward."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional

from ullage.errors import InputError
from ullage.i18n import _
from ullage.trace.recorder.temporaries import Kernels

KERNELS = ("auto", "flash", "efficient", "cudnn", "math")
_HALVES = (torch.float16, torch.bfloat16)
#: Widest head of the flash kernel.
WIDEST_FLASH = 256


def attention(
    kernels: Kernels,
    written_out: Any,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Run the first kernel that can, or the one asked for; ``written_out`` is PyTorch's own function.

    Source: torch@2.13.0:aten/src/ATen/native/transformers/attention.cpp:scaled_dot_product_attention,
        cuda/sdp_utils.cpp:select_sdp_backend (flash, memory-efficient, then the written-out formula).
    Known error: on Hopper with cuDNN newer than 9.15 cuDNN comes first; it keeps the same tensors.
    """
    chosen = _choose(kernels.attention, query, key, value, attn_mask, enable_gqa)
    if chosen == "flash":
        return _flash(query, key, value, dropout_p, is_causal, scale)
    if chosen == "cudnn":
        return _cudnn(query, key, value, attn_mask, dropout_p, is_causal, scale)
    if chosen == "efficient":
        return _efficient(query, key, value, attn_mask, dropout_p, is_causal, scale)
    return written_out(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _choose(asked: str, query: Any, key: Any, value: Any, mask: Any, grouped: bool) -> str:
    """Return the kernel that runs.

    Raises:
        InputError: the one asked for cannot take these tensors.
    """
    can = {
        "flash": _flash_can(query, key, value, mask, grouped),
        "cudnn": query.dim() == 4 and query.dtype in _HALVES and query.shape[-1] % 8 == 0 and value.shape[-1] % 8 == 0,
        "efficient": _efficient_can(query, key, value),
        "math": True,
    }
    if asked != "auto":
        if not can[asked]:
            raise InputError(
                _("the {kernel} attention kernel cannot take queries {query} and values {value} of {dtype}").format(
                    kernel=asked, query=tuple(query.shape), value=tuple(value.shape), dtype=str(query.dtype)[6:]
                ),
                remedy=_("leave --attention out"),
            )
        return asked
    return next(name for name in ("flash", "efficient", "math") if can[name])


def _flash_can(query: Any, key: Any, value: Any, mask: Any, grouped: bool) -> bool:
    """Say whether the flash kernel can: half precision, no mask, one head size up to 256.

    Source: torch@2.13.0:aten/src/ATen/native/transformers/cuda/sdp_utils.cpp:can_use_flash_attention.
    """
    same: bool = query.shape[-1] == key.shape[-1] == value.shape[-1] <= WIDEST_FLASH
    heads: bool = query.dim() == 4 and (grouped or query.shape[1] == key.shape[1])
    return mask is None and same and heads and query.dtype in _HALVES


def _efficient_can(query: Any, key: Any, value: Any) -> bool:
    """Say whether the memory-efficient kernel can: equal heads, sizes that are multiples of the alignment.

    Source: torch@2.13.0:aten/src/ATen/native/transformers/cuda/sdp_utils.cpp:can_use_mem_efficient_attention.
    """
    multiple = 8 if query.dtype in _HALVES else 4
    sizes = query.shape[-1] == key.shape[-1] and query.shape[-1] % multiple == value.shape[-1] % multiple == 0
    return bool(query.dim() == 4 and query.shape[1] == key.shape[1] and sizes)


def _flash(query: Any, key: Any, value: Any, dropout: float, causal: bool, scale: float | None) -> Any:
    """Run the flash kernel: it keeps q, k, v, the output, logsumexp 4 b h s, and two random-state scalars.

    Source: torch@2.13.0:aten/src/ATen/native/transformers/attention.cpp (pad_last_dim to 8),
        cuda/flash_attn/flash_api.cpp:mha_fwd.
    """
    size = query.shape[-1]
    padded = (functional.pad(each, (0, -size % 8)) if size % 8 else each for each in (query, key, value))
    scale = scale if scale is not None else 1 / math.sqrt(size)
    found = torch.ops.aten._scaled_dot_product_flash_attention(*padded, dropout, causal, False, scale=scale)[0]
    return found[..., :size] if size % 8 else found


def _cudnn(query: Any, key: Any, value: Any, mask: Any, dropout: float, causal: bool, scale: float | None) -> Any:
    """Run cuDNN's kernel: it keeps q, k, v, the output, logsumexp 4 b h s, and random-state scalars.

    Source: torch@2.13.0:aten/src/ATen/native/transformers/cuda/attention.cu:_scaled_dot_product_cudnn_attention_cuda.
    """
    needs = torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value))
    return torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, mask, needs, dropout, causal, False, scale=scale
    )[0]


def _efficient(query: Any, key: Any, value: Any, mask: Any, dropout: float, causal: bool, scale: float | None) -> Any:
    """Run the memory-efficient kernel: q, k, v, the output, logsumexp 4 b h s' (s' a multiple of 32), two scalars.

    A mask of truth values becomes one of floats; a mask is padded to a multiple of 16 columns.
    Source: torch@2.13.0:aten/src/ATen/native/transformers/attention.cpp:convert_boolean_attn_mask, preprocess_mask;
        cuda/attention.cu:_scaled_dot_product_efficient_attention_cuda.
    """
    needs = torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value))
    if mask is not None:
        if mask.dtype == torch.bool:
            written = torch.zeros_like(mask, dtype=query.dtype)
            mask = written.masked_fill_(mask.logical_not(), float("-inf"))
        columns = mask.shape[-1]
        if columns % 16:
            mask = functional.pad(mask, (0, -columns % 16))[..., :columns]
        mask = mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, needs, dropout, causal, scale=scale
    )[0]
