"""Peaks of single kernels and small modules, forward and backward with gradients that are accumulated.

All count what is alive at the worst point of one iteration after the first: inputs, the gradient of the output, kept
gradients, what the graph retains, and the temporaries of the node that runs. Each function returns bytes without the
library's workspaces. Checked against published benchmark tables (docs/training.md).
"""

from __future__ import annotations

from ullage.account.activations.logits import liger_chunk
from ullage.frozen import Frozen
from ullage.units import cdiv


class FfnSizes(Frozen):
    """Bytes of one gated block: a token-by-hidden tensor, a token-by-intermediate tensor, one weight."""

    hidden_bytes: int
    inner_bytes: int
    weight_bytes: int


def cross_entropy_peak(num_tokens: int, vocab_size: int, *, in_place: bool, element_bytes: int = 4) -> int:
    """Return the peak of a cross entropy on logits that require a gradient.

    Formula: PyTorch: logits + log-softmax + its gradient + new gradient + kept gradient = 5 bsV;
        in place: the kernel writes the gradient over the logits, and the kept gradient is a copy = 2 bsV.
    Known error: where autograd takes over the storage instead of copying it, in place needs 1 bsV.
    Source: torch@2.13.0:torch/nn/functional.py:cross_entropy; liger-kernel@0.6.3:ops/cross_entropy.py:
        cross_entropy_forward (X is overwritten).
    """
    return (2 if in_place else 5) * num_tokens * vocab_size * element_bytes + 8 * num_tokens


def fused_linear_cross_entropy_peak(
    num_tokens: int, vocab_size: int, hidden_size: int, *, element_bytes: int = 2
) -> int:
    """Return the peak of Liger's fused linear cross entropy with a trained head.

    Formula: head, its kept gradient, the new one and the product of a chunk 4hV + input, its new and kept gradient
        3bsh + one chunk of logits, its fp32 copy and the gradient's cast back, cV (2 + 4 + 2).
    Source: liger-kernel@0.6.3:ops/fused_linear_cross_entropy.py:fused_linear_cross_entropy_forward.
    """
    chunk = liger_chunk(num_tokens, vocab_size, hidden_size)
    head = vocab_size * hidden_size * element_bytes
    return 4 * head + 3 * num_tokens * hidden_size * element_bytes + chunk * vocab_size * (2 * element_bytes + 4)


def linear_cross_entropy_peak(num_tokens: int, vocab_size: int, hidden_size: int, *, element_bytes: int = 2) -> int:
    """Return the peak of a linear head followed by PyTorch's cross entropy in the same dtype.

    Formula: log-softmax, its gradient and the gradient of the logits 3bsV + input and kept gradient 2bsh + head and
        kept gradient 2hV, and the product that is added to it hV.
    Source: torch@2.13.0:tools/autograd/derivatives.yaml (_log_softmax, nll_loss_forward, mm).
    """
    logits = num_tokens * vocab_size * element_bytes
    head = vocab_size * hidden_size * element_bytes
    return 3 * logits + 2 * num_tokens * hidden_size * element_bytes + 3 * head


def norm_peak(num_rows: int, size: int, *, element_bytes: int, num_multiprocessors: int = 0, vectors: int = 2) -> int:
    """Return the peak of a one-kernel norm (LayerNorm, GroupNorm) or softmax.

    Formula: input, output, its gradient, new and kept gradient = 5 x rows x size, + statistics 8 rows + Triton's
        partial sums of the weight's (and bias') gradient, one fp32 row per multiprocessor.
    Source: torch@2.13.0:aten/src/ATen/native/layer_norm.cpp; liger-kernel@0.6.3:ops/layer_norm.py:layer_norm_backward.
    """
    partial = num_multiprocessors * size * 4 * vectors
    return 5 * num_rows * size * element_bytes + 8 * num_rows + partial + 4 * vectors * size * element_bytes


def fused_add_norm_peak(num_rows: int, size: int, *, element_bytes: int, num_multiprocessors: int) -> int:
    """Return the peak of an RMSNorm that adds the residual in the same kernel.

    Formula: input and residual, sum and output, the gradients of both outputs, one new gradient that both inputs
        share, two kept ones = 9 x rows x size, + rstd 4 rows + partial sums of the weight's gradient.
    Source: liger-kernel@0.6.3:ops/fused_add_rms_norm.py:fused_add_rms_norm_backward.
    """
    return 9 * num_rows * size * element_bytes + 4 * num_rows + 4 * num_multiprocessors * size


def ffn_peak(sizes: FfnSizes, *, fused: bool, mode: str) -> int:
    """Return the peak of a gated feed-forward block (SwiGLU, GeGLU).

    Formula: h = bsh, I = bsI, w = one weight. Forward: 3w + 2h + the kept 4I (3I fused). Backward: 6w (weights and kept
        gradients) + the largest of: down projection 4h + one more I + w; product of gate and up 4h + 3I more (written
        out), first input projection 5h + 2I more + w (written out), sum of the inputs' gradients 7h + w.
        A fused kernel writes both gradients over what it kept.
    Source: liger-kernel@0.6.3:ops/swiglu.py:swiglu_backward; torch@2.13.0:tools/autograd/derivatives.yaml (mul, silu,
        mm); transformers@5.23.0:models/llama/modeling_llama.py:LlamaMLP.
    """
    hidden, inner, weight = sizes.hidden_bytes, sizes.inner_bytes, sizes.weight_bytes
    kept = 3 if fused else 4
    if mode == "forward":
        return 3 * weight + 2 * hidden + kept * inner
    moments = [4 * hidden + (kept + 1) * inner + weight, 7 * hidden + kept * inner + weight]
    if not fused:
        moments += [4 * hidden + 7 * inner, 5 * hidden + 6 * inner + weight]
    return 6 * weight + max(moments)


def tiled_ffn_peak(sizes: FfnSizes, num_shards: int, *, fused: bool, mode: str) -> int:
    """Return the peak of a gated block that runs over slices of the tokens and recomputes each in backward.

    Formula: with slices h' = h/n, I' = I/n. Forward without a graph: 3w + input + outputs so far + three inner tensors
        of a slice. Backward: 6w + input, output, its gradient, new and kept gradient 5h + a slice: down projection
        h' + 4I' fused or 5I' written out + w, or the product h' + 6I' (its graph is not retained).
    Source: liger-kernel@0.6.3:ops/tiled_mlp.py:LigerTiledMLPFunction; deepspeed@0.17:runtime/sequence_parallel/
        ulysses_sp.py:TiledMLP.
    """
    hidden, inner, weight = sizes.hidden_bytes, sizes.inner_bytes, sizes.weight_bytes
    part_hidden, part_inner = cdiv(hidden, num_shards), cdiv(inner, num_shards)
    if mode == "forward":
        outputs = hidden if fused else hidden - part_hidden
        return 3 * weight + hidden + outputs + 3 * part_inner
    if fused:
        return 6 * weight + 5 * hidden + part_hidden + 4 * part_inner + weight
    return 6 * weight + 5 * hidden + part_hidden + max(5 * part_inner + weight, 6 * part_inner)
