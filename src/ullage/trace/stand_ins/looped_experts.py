"""Experts one after another, each of linear layers: how transformers ran mixtures before version 5."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


class Expert(torch.nn.Module):
    """A gated feed-forward block.

    Source: transformers@4.48.1:models/mixtral/modeling_mixtral.py:MixtralBlockSparseTop2MLP.
    """

    def __init__(self, hidden: int, inner: int, activation: Any, dtype: torch.dtype) -> None:
        super().__init__()
        wide, narrow = _linear(hidden, inner, dtype), _linear(inner, hidden, dtype)
        self.w1, self.w2, self.w3 = wide, narrow, _linear(hidden, inner, dtype)
        self.act_fn = activation

    def forward(self, hidden: Any) -> Any:
        """Run the block."""
        inner = self.act_fn(self.w1(hidden)) * self.w3(hidden)
        inner = self.w2(inner)
        return inner


class LoopedExperts(torch.nn.Module):
    """A router and experts that take their tokens in turn; outputs are added in place to one tensor.

    Source: transformers@4.48.1:models/mixtral/modeling_mixtral.py:MixtralSparseMoeBlock.forward.
    """

    def __init__(self, config: Any, activation: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_experts, self.top_k = config.num_local_experts, config.num_experts_per_tok
        self.gate = _linear(config.hidden_size, self.num_experts, dtype)
        self.experts = torch.nn.ModuleList(
            Expert(config.hidden_size, config.intermediate_size, activation, dtype) for _each in range(self.num_experts)
        )

    def forward(self, hidden: Any) -> Any:
        """Route tokens to experts and add up what comes out."""
        shape = hidden.shape
        hidden = hidden.view(-1, shape[-1])
        scores = self.gate(hidden)
        weights = functional.softmax(scores, dim=1, dtype=torch.float)
        weights, chosen = torch.topk(weights, self.top_k, dim=-1)
        weights /= weights.sum(dim=-1, keepdim=True)
        weights = weights.to(hidden.dtype)
        total = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        mask = functional.one_hot(chosen, num_classes=self.num_experts).permute(2, 1, 0)
        for number, expert in enumerate(self.experts):
            choice, token = torch.where(mask[number])
            taken = hidden[None, token].reshape(-1, shape[-1])
            made = expert(taken) * weights[token, choice, None]
            total.index_add_(0, token, made.to(hidden.dtype))
        return total.reshape(shape)


def loop_experts(model: Any) -> int:
    """Give a Mixtral of transformers 5 the experts of version 4; return how many blocks were replaced."""
    replaced, config = 0, model.config
    for module in list(model.modules()):
        block = getattr(module, "mlp", None)
        if block is not None and type(block).__name__ == "MixtralSparseMoeBlock":
            with torch.device("meta"):
                module.mlp = LoopedExperts(config, block.experts.act_fn, block.gate.weight.dtype)
            replaced += 1
    return replaced


def _linear(inputs: int, outputs: int, dtype: torch.dtype) -> torch.nn.Linear:
    return torch.nn.Linear(inputs, outputs, bias=False, dtype=dtype, device="meta")
