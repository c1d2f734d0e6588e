"""The tensors of linear-attention and state-space kinds."""

from __future__ import annotations

from ullage.account.parameters.parameter import Parameter
from ullage.spec import model as spec


def gated_delta_net(part: spec.GatedDeltaNet, hidden_size: int) -> list[Parameter]:
    """Tensors of a gated delta net."""
    raise NotImplementedError


def kimi_delta_attention(part: spec.KimiDeltaAttention, hidden_size: int) -> list[Parameter]:
    """Tensors of Kimi Delta Attention."""
    raise NotImplementedError


def lightning_attention(part: spec.LightningAttention, hidden_size: int) -> list[Parameter]:
    """Tensors of lightning attention."""
    raise NotImplementedError


def mamba(part: spec.Mamba, hidden_size: int) -> list[Parameter]:
    """Tensors of a Mamba-1 layer."""
    raise NotImplementedError


def mamba2(part: spec.Mamba2, hidden_size: int) -> list[Parameter]:
    """Tensors of a Mamba-2 layer."""
    raise NotImplementedError
