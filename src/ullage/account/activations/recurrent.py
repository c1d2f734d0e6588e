"""What recurrent mixers keep when they are trained: delta rules, state-space layers, short convolutions.

The rows stand for the packages that Transformers takes where they are installed (flash-linear-attention, causal-conv1d,
mamba-ssm); ``kernels`` "torch" stands for its own fall-back, which is known for the gated delta net and the short
convolution. Counts are per token; e is the compute dtype.
Source: transformers@5.23.0:integrations/hub_kernels.py:use_kernel_func_from_hub_with_fallback.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from ullage.account.activations.saved import Implementation, Keeper, SavedTensor, Shape
from ullage.errors import UnknownArchitectureError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.spec import mixers as spec

Kernels = Literal["packages", "torch"]
#: Source: fla-core@0.6.0:ops/gated_delta_rule/chunk.py:chunk_gated_delta_rule, ops/kda/chunk.py:chunk_kda
#: (chunk_size 64); transformers@5.23.0:models/qwen3_next/modeling_qwen3_next.py:torch_chunk_gated_delta_rule.
DELTA_CHUNK = 64
#: Source: transformers@5.23.0:models/granitemoehybrid/configuration_granitemoehybrid.py (mamba_chunk_size);
#: nemotron_h's is 128 or 256.
STATE_CHUNK = 256
#: Positions per stored state. Source: mamba@2.3.2:csrc/selective_scan/selective_scan.cpp (chunks of 2048).
SCAN_CHUNK = 2048


class Row(Frozen):
    """One kept tensor: elements per token, None: in the compute dtype.

    ``trained``: only where the base is trained. ``behind``: read after the recurrence, so that it has gone when the
    recurrence is differentiated.
    """

    name: str
    per_token: int
    dtype: str | None = None
    trained: bool = False
    behind: bool = False


class Core(Frozen):
    """A mixer between its input and its output projection, per token.

    Attributes:
        projections: width of each linear that reads the mixer's input, by name.
        rows: what is kept; the mixer's input and that of the output projection are apart.
        out_name, out_width: the output projection and what it reads.
        keeps_out_input: a trained output projection keeps its input (a fused function makes it again).
        work, work_fp32: elements in the compute dtype and in fp32 that the backward of the recurrence makes.
        source: where the tensors are saved.
    """

    projections: tuple[tuple[str, int], ...]
    rows: tuple[Row, ...]
    out_name: str
    out_width: int
    work: int
    work_fp32: int = 0
    keeps_out_input: bool = True
    source: str = ""

    def row_bytes(self, element_bytes: int, *, trained: bool, behind_only: bool = False) -> int:
        """Bytes per token of the rows."""
        widths = {None: element_bytes, "float32": 4, "bool": 1}
        return sum(
            row.per_token * widths[row.dtype]
            for row in self.rows
            if (trained or not row.trained) and (row.behind or not behind_only)
        )

    def work_bytes(self, element_bytes: int) -> int:
        """Bytes per token that the backward of the recurrence makes."""
        return self.work * element_bytes + 4 * self.work_fp32


def recurrent_core(
    part: object, kernels: Kernels = "packages", *, tensor_parallel_size: int = 1, autocast: bool = False
) -> Core | None:
    """Return what a recurrent mixer keeps, None when it is another kind of mixer.

    ``autocast``: products run on narrow copies, which only what is written in PyTorch is subject to.

    Raises:
        UnknownArchitectureError: the fall-back of that mixer is not known.
    """
    if isinstance(part, spec.GatedDeltaNet) and kernels == "torch":
        return _torch_gated_delta(part, tensor_parallel_size, autocast=autocast)
    table = _CORES.get((type(part), kernels))
    if table is not None:
        return table(part, tensor_parallel_size)
    if (type(part), "packages") in _CORES:
        raise UnknownArchitectureError(
            _("what training keeps of a {part} layer without its kernels is not known yet").format(
                part=type(part).__name__
            )
        )
    return None


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


def _gated_norm(values: int, heads: int) -> tuple[Row, ...]:
    """The norm of the output, gated: written out in fp32, the cast before the weight.

    Formula: fp32 copy 4, normalised e (trained), weighted e, gate as fp32 4, its SiLU 4, per value.
    Source: transformers@5.23.0:models/qwen3_next/modeling_qwen3_next.py:Qwen3NextRMSNormGated.forward (a kernel of the
        hub only where ``use_kernels`` asks for it).
    """
    return (
        Row(name="norm.input as fp32", per_token=values, dtype="float32", behind=True),
        Row(name="norm.rstd", per_token=heads, dtype="float32", behind=True),
        Row(name="norm.normalised", per_token=values, trained=True, behind=True),
        Row(name="norm.weighted", per_token=values, behind=True),
        Row(name="gate as fp32", per_token=values, dtype="float32", behind=True),
        Row(name="gate activated", per_token=values, dtype="float32", behind=True),
    )


def _delta_sizes(part: spec.GatedDeltaNet, split: int) -> tuple[int, int, int, int]:
    """Return (key heads, value heads, width of all keys, width of all values) on this rank."""
    k_heads, v_heads = part.num_k_heads // split, part.num_v_heads // split
    return k_heads, v_heads, k_heads * part.k_head_dim, v_heads * part.v_head_dim


def _delta_projections(part: spec.GatedDeltaNet, keys: int, values: int, heads: int) -> tuple[tuple[str, int], ...]:
    if part.fused:
        return (("in_proj_qkvz", 2 * keys + 2 * values), ("in_proj_ba", 2 * heads))
    return (
        ("in_proj_qkv", 2 * keys + values),
        ("in_proj_z", values),
        ("in_proj_b", heads),
        ("in_proj_a", heads),
    )


def _delta_gates(heads: int) -> tuple[Row, ...]:
    """Decay and learning rate: softplus in fp32 (input, and for A_log its result), and a sigmoid."""
    return (
        Row(name="decay before softplus", per_token=heads, dtype="float32"),
        Row(name="decay after softplus", per_token=heads, dtype="float32", trained=True),
        Row(name="beta", per_token=heads),
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
    k_heads, heads, keys, values = _delta_sizes(part, split)
    per_head = 5 * part.k_head_dim + 5 * part.v_head_dim + 2 * (part.k_head_dim * part.v_head_dim // DELTA_CHUNK)
    return Core(
        projections=_delta_projections(part, keys, values, heads),
        rows=(
            Row(name="conv.input", per_token=2 * keys + values),
            *_delta_gates(heads),
            Row(name="query and key normalised", per_token=2 * keys),
            Row(name="query and key rstd", per_token=2 * k_heads, dtype="float32"),
            Row(name="value", per_token=values),
            Row(name="cumulated decay", per_token=heads, dtype="float32"),
            Row(name="solved system", per_token=heads * DELTA_CHUNK),
            *_gated_norm(values, heads),
        ),
        out_name="out_proj",
        out_width=values,
        work=heads * per_head + values,
        work_fp32=4 * heads,
        source="fla-core@0.6.0:ops/gated_delta_rule/chunk.py:ChunkGatedDeltaRuleFunction.forward",
    )


def _torch_gated_delta(part: spec.GatedDeltaNet, split: int, *, autocast: bool = False) -> Core:
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
    _k_heads, heads, keys, values = _delta_sizes(part, split)
    key, value = part.k_head_dim, part.v_head_dim
    state = key * value // DELTA_CHUNK
    wide, narrow = 8 * key + 3 * value + 5 * DELTA_CHUNK + state + 7, 0
    if autocast:
        wide = 6 * key + 2 * value + 2 * DELTA_CHUNK + state + 7
        narrow = 7 * key + 2 * value + 3 * DELTA_CHUNK + 2 * state
    return Core(
        projections=_delta_projections(part, keys, values, heads),
        rows=(
            Row(name="conv.input", per_token=2 * keys + values),
            Row(name="conv.output", per_token=2 * keys + values),
            *_delta_gates(heads),
            Row(name="chunks", per_token=heads * wide, dtype="float32"),
            Row(name="chunks, narrow copies", per_token=heads * narrow),
            *_gated_norm(values, heads),
        ),
        out_name="out_proj",
        out_width=values,
        work=values,
        work_fp32=heads * (5 * key + 2 * value + DELTA_CHUNK),
        source="transformers@5.23.0:models/qwen3_next/modeling_qwen3_next.py:torch_chunk_gated_delta_rule",
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
    return Core(
        projections=(("q_proj", width), ("k_proj", width), ("v_proj", width), ("f_a_proj", part.gate_rank), *gate),
        rows=(
            Row(name="conv.input", per_token=3 * width),
            Row(name="query and key normalised", per_token=2 * width),
            Row(name="query and key rstd", per_token=2 * heads, dtype="float32"),
            Row(name="value", per_token=width),
            Row(name="beta", per_token=heads),
            *(Row(name=name, per_token=width, dtype="float32") for name in wide),
            Row(name="forget gate after softplus", per_token=width, dtype="float32", trained=True),
            Row(name="forget gate mask", per_token=width, dtype="bool"),
            Row(name="inputs of the gates' second halves", per_token=part.gate_rank + (rank or 0), trained=True),
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
    heads, groups = part.num_heads // split, max(1, part.num_groups // split)
    inner = heads * part.head_dim
    mixed = inner + 2 * groups * part.state_size
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


_CORES: dict[tuple[type, str], Callable[[Any, int], Core]] = {
    (spec.ShortConvolution, "packages"): _short_convolution,
    (spec.ShortConvolution, "torch"): _short_convolution,
    (spec.GatedDeltaNet, "packages"): _gated_delta,
    (spec.GatedDeltaNet, "torch"): _torch_gated_delta,
    (spec.KimiDeltaAttention, "packages"): _kimi_delta,
    (spec.Mamba2, "packages"): _mamba2,
    (spec.Mamba, "packages"): _mamba,
}
RECURRENT = tuple({kind for kind, _kernels in _CORES})
