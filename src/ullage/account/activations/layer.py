"""The table of a whole layer: its mixers, feed-forward blocks and norms."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from ullage.account.activations.attention import attention_table
from ullage.account.activations.ffn import dense_table
from ullage.account.activations.latent import latent_table
from ullage.account.activations.moe import moe_table
from ullage.account.activations.norms import norm_table
from ullage.account.activations.recurrent import RECURRENT, recurrent_table
from ullage.account.activations.saved import Implementation, SavedTensor, Shape
from ullage.errors import UnknownArchitectureError
from ullage.i18n import _
from ullage.spec import model as spec

_TABLES: dict[type, Callable[[Any, int, Shape, Implementation], tuple[SavedTensor, ...]]] = {
    spec.Attention: attention_table,
    spec.LatentAttention: latent_table,
    spec.DenseFFN: dense_table,
    spec.MoEFFN: moe_table,
    **dict.fromkeys(RECURRENT, recurrent_table),
}


@lru_cache(maxsize=4096)
def layer_table(
    layer: spec.Layer, hidden_size: int, shape: Shape, implementation: Implementation
) -> tuple[SavedTensor, ...]:
    """Return all that autograd keeps for one layer; the residual stream is the input that each norm keeps.

    Raises:
        UnknownArchitectureError: a part of the layer has no table yet.
    """
    found: list[SavedTensor] = []
    for part in (*layer.mixers, *layer.ffns):
        table = _TABLES.get(type(part))
        if table is None:
            raise UnknownArchitectureError(
                _("what training keeps of a {part} layer is not known yet").format(part=type(part).__name__)
            )
        found += table(part, hidden_size, shape, implementation)
    for number, norm in enumerate(layer.norms):
        rows = norm_table(norm, shape, implementation)
        # the layer's input is one tensor, whichever of its norms keeps it
        found += [one for one in rows if one.name != "input"] if layer.parallel and number else rows
    return tuple(found)
