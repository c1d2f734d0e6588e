"""Gradients: as wide as the parameter they belong to, unless a framework keeps its own buffer."""

from __future__ import annotations

from ullage.account.optimizer import Trained
from ullage.ledger import Term, exact
from ullage.units import dtype_bytes


def gradients_term(trained: Trained, *, dtype: str, num_shards: int = 1) -> Term:
    """Return all gradients of one rank.

    Formula: elements x bytes of a gradient / shards.
    Source: torch@2.13.0:torch/csrc/autograd/functions/accumulate_grad.h (a gradient has its parameter's dtype).
    Known error: none; with several passes per step the new gradient of one tensor stands beside the sum.
    """
    size = int(-(-trained.num_elements * dtype_bytes(dtype) // num_shards))
    return exact("gradients", size, formula=f"{trained.num_elements:,} elements in {dtype}")


def accumulation_bytes(trained: Trained, *, dtype: str) -> int:
    """Return what adding to a kept gradient takes: the new gradient of the largest tensor."""
    return int(trained.largest * dtype_bytes(dtype))


def clipping_bytes(trained: Trained) -> int:
    """Return what the gradient norm takes: one fp32 norm per tensor, in blocks of 512 bytes.

    Source: torch@2.13.0:torch/nn/utils/clip_grad.py:_get_total_norm.
    """
    return 512 * sum(copies for _shape, copies in trained.tensors)
