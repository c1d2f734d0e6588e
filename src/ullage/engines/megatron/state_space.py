"""What state-space and linear-attention layers keep in Megatron-LM."""

from __future__ import annotations

from ullage.account.activations.saved import SavedTensor
from ullage.engines.megatron.defaults import Settings
from ullage.engines.megatron.shape import Sizes
from ullage.spec.model import GatedDeltaNet, Mamba2
from ullage.spec.training import TrainingJob

SOURCE = "Megatron-LM@d98e8a6:megatron/core/ssm/mamba_mixer.py:MambaMixer"


def mamba_saved(job: TrainingJob, settings: Settings, sizes: Sizes, part: Mamba2) -> list[SavedTensor]:
    """Norm and projections, and what the memory-efficient combined kernel keeps.

    Formula: 2*n*h + T*(2*I + 2*G*N + H)/t projected + T*I/t output of the scan, which the kernel's own output
        projection's input repeats; I inner size, G groups, N state size, H heads.
    Source: mamba_ssm@2.2:mamba_ssm/ops/triton/ssd_combined.py:MambaSplitConv1dScanCombinedFn.
    Known error: the states of chunks are left out.
    """
    n, tokens, h, t = sizes.stream_tokens, sizes.tokens, job.model.hidden_size, sizes.tensor
    dtype, inner = job.precision.compute, part.num_heads * part.head_dim
    projected = 2 * inner + 2 * part.num_groups * part.state_size + part.num_heads
    entries = (
        ("norm.input", n * h, dtype, "n*h"),
        ("norm.statistics", 2 * n, "float32", "2*n"),
        ("in_proj.input", n * h, dtype, "n*h"),
        ("in_proj.output", tokens * projected // t, dtype, "T*(2*I+2*G*N+H)/t"),
        ("scan.output", tokens * inner // t, dtype, "T*I/t"),
        ("out_proj.input", tokens * inner // t, dtype, "T*I/t"),
    )
    return [
        SavedTensor(name=name, module="mixer", num_elements=size, dtype=kind, formula=formula, source=SOURCE)
        for name, size, kind, formula in entries
    ]


def gated_delta_saved(job: TrainingJob, settings: Settings, sizes: Sizes, part: GatedDeltaNet) -> list[SavedTensor]:
    """Norm, projection, convolution, the chunked delta rule, gated norm and output projection.

    Formula: 2*n*h + T/t * (2K+2V+2Hv projected, 2K before their norm, 2*Hv*Dk and V into the kernel, 64*Hv of the
        kernel's chunks, V out, V normed); K, V key and value widths, Hv value heads. Known error: what the kernel
        keeps changes with its version: a range of 0.7 to 1.4.
    Source: Megatron-LM@d98e8a6:megatron/core/ssm/gated_delta_net/gdn.py:GatedDeltaNet.forward;
        flash-linear-attention@0.3:fla/ops/gated_delta_rule/chunk.py:ChunkGatedDeltaRuleFunction.
    """
    n, tokens, h, t = sizes.stream_tokens, sizes.tokens, job.model.hidden_size, sizes.tensor
    dtype = job.precision.compute
    keys, values, heads = part.num_k_heads * part.k_head_dim, part.num_v_heads * part.v_head_dim, part.num_v_heads
    entries = (
        ("gdn.norm.input", n * h, dtype, "n*h"),
        ("gdn.in_proj.input", n * h, dtype, "n*h"),
        ("gdn.in_proj.output", tokens * (2 * keys + 2 * values + 2 * heads) // t, dtype, "T*(2K+2V+2Hv)/t"),
        ("gdn.query_key", tokens * 2 * keys // t, dtype, "T*2K/t"),
        ("gdn.kernel_inputs", tokens * (2 * heads * part.k_head_dim + values) // t, dtype, "T*(2*Hv*Dk+V)/t"),
        ("gdn.gates", 2 * tokens * heads // t, "float32", "2*T*Hv/t"),
        ("gdn.chunks", tokens * 64 * heads // t, dtype, "64*T*Hv/t"),
        ("gdn.output", tokens * values // t, dtype, "T*V/t"),
        ("gdn.out_proj.input", tokens * values // t, dtype, "T*V/t"),
    )
    source = "Megatron-LM@d98e8a6:megatron/core/ssm/gated_delta_net/gdn.py:GatedDeltaNet.forward"
    return [
        SavedTensor(
            name=name,
            module="gdn_norm_out" if name == "gdn.out_proj.input" else "mixer",
            num_elements=size,
            dtype=kind,
            formula=formula,
            source=source,
        )
        for name, size, kind, formula in entries
    ]
