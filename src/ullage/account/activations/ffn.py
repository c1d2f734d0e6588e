"""What a dense feed-forward block keeps."""

from __future__ import annotations

from ullage.account.activations.saved import Implementation, Keeper, SavedTensor, Shape
from ullage.spec import model as spec

#: Activations written out in Python, and how many tensors of the intermediate size they keep.
#: Source: transformers@5.23.0:activations.py:NewGELUActivation (input, tanh, half the input, 1 + tanh).
WRITTEN_OUT_ACTIVATIONS = {"gelu_new": 4}
#: What a gated block keeps of its inner size, its last linear's input apart.
#: Source: transformers@5.23.0:models/llama/modeling_llama.py:LlamaMLP; liger-kernel@0.6.3:ops/swiglu.py;
#: transformers@5.23.0:models/gpt_oss/modeling_gpt_oss.py:GptOssExperts._apply_gate.
GATED_ROWS = {
    "native": ("gate", "up", "activated gate"),
    "fused": ("gate", "up"),
    "clamped": ("gate", "up", "clamped gate", "sigmoid", "clamped up", "activated gate"),
}


def dense_table(
    ffn: spec.DenseFFN, hidden_size: int, shape: Shape, implementation: Implementation
) -> tuple[SavedTensor, ...]:
    """Return what a dense feed-forward block keeps.

    Formula: input bsh + gated: gate, up, activated gate and product, 4bsI; with a fused gate-and-product kernel
        gate, up and product, 3bsI; plain: input and output of the activation, 2bsI. Inputs of linears only where
        they are trained.
    Source: transformers@5.23.0:models/llama/modeling_llama.py:LlamaMLP.forward;
        liger-kernel@0.6.3:ops/swiglu.py:LigerSiLUMulFunction.
    Known error: none (tests/contract/test_saved_tensors.py).
    """
    keeper = Keeper(
        shape=shape,
        implementation=implementation,
        module=ffn.prefix,
        source="transformers@5.23.0:models/llama/modeling_llama.py:LlamaMLP.forward",
    )
    size = ffn.intermediate_size // shape.tensor_parallel_size
    found = list(keeper.keep_input(f"{ffn.gate_name}.input", shape.num_split_tokens * hidden_size, "bsh"))
    found += inner_table(keeper, "", shape.num_tokens * size, gated=ffn.gated, activation=ffn.activation)
    return tuple(found)


def inner_table(
    keeper: Keeper, prefix: str, num_values: int, *, gated: bool, activation: str, down: str = "down_proj"
) -> list[SavedTensor]:
    """Return what lies between the first and the last linear of a feed-forward block of ``num_values`` = bsI."""
    dtype = keeper.implementation.ffn_dtype
    if not gated:
        copies = 1 if keeper.implementation.compiled else WRITTEN_OUT_ACTIVATIONS.get(activation, 1)
        formula = f"{copies}bsI" if copies > 1 else "bsI"
        found = [keeper.keep(f"{prefix}activation", copies * num_values, formula, dtype)]
        return [*found, *keeper.keep_input(f"{prefix}{down}.input", num_values, "bsI")]
    names = GATED_ROWS[keeper.implementation.gated_ffn]
    found = [keeper.keep(f"{prefix}{name}", num_values, "bsI", dtype) for name in names]
    return [*found, *keeper.keep_input(f"{prefix}{down}.input", num_values, "bsI")]
