"""What recurrent mixers keep when they are trained: delta rules, state-space layers, short convolutions.

The rows stand for the packages that Transformers takes where they are installed (flash-linear-attention, causal-conv1d,
mamba-ssm); ``kernels`` "torch" stands for its own fall-back, which is known for the gated delta net, Mamba-2 and the
short convolution. Counts are per token; e is the compute dtype.
Source: transformers@5.23.0:integrations/hub_kernels.py:use_kernel_func_from_hub_with_fallback.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from ullage.account.activations.recurrent_rows import (
    DELTA_CHUNK,
    SCAN_CHUNK,
    STATE_CHUNK,
    Core,
    Row,
    delta_gates,
    delta_projections,
    delta_sizes,
    gated_norm,
    mamba2_sizes,
)
from ullage.account.activations.recurrent_torch import torch_gated_delta, torch_mamba2
from ullage.account.activations.saved import Implementation, Keeper, SavedTensor, Shape
from ullage.errors import UnknownArchitectureError
from ullage.i18n import _
from ullage.spec import mixers as spec

Kernels = Literal["packages", "torch"]


def recurrent_core(
    part: object, kernels: Kernels = "packages", *, tensor_parallel_size: int = 1, autocast: bool = False
) -> Core | None:
    """Return what a recurrent mixer keeps, None when it is another kind of mixer.

    ``autocast``: products run on narrow copies, which only what is written in PyTorch is subject to.

    Raises:
        UnknownArchitectureError: the fall-back of that mixer is not known.
    """
    table, written_out = _CORES.get(type(part)), _WRITTEN_OUT.get(type(part))
    if table is None:
        return None
    if kernels == "torch" and written_out is not None:
        return written_out(part, tensor_parallel_size, autocast=autocast)
    if kernels == "torch" and not isinstance(part, spec.ShortConvolution):
        raise UnknownArchitectureError(
            _("what training keeps of a {part} layer without its kernels is not known yet").format(
                part=type(part).__name__
            )
        )
    return table(part, tensor_parallel_size)


def implemented_core(part: object, shape: Shape, implementation: Implementation) -> Core | None:
    """Return what a recurrent mixer keeps under an implementation."""
    return recurrent_core(
        part,
        implementation.recurrent,
        tensor_parallel_size=shape.tensor_parallel_size,
        autocast=implementation.autocast,
    )


def recurrent_table(
    part: Any, hidden_size: int, shape: Shape, implementation: Implementation
) -> tuple[SavedTensor, ...]:
    """Return what one recurrent mixer keeps, tensor by tensor."""
    core = implemented_core(part, shape, implementation)
    assert core is not None
    keeper = Keeper(shape=shape, implementation=implementation, module=part.prefix, source=core.source)
    tokens = shape.num_tokens
    found = list(keeper.keep_input("projections.input", shape.num_split_tokens * hidden_size, "bsh"))
    found += [
        keeper.keep(row.name, tokens * row.per_token, f"bs x {row.per_token}", row.dtype)
        for row in core.rows
        if implementation.trained or not row.trained
    ]
    if core.keeps_out_input:
        found += keeper.keep_input(f"{core.out_name}.input", tokens * core.out_width, f"bs x {core.out_width}")
    return tuple(found)


def _short_convolution(part: spec.ShortConvolution, split: int) -> Core:
    """A gated short convolution.

    Formula: the projection's three parts 3h, the convolution's input and output 2h; backward: gradients of both
        products and of the projection's output, 6h. PyTorch's convolution keeps its input too, trained or not.
    Source: transformers@5.23.0:models/lfm2/modeling_lfm2.py:Lfm2ShortConv.forward;
        causal-conv1d@1.5:causal_conv1d_interface.py:CausalConv1dFn.forward;
        torch@2.13.0:tools/autograd/derivatives.yaml (convolution).
    Known error: none on CPU (tests/contract/test_recurrent_tables.py), the columns of the padding apart.
    """
    size = part.size // split
    return Core(
        projections=(("in_proj", 3 * size),),
        rows=(
            Row(name="in_proj.output", per_token=3 * size),
            Row(name="conv.input", per_token=size),
            Row(name="conv.output", per_token=size, behind=True),
        ),
        out_name="out_proj",
        out_width=size,
        work=6 * size,
        source="transformers@5.23.0:models/lfm2/modeling_lfm2.py:Lfm2ShortConv.forward",
    )


def _gated_delta(part: spec.GatedDeltaNet, split: int) -> Core:
    """The gated delta rule in chunks of 64, by flash-linear-attention.

    Formula: the convolution's input 2K + V (K, V widths of all keys and values), normalised q and k 2K, a contiguous
        copy of v, cumulated decay 4a, the solved system 64 a e. Backward makes again w, u, the chunks' states
        (d_k d_v / 64 per head and token) and new values, and their gradients: 5 a d_k + 5 a d_v + 2 a d_k d_v / 64.
    Source: fla-core@0.6.0:ops/gated_delta_rule/chunk.py:ChunkGatedDeltaRuleFunction.forward,
        chunk_gated_delta_rule_bwd; utils.py:input_guard;
        transformers@5.23.0:models/qwen3_next/modeling_qwen3_next.py:Qwen3NextGatedDeltaNet.forward.
    """
    k_heads, heads, keys, values = delta_sizes(part, split)
    per_head = 5 * part.k_head_dim + 5 * part.v_head_dim + 2 * (part.k_head_dim * part.v_head_dim // DELTA_CHUNK)
    return Core(
        projections=delta_projections(part, keys, values, heads),
        rows=(
            Row(name="conv.input", per_token=2 * keys + values),
            *delta_gates(heads),
            Row(name="query and key normalised", per_token=2 * keys),
            Row(name="query and key rstd", per_token=2 * k_heads, dtype="float32"),
            Row(name="value", per_token=values),
            Row(name="cumulated decay", per_token=heads, dtype="float32"),
            Row(name="solved system", per_token=heads * DELTA_CHUNK),
            *gated_norm(values, heads),
        ),
        out_name="out_proj",
        out_width=values,
        work=heads * per_head + values,
        work_fp32=4 * heads,
        source="fla-core@0.6.0:ops/gated_delta_rule/chunk.py:ChunkGatedDeltaRuleFunction.forward",
    )


def _kimi_delta(part: spec.KimiDeltaAttention, split: int) -> Core:
    """Kimi Delta Attention in chunks of 64, by flash-linear-attention; W all heads' width.

    Formula: the convolution's input 3W, normalised q and k 2W, a contiguous copy of v, the decay and its cumulated sum
        in fp32 8W, two squares 2 x 64 a e; softplus written out 8W (+ 4W where A_log is trained) and a mask; the norm
        in fp32: copy, normalised (trained), weighted, sigmoid of the gate, 4W each. Backward: w, qg, kg, u, new values
        and their gradients, states and theirs, six fp32 gradients of q, k and the decay.
    Source: fla-core@0.6.0:ops/kda/chunk.py:ChunkKDAFunction.forward, chunk_bwd.py:chunk_kda_bwd;
        transformers@5.23.0:models/kimi_linear/modeling_kimi_linear.py:KimiLinearDeltaAttention.forward,
        KimiLinearForgetGate.forward, KimiLinearRMSNormGated.forward.
    """
    heads, dim = part.num_heads // split, part.head_dim
    width = heads * dim
    rank = part.output_gate_rank
    wide = ("decay", "cumulated decay", "exp of the forget gate", "1 + exp of the forget gate")
    gate = (("g_a_proj", rank), ("g_b_proj", width)) if rank else (("g_proj", width),)
    forget = ("f_a_proj", part.gate_rank) if part.gate_rank else ("f_proj", width)
    return Core(
        projections=(("q_proj", width), ("k_proj", width), ("v_proj", width), forget, *gate),
        rows=(
            Row(name="conv.input", per_token=3 * width),
            Row(name="query and key normalised", per_token=2 * width),
            Row(name="query and key rstd", per_token=2 * heads, dtype="float32"),
            Row(name="value", per_token=width),
            Row(name="beta", per_token=heads),
            *(Row(name=name, per_token=width, dtype="float32") for name in wide),
            Row(name="forget gate after softplus", per_token=width, dtype="float32", trained=True),
            Row(name="forget gate mask", per_token=width, dtype="bool"),
            Row(name="inputs of the gates' second halves", per_token=(part.gate_rank or 0) + (rank or 0), trained=True),
            Row(name="squares of the chunks", per_token=2 * heads * DELTA_CHUNK),
            Row(name="norm.input as fp32", per_token=width, dtype="float32", behind=True),
            Row(name="norm.rstd", per_token=heads, dtype="float32", behind=True),
            Row(name="norm.normalised", per_token=width, dtype="float32", trained=True, behind=True),
            Row(name="norm.weighted", per_token=width, dtype="float32", behind=True),
            Row(name="gate activated", per_token=width, dtype="float32", behind=True),
        ),
        out_name="o_proj",
        out_width=width,
        work=heads * (8 * dim + 2 * (dim * dim // DELTA_CHUNK)) + width,
        work_fp32=heads * (6 * dim + 2 * DELTA_CHUNK),
        source="fla-core@0.6.0:ops/kda/chunk.py:ChunkKDAFunction.forward",
    )


def _mamba2(part: spec.Mamba2, split: int) -> Core:
    """Mamba-2 as one function: convolution, scan, gated norm and output projection.

    Formula: the projection's output 2I + 2GN + H, the scan's output I, 4G for the norm; the rest is made again.
        Backward: gradient of the projection's output and of x, B, C (twice: made again, and their gradient), three of
        width I; states in fp32 and the compute dtype with gradients 12 I N / chunk bytes; C B^T 8 G chunk bytes.
    Symbols: I inner size, G groups, N state size, H heads; chunk 256.
    Source: mamba@2.3.2:mamba_ssm/ops/triton/ssd_combined.py:MambaSplitConv1dScanCombinedFn,
        _mamba_chunk_scan_combined_bwd; transformers@5.23.0:models/granitemoehybrid/modeling_granitemoehybrid.py:
        GraniteMoeHybridMambaLayer.forward.
    """
    heads, groups, inner, mixed = mamba2_sizes(part, split)
    projected = inner + mixed + heads
    states = inner * part.state_size // STATE_CHUNK
    return Core(
        projections=(("in_proj", projected),),
        rows=(
            Row(name="in_proj.output", per_token=projected),
            Row(name="scan.output", per_token=inner),
            Row(name="norm.rstd", per_token=groups if part.gated_norm else 0, dtype="float32"),
        ),
        out_name="out_proj",
        out_width=inner,
        keeps_out_input=False,
        work=projected + 2 * mixed + 3 * inner + 2 * states,
        work_fp32=2 * states + 2 * groups * STATE_CHUNK + 4 * heads,
        source="mamba@2.3.2:mamba_ssm/ops/triton/ssd_combined.py:MambaSplitConv1dScanCombinedFn.forward",
    )


def _mamba(part: spec.Mamba, split: int) -> Core:
    """Mamba-1: a selective scan between separate projections.

    Formula: both halves of the projection 2I, the convolution's output I, step sizes I, the scan's output I, the small
        projection r + 2N, its norms; states of every 2048th position in fp32. Backward: gradients of x, step sizes,
        gate and output.
    Source: mamba@2.3.2:mamba_ssm/ops/selective_scan_interface.py:SelectiveScanFn.forward;
        transformers@5.23.0:models/jamba/modeling_jamba.py:JambaMambaMixer.
    """
    inner, small = part.inner_size // split, part.dt_rank + 2 * part.state_size
    return Core(
        projections=(("in_proj", 2 * inner),),
        rows=(
            Row(name="in_proj.output", per_token=2 * inner),
            Row(name="conv.output", per_token=inner),
            Row(name="x_proj.output", per_token=small),
            Row(name="norms as fp32", per_token=small if part.inner_norms else 0, dtype="float32"),
            Row(name="step sizes", per_token=inner),
            Row(name="scan.output", per_token=inner),
            Row(name="scan.states", per_token=-(-2 * inner * part.state_size // SCAN_CHUNK), dtype="float32"),
        ),
        out_name="out_proj",
        out_width=inner,
        work=5 * inner + 2 * small,
        work_fp32=2 * part.state_size,
        source="mamba@2.3.2:mamba_ssm/ops/selective_scan_interface.py:SelectiveScanFn.forward",
    )


#: A short convolution keeps the same with and without the package.
_CORES: dict[type, Callable[[Any, int], Core]] = {
    spec.ShortConvolution: _short_convolution,
    spec.GatedDeltaNet: _gated_delta,
    spec.KimiDeltaAttention: _kimi_delta,
    spec.Mamba2: _mamba2,
    spec.Mamba: _mamba,
}
_WRITTEN_OUT: dict[type, Callable[..., Core]] = {spec.GatedDeltaNet: torch_gated_delta, spec.Mamba2: torch_mamba2}
RECURRENT = tuple(_CORES)
