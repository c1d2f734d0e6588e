"""What a mixture of experts keeps: router, permuted copies of the tokens, routed and shared experts."""

from __future__ import annotations

from ullage.account.activations.ffn import inner_table
from ullage.account.activations.saved import Implementation, Keeper, SavedTensor, Shape
from ullage.spec import model as spec


def moe_table(
    ffn: spec.MoEFFN, hidden_size: int, shape: Shape, implementation: Implementation
) -> tuple[SavedTensor, ...]:
    """Return what one mixture-of-experts block keeps.

    Formula: R = rows of this rank's routed experts (tokens x top_k when balanced): permuted input Rh + 4RI (3RI fused)
        + expert output Rh (for the gradient of the routing weights) + shared expert as a dense block
        + router scores bsE and indices. In a loop + the weighted output Rh, which ``index_add_`` keeps.
    Source: transformers@5.23.0:integrations/moe.py:grouped_mm_experts_forward and, before version 5, the loop over
        experts of models/mixtral/modeling_mixtral.py:MixtralSparseMoeBlock.forward (same tensors, one per expert);
        torch@2.13.0:tools/autograd/derivatives.yaml (index_add: source).
    Known error: none for balanced routing on CPU; on one rank routing does not change the sum, with expert
        parallelism it does (``Shape.expert_load``).
    """
    keeper = Keeper(
        shape=shape,
        implementation=implementation,
        module=ffn.prefix,
        source="transformers@5.23.0:integrations/moe.py:grouped_mm_experts_forward",
    )
    rows = shape.num_routed_tokens(ffn.top_k)
    width = ffn.latent_size or hidden_size
    values = rows * (ffn.intermediate_size // shape.expert_tensor_parallel_size)
    found = list(_router(ffn, hidden_size, keeper))
    found += keeper.keep_input("experts.input", rows * width, "Rh")
    found += inner_table(keeper, "experts.", values, gated=ffn.gated, activation=ffn.activation)
    if implementation.moe != "megatron":
        # Megatron folds the routing weights into the activation, so that the output is not kept.
        found.append(keeper.keep("experts.output", rows * width, "Rh", implementation.ffn_dtype))
    if implementation.moe == "loop":
        found.append(keeper.keep("experts.weighted output", rows * width, "Rh", implementation.ffn_dtype))
    found.append(keeper.keep("experts.routing weights", rows, "R", implementation.router_dtype))
    found.append(keeper.keep("experts.indices", 3 * rows, "3R", "int64"))
    return (*found, *_shared(ffn, hidden_size, keeper))


def _router(ffn: spec.MoEFFN, hidden_size: int, keeper: Keeper) -> tuple[SavedTensor, ...]:
    """Return the router's part: its input (shared with the experts'), the scores, and what top-k keeps.

    Source: transformers@5.23.0:models/deepseek_v3/modeling_deepseek_v3.py:DeepseekV3TopkRouter.forward (fp32 copies of
        input and weight); models/mixtral/modeling_mixtral.py:MixtralTopKRouter.forward.
    """
    tokens = keeper.shape.num_split_tokens
    wide: tuple[SavedTensor, ...] = ()
    if keeper.implementation.router_wide:
        # Autocast casts the fp32 copies back, and it is those casts that are kept.
        dtype = keeper.implementation.compute_dtype if keeper.implementation.autocast else "float32"
        copy = keeper.keep("router.input copied", tokens * hidden_size, "bsh", dtype)
        wide = (keeper.keep("router.weight copied", ffn.num_experts * hidden_size, "Eh", dtype),)
        wide = (copy, *wide) if keeper.implementation.trained else wide
    return (
        *keeper.keep_input("input", tokens * hidden_size, "bsh"),
        *wide,
        keeper.keep("router.scores", tokens * ffn.num_experts, "bsE", keeper.implementation.router_dtype),
        keeper.keep("router.top_k weights", tokens * ffn.top_k, "bsK", keeper.implementation.router_dtype),
        keeper.keep("router.top_k indices", tokens * ffn.top_k, "bsK", "int64"),
    )


def _shared(ffn: spec.MoEFFN, hidden_size: int, keeper: Keeper) -> tuple[SavedTensor, ...]:
    """Return the shared expert: a dense block that reads the same input."""
    if not ffn.shared_intermediate_size:
        return ()
    tokens = keeper.shape.num_tokens
    values = tokens * (ffn.shared_intermediate_size // keeper.shape.tensor_parallel_size)
    found = inner_table(keeper, f"{ffn.shared_name}.", values, gated=ffn.gated, activation=ffn.activation)
    if ffn.shared_gate:
        found.append(keeper.keep(f"{ffn.shared_name}.output", tokens * hidden_size, "bsh"))
        found.append(keeper.keep(f"{ffn.shared_name}.gate", tokens, "bs"))
    return tuple(found)
