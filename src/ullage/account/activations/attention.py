"""What grouped-query attention keeps: flash and SDPA kernels, and attention written out."""

from __future__ import annotations

from ullage.account.activations.norms import rows_table
from ullage.account.activations.saved import Implementation, Keeper, SavedTensor, Shape
from ullage.spec import model as spec


def attention_table(
    attention: spec.Attention, hidden_size: int, shape: Shape, implementation: Implementation
) -> tuple[SavedTensor, ...]:
    """Return what one attention block keeps, its norms on the residual stream apart.

    Formula: input bsh (q, k, v share it; trained weights only) + q bsad + k, v bskd each + the core.
        Rotation keeps nothing of q and k themselves: only cosine and sine, which all layers share.
    Source: transformers@5.23.0:models/llama/modeling_llama.py:LlamaAttention.forward.
    Known error: none on CPU with torch 2.13 (tests/contract/test_saved_tensors.py).
    """
    keeper = Keeper(
        shape=shape,
        implementation=implementation,
        module=attention.prefix,
        source="transformers@5.23.0:models/llama/modeling_llama.py:LlamaAttention.forward",
    )
    heads = attention.num_heads // shape.tensor_parallel_size
    kv_heads = max(1, attention.num_kv_heads // shape.tensor_parallel_size)
    tokens = shape.num_tokens
    v_dim = attention.v_head_dim or attention.head_dim
    found = list(keeper.keep_input("q_proj.input", shape.num_split_tokens * hidden_size, "bsh"))
    found += _qk_norms(attention, heads, kv_heads, shape, implementation)
    repeats = implementation.attention in ("eager", "unfused") or implementation.repeat_kv
    kept_heads, symbol = (heads, "a") if repeats and heads != kv_heads else (kv_heads, "k")
    found.append(keeper.keep("query", tokens * heads * attention.head_dim, "bsad"))
    found.append(keeper.keep("key", tokens * kept_heads * attention.head_dim, f"bs{symbol}d"))
    found.append(keeper.keep("value", tokens * kept_heads * v_dim, f"bs{symbol}d"))
    found += core_table(keeper, heads, v_dim, sinks=attention.sinks)
    if attention.output_gate:
        found.append(keeper.keep("gate", tokens * heads * v_dim, "bsad"))
        if implementation.attention == "sdpa":  # the output by tokens is a copy; FlashAttention's is laid out so
            found.append(keeper.keep("core.output by tokens", tokens * heads * v_dim, "bsad"))
        found += keeper.keep_input("o_proj.input", tokens * heads * v_dim, "bsad")
    return tuple(found)


def core_table(keeper: Keeper, heads: int, v_dim: int, *, sinks: bool = False) -> tuple[SavedTensor, ...]:
    """Return what the core keeps besides q, k and v.

    Formula: flash, SDPA, TE: output bsad (the output projection's input is the same storage) + log-sum-exp 4bas;
        written out: softmax in fp32 4bass, its cast 2bass, with dropout the mask bass and 2bass more, and the
        input of the output projection (trained weights only). Compiled: scores 2bass in the place of fp32 4bass.
    Source: flash-attn@2.8.3:flash_attn/flash_attn_interface.py:FlashAttnFunc.forward;
        torch@2.13.0:tools/autograd/derivatives.yaml (_scaled_dot_product_flash_attention);
        transformers@5.23.0:models/llama/modeling_llama.py:eager_attention_forward.
    """
    shape, implementation = keeper.shape, keeper.implementation
    output = shape.num_tokens * heads * v_dim
    if implementation.attention in ("flash", "sdpa", "te"):
        return (
            keeper.keep("core.output", output, "bsad"),
            keeper.keep("core.logsumexp", shape.num_tokens * heads, "bas", "float32"),
        )
    columns = shape.seq_len + (1 if sinks else 0)
    scores = shape.num_tokens * heads * columns
    found = []
    if implementation.compiled:
        found.append(keeper.keep("core.scores", scores, "bass"))
        found.append(keeper.keep("core.statistics", 2 * shape.num_tokens * heads, "2bas", "float32"))
    elif implementation.compute_dtype != implementation.softmax_dtype and not sinks:
        found.append(keeper.keep("core.probabilities before the cast", scores, "bass", implementation.softmax_dtype))
    found.append(keeper.keep("core.probabilities", scores, "bass"))
    if implementation.dropout:
        found.append(keeper.keep("core.dropout mask", scores, "bass", "bool"))
        found.append(keeper.keep("core.dropped probabilities", scores, "bass"))
    return (*found, *keeper.keep_input("o_proj.input", output, "bsad"))


def _qk_norms(
    attention: spec.Attention, heads: int, kv_heads: int, shape: Shape, implementation: Implementation
) -> list[SavedTensor]:
    """Return what the norms of q and k keep: one row of head_dim per head, or one over the whole projection."""
    found: list[SavedTensor] = []
    if attention.qk_norm is None:
        return found
    for name, count in ((attention.q_norm_name, heads), (attention.k_norm_name, kv_heads)):
        rows, size = (count, attention.head_dim) if attention.qk_norm == "head" else (1, count * attention.head_dim)
        norm = spec.Norm(name=f"{attention.prefix}.{name}", size=size, kind=attention.qk_norm_kind)
        found += rows_table(norm, shape.num_tokens, rows, shape, implementation)
    return found
