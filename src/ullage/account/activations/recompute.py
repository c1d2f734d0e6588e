"""What a layer leaves behind under activation checkpointing, and what its backward pass needs for a moment."""

from __future__ import annotations

from ullage.account.activations.saved import Implementation, SavedTensor, Shape, table_bytes
from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.spec import model as spec
from ullage.spec.training import Recompute
from ullage.units import dtype_bytes


class LayerMemory(Frozen):
    """One layer of one micro-batch.

    Attributes:
        kept_bytes: from its forward to its backward; working_bytes: on top of that at the worst point of its backward
            (recomputed tensors and gradients of activations).
    """

    kept_bytes: int
    working_bytes: int


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
    backward_bytes: int,
) -> LayerMemory:
    """Return what one layer keeps and works with.

    Formula: recomputed: its input stays, the whole table comes back during its backward; modules: their rows come back,
        the rest stays; none: the table stays.
    Source: torch@2.13.0:torch/utils/checkpoint.py:checkpoint.

    Raises:
        InputError: selective recompute without saying of what.
    """
    if recomputed:
        return LayerMemory(kept_bytes=input_bytes, working_bytes=table_bytes(table) + backward_bytes)
    if recompute.kind == "modules":
        dropped = tuple(row for row in table if _in_modules(row, recompute.modules))
        again = table_bytes(dropped)
        return LayerMemory(kept_bytes=table_bytes(table) - again, working_bytes=again + backward_bytes)
    if recompute.kind == "selective":
        raise InputError(
            _("what selective recompute drops is the framework's choice, and this engine has none"),
            remedy=_("name the modules, or give full or none"),
        )
    return LayerMemory(kept_bytes=table_bytes(table), working_bytes=backward_bytes)


def backward_bytes(layer: spec.Layer, hidden_size: int, shape: Shape, implementation: Implementation) -> int:
    """Return the gradients of activations alive at the worst point of one layer's backward.

    Formula: gated block, at the product of gate and up: its gradient and those of both factors, 3bsI, less the
        product itself, which its linear has let go (only where it was kept), + the gradient of the residual stream bsh.
        Experts run one after another where they loop, so only one expert's rows count there.
    Source: torch@2.13.0:tools/autograd/derivatives.yaml (mul, silu); the order of a reverse pass.
    Known error: the gradient of a linear's weight is counted with the gradients, not here.
    """
    width = dtype_bytes(implementation.ffn_dtype or implementation.compute_dtype)
    residual = int(shape.num_split_tokens * hidden_size * dtype_bytes(implementation.residual_dtype))
    worst = 0
    for ffn in layer.ffns:
        if isinstance(ffn, spec.DenseFFN):
            values = shape.num_tokens * (ffn.intermediate_size // shape.tensor_parallel_size)
            released = values if implementation.trained else 0
            worst = max(worst, int(_ffn_gradients(values, ffn.gated) * width) - int(released * width))
        else:
            rows = shape.num_routed_tokens(ffn.top_k)
            if implementation.moe == "loop":
                rows = -(-rows // ffn.num_experts)
            values = rows * (ffn.intermediate_size // shape.expert_tensor_parallel_size)
            worst = max(worst, int(_ffn_gradients(values, ffn.gated) * width))
    return residual + worst


def _ffn_gradients(values: int, gated: bool) -> int:
    return 3 * values if gated else 2 * values


def _in_modules(row: SavedTensor, modules: tuple[str, ...]) -> bool:
    return any(row.module == module or row.module.startswith(f"{module}.") for module in modules)
