"""What a Mamba-2 layer keeps in Megatron-LM."""

from __future__ import annotations

from ullage.account.activations.saved import SavedTensor
from ullage.engines.megatron.defaults import Settings
from ullage.engines.megatron.shape import Sizes
from ullage.spec.model import Mamba2
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
