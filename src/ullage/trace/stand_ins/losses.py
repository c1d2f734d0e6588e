"""Stand-ins for losses that are not PyTorch's: they allocate and keep what the kernels do, and compute nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from ullage.account.activations.logits import liger_chunk

KINDS = ("liger", "head upcast", "loss upcast", "fused head upcast", "fused loss upcast")


class LigerLoss(torch.autograd.Function):
    """Liger's fused linear cross entropy: the forward pass makes all gradients, one chunk of tokens at a time.

    Source: liger-kernel@0.6.3:ops/fused_linear_cross_entropy.py:fused_linear_cross_entropy_forward.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any) -> Any:
        """Make the gradients of ``hidden`` (tokens x size) and of a trained head."""
        tokens, size = hidden.shape
        chunk = liger_chunk(tokens, weight.shape[0], size)
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        losses = torch.zeros(tokens, dtype=torch.float32, device=hidden.device)
        for start in range(0, tokens, chunk):
            part = hidden[start : start + chunk]
            logits = part @ weight.t()
            grad_hidden[start : start + chunk] = logits @ weight
            if grad_weight is not None:
                grad_weight += torch.mm(logits.t(), part).float()
        ctx.save_for_backward(grad_hidden, *([] if grad_weight is None else [grad_weight]))
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        """Hand the gradients on."""
        found = ctx.saved_tensors
        return found[0], found[1] if len(found) > 1 else None


class InPlaceLoss(torch.autograd.Function):
    """A cross entropy whose kernel writes the gradient over the fp32 logits; forward keeps them and one row sum.

    Source: fms-acceleration@876e2ed6:plugins/fused-ops-and-kernels/src/fms_acceleration_foak/
        kernels/unsloth/cross_entropy_loss.py:Fast_CrossEntropyLoss; unsloth@2024.1 likewise.
    """

    @staticmethod
    def forward(ctx: Any, logits: Any) -> Any:
        """Keep the logits."""
        rows = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
        ctx.save_for_backward(logits, rows)
        return torch.empty_like(rows).sum()

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        """Return the logits, written over."""
        return ctx.saved_tensors[0]


def use_loss(model: Any, kind: str) -> None:
    """Give a causal language model of transformers another loss.

    ``head upcast``: logits made fp32 by the model, a shifted copy in the loss; ``loss upcast``: the 16-bit logits stay.
    Source: transformers@4.45.2:models/llama/modeling_llama.py:LlamaForCausalLM.forward; @4.48.1:loss/loss_utils.py:
        ForCausalLMLoss.
    """

    def forward(input_ids: Any, labels: Any, **named: Any) -> dict[str, Any]:
        hidden = model.model(input_ids=input_ids, use_cache=False)[0]
        if kind == "liger":
            return {"loss": LigerLoss.apply(hidden.reshape(-1, hidden.shape[-1]), model.lm_head.weight)}
        logits = model.lm_head(hidden)
        if getattr(model.config, "logits_scaling", None):
            logits = logits / model.config.logits_scaling
        if "head" in kind:
            logits = logits.float()
        return {"loss": _shifted(logits.float(), labels, fused="fused" in kind), "logits": logits}

    model.forward = forward


def _shifted(logits: Any, labels: Any, *, fused: bool) -> Any:
    shifted = logits[..., :-1, :].contiguous().view(-1, logits.shape[-1])
    if fused:
        return InPlaceLoss.apply(shifted)
    return functional.cross_entropy(shifted, labels[..., 1:].contiguous().view(-1))
