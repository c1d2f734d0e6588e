"""Fused kernels of fms-acceleration (after Unsloth's) as stand-ins, and what transformers did for FlashAttention."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

import torch


class FusedNorm(torch.autograd.Function):
    """RMSNorm as one kernel: keeps its input and one fp32 number a row; backward writes over the gradient it gets.

    The weight gets no gradient.
    Source: fms-acceleration@876e2ed6:plugins/fused-ops-and-kernels/src/fms_acceleration_foak/kernels/unsloth/
        rms_layernorm.py:Fast_RMS_Layernorm.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any) -> Any:
        """Keep the input and the root of each row."""
        made = torch.empty_like(hidden)
        rows = torch.empty(hidden.numel() // hidden.shape[-1], dtype=torch.float32, device=hidden.device)
        ctx.save_for_backward(hidden, weight, rows)
        return made

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        """Return the gradient, written over."""
        return grad, None


class FusedRotary(torch.autograd.Function):
    """Rotary embeddings as one kernel, in place; backward turns the gradient in place.

    Source: fms-acceleration@876e2ed6:plugins/fused-ops-and-kernels/src/fms_acceleration_foak/kernels/unsloth/
        rope_embedding.py:Fast_RoPE_Embedding.
    """

    @staticmethod
    def forward(ctx: Any, states: Any, cos: Any, sin: Any) -> Any:
        """Return the states, turned in place (batch, tokens, heads, size)."""
        batch, tokens, heads, size = states.shape
        ctx.tables = (cos, sin)
        return states.view(batch * tokens, heads * size).view(batch, tokens, heads, size)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        """Return the gradient; one that is not laid out in this order is copied."""
        batch, tokens, heads, size = grad.shape
        return grad.reshape(batch * tokens, heads * size).view(batch, tokens, heads, size), None, None


def fuse_norms(model: Any) -> None:
    """Let the RMSNorms of a model run as one kernel."""
    for each in model.modules():
        if type(each).__name__.endswith("RMSNorm"):
            each.forward = lambda hidden, norm=each: FusedNorm.apply(hidden, norm.weight)


def rotary(query: Any, key: Any, cos: Any, sin: Any, *_more: Any, **_named: Any) -> tuple[Any, Any]:
    """Turn queries and keys (batch, heads, tokens, size) in place."""
    turned = [FusedRotary.apply(each.transpose(1, 2), cos, sin).transpose(1, 2) for each in (query, key)]
    return turned[0], turned[1]


@contextmanager
def fused_rotary(model: Any, *, fused: bool = True) -> Iterator[None]:
    """Let the attention of a model turn in place, for as long as the context lasts."""
    with ExitStack() as stack:
        homes = {type(each).__module__ for each in model.modules() if type(each).__name__.endswith("Attention")}
        for home in homes if fused else ():
            if hasattr(sys.modules[home], "apply_rotary_pos_emb"):
                stack.enter_context(mock.patch.object(sys.modules[home], "apply_rotary_pos_emb", rotary))
        yield


@contextmanager
def repeated_heads(*, repeated: bool) -> Iterator[None]:
    """Let attention copy keys and values to all heads, for as long as the context lasts.

    Source: transformers@4.45.2:models/mistral/modeling_mistral.py:MistralFlashAttention2.forward (repeat_kv).
    """
    with ExitStack() as stack:
        if repeated:
            home = import_module("transformers.integrations.sdpa_attention")
            stack.enter_context(mock.patch.object(home, "use_gqa_in_sdpa", lambda *_arguments: False))
        yield
