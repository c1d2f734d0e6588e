"""What a normalisation keeps."""

from __future__ import annotations

from ullage.account.activations.saved import Implementation, Keeper, SavedTensor, Shape
from ullage.spec import model as spec


def norm_table(norm: spec.Norm, shape: Shape, implementation: Implementation) -> tuple[SavedTensor, ...]:
    """Return what a norm on the residual stream keeps; its output is kept by the linears that read it.

    Formula: RMS written in PyTorch: fp32 copy 4bsh + rstd 4bs + normalised 2bsh (only for a trained weight; 4bsh
        where the cast comes after the weight);
        fused: input 2bsh + rstd 4bs; LayerNorm: input + mean + rstd.
    Source: transformers@5.23.0:models/llama/modeling_llama.py:LlamaRMSNorm.forward;
        torch@2.13.0:aten/src/ATen/native/layer_norm.cpp; liger-kernel@0.6.3:ops/rms_norm.py:rms_norm_forward.
    Known error: none (tests/contract/test_saved_tensors.py).
    """
    return rows_table(norm, shape.num_split_tokens, 1, shape, implementation)


def rows_table(
    norm: spec.Norm, num_tokens: int, num_heads: int, shape: Shape, implementation: Implementation
) -> tuple[SavedTensor, ...]:
    """Return what a norm over ``num_tokens`` x ``num_heads`` rows of ``norm.size`` keeps."""
    keeper = Keeper(
        shape=shape,
        implementation=implementation,
        module=norm.name,
        source="transformers@5.23.0:models/llama/modeling_llama.py:LlamaRMSNorm.forward",
    )
    rows = num_tokens * num_heads
    size = "bsh" if num_heads == 1 else "bsad"
    num_values = rows * norm.size
    wide = implementation.residual_dtype if num_heads == 1 else implementation.compute_dtype
    if norm.kind == "layer":
        statistics = [keeper.keep("mean", rows, "bs", "float32"), keeper.keep("rstd", rows, "bs", "float32")]
        return (keeper.keep("input", num_values, size, wide), *statistics)
    rstd = keeper.keep("rstd", rows, "bs", "float32")
    if implementation.norm in ("fused", "te"):
        return (keeper.keep("input", num_values, size, wide), rstd)
    found = [keeper.keep("input as fp32", num_values, size, "float32"), rstd]
    if norm.weight and implementation.trained:
        late = implementation.norm == "late_cast"
        found.append(keeper.keep("normalised", num_values, size, "float32" if late else implementation.compute_dtype))
    return tuple(found)
