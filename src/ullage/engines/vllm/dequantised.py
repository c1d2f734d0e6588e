"""Whole matrices in plain numbers: kernels that multiply large batches by an unpacked copy of the weights."""

from __future__ import annotations

from ullage.account.weights import KEEP
from ullage.engines.vllm.defaults import Setup
from ullage.engines.vllm.loaded import quantization_of
from ullage.spec import model as spec

#: Bytes of an unpacked value: the copies are fp16 or bf16.
UNPACKED_BYTES = 2
#: AWQ unpacks from this many tokens on, exllama's GPTQ kernel above that many.
_AWQ_TOKENS, _GPTQ_TOKENS = 256, 0


def unpacks(setup: Setup) -> str:
    """Return how weights are unpacked for a large batch: ``fused`` (a fused projection at once), ``split`` or nothing.

    Rule: AWQ and GPTQ where Marlin does not run them: on AMD, below Ampere, or asked for by their plain names;
        bitsandbytes in 4 bits always, one projection at a time. GGUF multiplies packed blocks (but for i-quants).
    Source: vllm@0.14.0:vllm/model_executor/layers/quantization/awq.py:AWQLinearMethod.apply (256 tokens and more),
        awq_marlin.py:AWQMarlinConfig.override_quantization_method, utils/marlin_utils.py:query_marlin_supported_
        quant_types (compute capability 8.0), bitsandbytes.py:apply_bnb_4bit; csrc/quantization/gptq/q_gemm.cu:gptq_gemm
        (``temp_dq``, for any batch).
    """
    rules = quantization_of(setup)
    quantization = setup.job.model.quantization if rules is KEEP else rules
    if not isinstance(quantization, spec.Quantization):
        return ""
    formats = [rule.format.name for rule in quantization.rules if rule.format is not None]
    gpu, asked = setup.job.machine.gpu, setup.flag("quantization")
    no_marlin = gpu.vendor == "amd" or (gpu.compute_capability or (8, 0)) < (8, 0)
    if any(name.startswith("awq int4") for name in formats):
        return "fused" if (no_marlin or asked == "awq") and setup.tokens >= _AWQ_TOKENS else ""
    if any(name.startswith("gptq") for name in formats):
        return "fused" if (no_marlin or asked == "gptq") and setup.tokens > _GPTQ_TOKENS else ""
    return "split" if any(name.startswith("bnb") for name in formats) else ""


def _matrices(part: spec.Mixer | spec.FeedForward, hidden: int, tp: int, how: str) -> list[tuple[int, int, int]]:
    """Return (values of a token going in that are the block's own, coming out, values of the matrix)."""
    if isinstance(part, spec.DenseFFN):
        inner = part.intermediate_size // tp
        gate_up = (2 if part.gated else 1) * inner
        return [(0, gate_up, hidden * (gate_up if how == "fused" else inner)), (inner, 0, inner * hidden)]
    if isinstance(part, spec.Attention):
        value = part.v_head_dim or part.head_dim
        queries = part.num_heads * part.head_dim * (2 if part.output_gate else 1) // tp
        heads = max(part.num_kv_heads // tp, 1)
        fused, out = queries + heads * (part.head_dim + value), part.num_heads * value // tp
        return [(0, fused, hidden * (fused if how == "fused" else queries)), (out, 0, out * hidden)]
    return []


def unpacked_bytes(setup: Setup, part: spec.Mixer | spec.FeedForward, tp: int, element: int) -> int:
    """Return what a block holds beyond its hidden states while it multiplies by an unpacked matrix; 0 if it does not.

    Formula: max over the block's matrices of T x (in + out) x e + in x out x 2.
    Symbols: T tokens, in and out the widths of a rank; hidden states are counted with the layer.
    """
    how = unpacks(setup)
    if not how:
        return 0
    moments = [
        setup.tokens * (own + out) * element + matrix * UNPACKED_BYTES
        for own, out, matrix in _matrices(part, setup.job.model.hidden_size, tp, how)
    ]
    return max(moments, default=0)
