"""Recurrent mixers written in PyTorch: what Transformers runs where the packages are not installed."""

from __future__ import annotations

from ullage.account.activations.recurrent_rows import (
    DELTA_CHUNK,
    STATE_CHUNK,
    Core,
    Row,
    delta_gates,
    delta_projections,
    delta_sizes,
    gated_norm,
    mamba2_sizes,
)
from ullage.spec import mixers as spec


def torch_gated_delta(part: spec.GatedDeltaNet, split: int, *, autocast: bool = False) -> Core:
    """The gated delta rule written in PyTorch: all in fp32, with keys copied to all value heads.

    Formula: in fp32 per value head 8 d_k + 3 d_v, five squares of the chunk 5 x 64, the states d_k d_v / 64, and seven
        numbers. Under autocast each product keeps narrow copies: fp32 6 d_k + 2 d_v + 2 x 64 + states + 7, narrow
        7 d_k + 2 d_v + 3 x 64 + 2 states. Backward, chunk by chunk: whole gradients of k (twice), q, new values, output
        and a square, 3 d_k + 2 d_v + 64, and two of one chunk laid into zeros, 2 d_k.
    Source: transformers@5.23.0:models/qwen3_next/modeling_qwen3_next.py:torch_chunk_gated_delta_rule, causal_conv1d_fn;
        torch@2.13.0:tools/autograd/derivatives.yaml (linalg_solve_triangular keeps its matrix and its result),
        aten/src/ATen/autocast_mode.h (bmm).
    Known error: below 0.1 % on CPU, 1 % under autocast (tests/contract/test_recurrent_tables.py).
    """
    _k_heads, heads, keys, values = delta_sizes(part, split)
    key, value = part.k_head_dim, part.v_head_dim
    state = key * value // DELTA_CHUNK
    wide, narrow = 8 * key + 3 * value + 5 * DELTA_CHUNK + state + 7, 0
    if autocast:
        wide = 6 * key + 2 * value + 2 * DELTA_CHUNK + state + 7
        narrow = 7 * key + 2 * value + 3 * DELTA_CHUNK + 2 * state
    return Core(
        projections=delta_projections(part, keys, values, heads),
        rows=(
            Row(name="conv.input", per_token=2 * keys + values),
            Row(name="conv.output", per_token=2 * keys + values),
            *delta_gates(heads),
            Row(name="chunks", per_token=heads * wide, dtype="float32"),
            Row(name="chunks, narrow copies", per_token=heads * narrow),
            *gated_norm(values, heads),
        ),
        out_name="out_proj",
        out_width=values,
        work=values,
        work_fp32=heads * (5 * key + 2 * value + DELTA_CHUNK),
        source="transformers@5.23.0:models/qwen3_next/modeling_qwen3_next.py:torch_chunk_gated_delta_rule",
    )


def torch_mamba2(part: spec.Mamba2, split: int, *, autocast: bool = False) -> Core:
    """Mamba-2 written in PyTorch: all in fp32, with B and C copied to all heads.

    Formula: in fp32 8I (+ 2I trained), 5HN, three squares of the chunk 3H c, states twice 2 I N / c, and small rows;
        the projection's output and the convolution's in the compute dtype. Under autocast products keep narrow
        copies: fp32 5I + HN + H c, narrow 3I + 4HN + 2H c and the states. Backward: gradients of two squares,
        and 2I; under autocast their narrow ones and that of C beside them.
    Symbols: I inner size, H heads, N state size, c chunk 256.
    Source: transformers@5.23.0:models/granitemoehybrid/modeling_granitemoehybrid.py:mamba2_chunk_scan,
        GraniteMoeHybridRMSNormGated.forward.
    Known error: below 1 % on CPU (tests/contract/test_recurrent_tables.py).
    """
    heads, groups, inner, mixed = mamba2_sizes(part, split)
    wide = heads * part.state_size
    squares, states = heads * STATE_CHUNK, inner * part.state_size // STATE_CHUNK
    chunks, narrow = 4 * inner + 5 * wide + 3 * squares + 2 * states, 0
    if autocast:
        chunks, narrow = inner + wide + squares, 3 * inner + 4 * wide + 2 * squares + 2 * states
    return Core(
        projections=(("in_proj", inner + mixed + heads),),
        rows=(
            Row(name="in_proj.output", per_token=inner + mixed + heads),
            Row(name="conv.output", per_token=mixed),
            Row(name="step sizes", per_token=2 * heads),
            Row(name="chunks", per_token=chunks + 3 * heads, dtype="float32"),
            Row(name="chunks, narrow copies", per_token=narrow),
            Row(name="residual of D", per_token=inner + heads, dtype="float32", trained=True),
            Row(name="norm, gate", per_token=4 * inner + groups, dtype="float32", behind=True),
            Row(name="norm.normalised", per_token=inner, dtype="float32", trained=True, behind=True),
        ),
        out_name="out_proj",
        out_width=inner,
        work=2 * squares + wide if autocast else 0,
        work_fp32=2 * squares + 2 * inner,
        source="transformers@5.23.0:models/granitemoehybrid/modeling_granitemoehybrid.py:mamba2_chunk_scan",
    )
