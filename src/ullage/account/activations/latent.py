"""What multi-head latent attention (MLA) keeps when it is trained: keys and values are expanded to all heads."""

from __future__ import annotations

from ullage.account.activations.norms import rows_table
from ullage.account.activations.saved import Implementation, Keeper, SavedTensor, Shape
from ullage.spec import model as spec


def latent_table(
    attention: spec.LatentAttention, hidden_size: int, shape: Shape, implementation: Implementation
) -> tuple[SavedTensor, ...]:
    """Return what one MLA block keeps.

    Formula: input bsh + the two latents' norms (bs d_cq, bs d_c) + inputs of q_b and kv_b + query and key
        bsa(d_nope + d_rope) each + the output of kv_b bsa(d_nope + d_v), of which the values are a view, + the core.
        FlashAttention 2 wants equal head sizes: values and output are then padded to d_nope + d_rope, and the output
        projection reads a copy of its own.
    Source: transformers@5.23.0:models/deepseek_v3/modeling_deepseek_v3.py:DeepseekV3Attention.forward.
    Known error: none against saved tensors on CPU (tests/contract/test_saved_tensors.py).
    """
    keeper = Keeper(
        shape=shape,
        implementation=implementation,
        module=attention.prefix,
        source="transformers@5.23.0:models/deepseek_v3/modeling_deepseek_v3.py:DeepseekV3Attention.forward",
    )
    heads = attention.num_heads // shape.tensor_parallel_size
    qk_dim = attention.qk_nope_head_dim + attention.qk_rope_head_dim
    found = list(keeper.keep_input("q_proj.input", shape.num_split_tokens * hidden_size, "bsh"))
    if attention.q_lora_rank is not None:
        found += _latent(keeper, "q_a_layernorm", "q_b_proj", attention.q_lora_rank, "bsd_cq")
    found += _latent(keeper, "kv_a_layernorm", "kv_b_proj", attention.kv_lora_rank, "bsd_c")
    found.append(keeper.keep("query", shape.num_tokens * heads * qk_dim, "bsa(d_nope+d_rope)"))
    found.append(keeper.keep("key", shape.num_tokens * heads * qk_dim, "bsa(d_nope+d_rope)"))
    return (*found, *_core(attention, keeper, heads, qk_dim))


def _latent(keeper: Keeper, norm_name: str, linear: str, size: int, formula: str) -> list[SavedTensor]:
    """Return a latent's norm and the input of the projection that expands it."""
    norm = spec.Norm(name=f"{keeper.module}.{norm_name}", size=size)
    found = list(rows_table(norm, keeper.shape.num_split_tokens, 1, keeper.shape, keeper.implementation))
    return [*found, *keeper.keep_input(f"{linear}.input", keeper.shape.num_split_tokens * size, formula)]


def _core(attention: spec.LatentAttention, keeper: Keeper, heads: int, qk_dim: int) -> list[SavedTensor]:
    implementation, shape = keeper.implementation, keeper.shape
    per_head = shape.num_tokens * heads
    expanded = keeper.keep(
        "kv_b_proj.output (values)",
        per_head * (attention.qk_nope_head_dim + attention.v_head_dim),
        "bsa(d_nope+d_v)",
    )
    projected = keeper.keep_input("o_proj.input", per_head * attention.v_head_dim, "bsa d_v")
    if implementation.attention in ("eager", "unfused"):
        scores = per_head * shape.seq_len
        found = [expanded]
        if implementation.compute_dtype != implementation.softmax_dtype:
            found.append(
                keeper.keep("core.probabilities before the cast", scores, "bass", implementation.softmax_dtype)
            )
        return [*found, keeper.keep("core.probabilities", scores, "bass"), *projected]
    logsumexp = keeper.keep("core.logsumexp", per_head, "bas", "float32")
    if implementation.pads_values:
        padded = [keeper.keep(name, per_head * qk_dim, "bsa(d_nope+d_rope)") for name in ("value", "core.output")]
        return [*padded, logsumexp, *projected]
    output = keeper.keep("core.output", per_head * attention.v_head_dim, "bsa d_v")
    return [expanded, output, logsumexp]
