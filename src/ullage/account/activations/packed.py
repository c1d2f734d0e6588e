"""Frozen 4-bit layers in a layer's backward: one weight at a time is written out, in forward and again in backward."""

from __future__ import annotations

from ullage.account.activations.backward import Point
from ullage.account.activations.saved import Implementation, SavedTensor, Shape
from ullage.frozen import Frozen
from ullage.spec import model as spec
from ullage.units import cdiv, dtype_bytes

Table = tuple[SavedTensor, ...]


class _Block(Frozen):
    """Sizes of one feed-forward block: bytes.

    ``inner``: the product of gate and up in the block's format, ``narrow``: in the compute dtype; ``rows``: its input
    in the compute dtype; ``weight``: one weight in the compute dtype; ``written``: as forward writes it out;
    ``stream``: the residual stream; ``width`` and ``compute``: of one element in the block's format and in the compute
    dtype.
    """

    inner: int
    narrow: int
    rows: int
    weight: int
    written: int
    stream: int
    width: int
    compute: int

    @property
    def cast(self) -> bool:
        """Whether the block's format is not the compute dtype."""
        return self.width != self.compute


def written_out_points(
    layer: spec.Layer,
    hidden_size: int,
    shape: Shape,
    implementation: Implementation,
    table: Table,
    *,
    recomputed: bool,
    reentrant: bool,
) -> tuple[Point, ...]:
    """Return the moments at which a weight of a feed-forward block is written out; attention's are smaller.

    Formula: W = 2hI, where the input is fp32 forward 4hI + 2hI (a copy in its format, which autocast casts back).
        Backward of down: W + the gradient of the product, nI. Run again by a checkpoint that stops early, up: W + its
        output + the gradient of the product, which is there already since nothing was read for it, + normed input and
        the middle of the residual stream, less up's own row. Run again whole, down: W + the product + its output; of
        the last of experts that run in turn also normed input and sum, less what it has not made yet.
    Source: bitsandbytes@0.43.3:autograd/_functions.py:MatMul4Bit; fms-acceleration@876e2ed6:plugins/accelerated-peft/
        src/fms_acceleration_peft/gptqmodel/nn_modules/triton_utils/dequant.py:QuantLinearFunction (both keep no input);
        torch@2.13.0:torch/utils/checkpoint.py:_checkpoint_without_reentrant_generator, CheckpointFunction.
    """
    found: list[Point] = []
    for ffn in layer.ffns:
        if isinstance(ffn, spec.MoEFFN) and implementation.moe != "loop":
            continue  # experts that are one tensor are not packed
        block = _block(ffn, hidden_size, shape, implementation)
        narrow = block.rows if block.cast else 0
        down = block.stream + narrow + block.narrow + block.weight
        if not recomputed:
            found.append(Point(name="down projection", extra_bytes=down))
            continue
        held = _middle(layer, table, implementation, block.stream)
        if reentrant:
            cast = block.narrow if block.cast else 0
            again = block.stream + block.inner + cast + block.written + block.rows + held
            if isinstance(ffn, spec.MoEFFN):
                again += 2 * (shape.num_tokens * hidden_size * block.width - block.rows * block.width // block.compute)
            found.append(Point(name="down projection", extra_bytes=down + block.stream))
            found.append(Point(name="down projection, run again", extra_bytes=again))
            continue
        normed = 2 * block.rows if block.cast else block.rows
        made = block.narrow - block.inner  # up's output, before it has the block's format
        again = block.stream + block.inner + made + block.written + narrow + normed + held
        found.append(Point(name="up projection, run again", extra_bytes=again))
    return tuple(found)


def _block(ffn: spec.DenseFFN | spec.MoEFFN, hidden_size: int, shape: Shape, implementation: Implementation) -> _Block:
    rows = shape.num_tokens
    if isinstance(ffn, spec.MoEFFN):
        rows = cdiv(shape.num_routed_tokens(ffn.top_k), ffn.num_experts)
    compute = int(dtype_bytes(implementation.compute_dtype))
    width = int(dtype_bytes(implementation.ffn_dtype or implementation.compute_dtype))
    weight = hidden_size * ffn.intermediate_size
    return _Block(
        inner=rows * ffn.intermediate_size * width,
        narrow=rows * ffn.intermediate_size * compute,
        rows=rows * hidden_size * compute,
        weight=weight * compute,
        written=weight * (compute if width == compute else width + compute),
        stream=int(shape.num_tokens * hidden_size * dtype_bytes(implementation.residual_dtype)),
        width=width,
        compute=compute,
    )


def _middle(layer: spec.Layer, table: Table, implementation: Implementation, stream: int) -> int:
    """Return the middle of the residual stream, unless the second norm keeps it as it is."""
    names = {norm.name for norm in layer.norms[1:2]}
    kept = any(
        row.module in names and row.name.startswith("input") and row.dtype == implementation.residual_dtype
        for row in table
    )
    return 0 if kept else stream
