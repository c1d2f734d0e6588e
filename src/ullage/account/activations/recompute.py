"""What a layer leaves behind under activation checkpointing, and what its backward pass needs for a moment."""

from __future__ import annotations

from ullage.account.activations.saved import SavedTensor, table_bytes
from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.spec.training import Recompute


class LayerMemory(Frozen):
    """One layer of one micro-batch.

    Attributes:
        kept_bytes: from its forward to its backward.
        points: moments of its backward: what stands on top of that (recomputed tensors, gradients of activations, less
            what has gone), and the gradients of its own weights.
    """

    kept_bytes: int
    points: tuple[tuple[int, int], ...]

    @property
    def working_bytes(self) -> int:
        """On top of what is kept at the worst point, the gradients of weights apart."""
        return max(extra for extra, _grads in self.points)


def is_recomputed(recompute: Recompute, index: int, num_layers: int) -> bool:
    """Return whether layer ``index`` of a stage of ``num_layers`` is recomputed as a whole.

    ``every`` k: layers 0, k, 2k ... (torchtitan's selective option counts the same way); ``num_layers`` with ``block``:
    the first ones of the stage.
    Source: torchtitan@0.2.0:models/llama3/infra/parallelize.py (ac_freq);
        Megatron-LM@core_r0.14:core/transformer/transformer_block.py:_checkpointed_forward.
    """
    if recompute.kind != "full":
        return False
    if recompute.num_layers is not None and recompute.method == "block":
        return index < recompute.num_layers
    return index % max(1, recompute.every) == 0


def layer_memory(
    table: tuple[SavedTensor, ...],
    *,
    recomputed: bool,
    recompute: Recompute,
    input_bytes: int,
    backward: tuple[tuple[int, int], ...],
) -> LayerMemory:
    """Return what one layer keeps and works with.

    Formula: recomputed: its input stays, the whole table comes back during its backward; modules: their rows come back,
        the rest stays; none: the table stays. ``backward``: (bytes beside the table, gradients of weights) of moments.
    Source: torch@2.13.0:torch/utils/checkpoint.py:checkpoint.

    Raises:
        InputError: selective recompute without saying of what.
    """
    if recomputed:
        return LayerMemory(kept_bytes=input_bytes, points=_on_top(backward, table_bytes(table)))
    if recompute.kind == "modules":
        dropped = tuple(row for row in table if _in_modules(row, recompute.modules))
        again = table_bytes(dropped)
        return LayerMemory(kept_bytes=table_bytes(table) - again, points=_on_top(backward, again))
    if recompute.kind == "selective":
        raise InputError(
            _("what selective recompute drops is the framework's choice, and this engine has none"),
            remedy=_("name the modules, or give full or none"),
        )
    return LayerMemory(kept_bytes=table_bytes(table), points=backward)


def _on_top(points: tuple[tuple[int, int], ...], again_bytes: int) -> tuple[tuple[int, int], ...]:
    return tuple((again_bytes + extra, grads) for extra, grads in points)


def _in_modules(row: SavedTensor, modules: tuple[str, ...]) -> bool:
    return any(row.module == module or row.module.startswith(f"{module}.") for module in modules)
