"""The output head and the loss: the largest single tensors of many jobs, and gone a moment later."""

from __future__ import annotations

from typing import Literal

from ullage.account.activations.saved import ALLOCATOR_BLOCK_BYTES
from ullage.frozen import Frozen
from ullage.units import cdiv, dtype_bytes, round_up

Upcast = Literal["none", "head", "loss"]


class LossRecipe(Frozen):
    """How logits become a loss, as far as it decides what is alive.

    Attributes:
        kind: plain (cross entropy of PyTorch), fused (a kernel that writes the gradient over its input), chunked (the
            head is applied to a slice of the tokens at a time), liger (fused linear cross entropy), tiled (as
            :mod:`ullage.account.activations.log_probs` counts it).
        upcast: where logits become fp32: in the model's forward, in the loss function (the 16-bit logits stay), never.
        shift_copies: the shifted logits are a copy of their own.
        num_chunks: of a chunked loss.
        logits_scaled: the head's output is divided by a constant, which makes one more copy in the compute dtype.
        compiled: torch.compile fuses cast, shift and log-softmax: logits and their gradient in the compute dtype.
    """

    kind: Literal["plain", "fused", "chunked", "liger", "tiled"] = "plain"
    upcast: Upcast = "loss"
    shift_copies: bool = True
    num_chunks: int = 8
    logits_scaled: bool = False
    compiled: bool = False


class LossPeak(Frozen):
    """Bytes alive at the worst point of the loss, and how they are made up.

    Attributes:
        forward_bytes: while the loss is computed; backward_bytes: while its gradient is.
        head_grad_bytes: gradient of the head's weight that a fused linear loss makes in the forward pass already.
        kept_bytes: what stays from forward to backward.
        formula: of ``forward_bytes``; backward_formula: of ``backward_bytes``, where that is another.
    """

    forward_bytes: int
    backward_bytes: int
    kept_bytes: int
    formula: str
    source: str
    head_grad_bytes: int = 0
    backward_formula: str = ""


def loss_peak(
    recipe: LossRecipe,
    *,
    num_tokens: int,
    vocab_size: int,
    hidden_size: int,
    compute_dtype: str,
    vocab_parallel_size: int = 1,
    head_trained: bool = True,
) -> LossPeak:
    """Return what the loss of ``num_tokens`` tokens needs beside the head's input.

    Formula: plain, upcast in the loss function: bsV x (16-bit logits + fp32 copy 4 + shifted copy 4 + log-softmax 4);
        backward: log-softmax 4 + gradient of the negative log likelihood 4 + gradient of the logits 4 = 12 bsV.
        fused: the kernel writes the gradient over its input, so log-softmax and the gradients drop out.
        liger: chunks of the logits and their fp32 copy, gradient of the input 2bsh and of the head.
    Symbols: V is the share of the vocabulary of a vocabulary-parallel rank.
    Source: transformers@4.48.1:loss/loss_utils.py:ForCausalLMLoss, @4.45.2:models/llama/modeling_llama.py:forward;
        torch@2.13.0:aten/src/ATen/native/cuda/SoftMax.cu; liger-kernel@0.6.3:ops/fused_linear_cross_entropy.py.
    Known error: below 0.1 % against published peaks of 7B to 8B models (docs/training.md).
    """
    if recipe.kind == "liger":
        return _liger(num_tokens, vocab_size, hidden_size, compute_dtype, head_trained)
    if recipe.kind == "chunked":
        return _chunked(recipe, num_tokens, vocab_size, hidden_size, compute_dtype)
    num_logits = num_tokens * cdiv(vocab_size, vocab_parallel_size)
    if recipe.compiled:
        return _compiled(num_tokens, num_logits, int(dtype_bytes(compute_dtype)))
    return _plain_or_fused(recipe, num_tokens, num_logits, int(dtype_bytes(compute_dtype)))


def _plain_or_fused(recipe: LossRecipe, num_tokens: int, num_logits: int, width: int) -> LossPeak:
    """Return the peak of a loss on all logits at once: the copies that stand beside each other."""
    plain = recipe.kind == "plain"
    if recipe.upcast == "none":
        copies = [("logits", width)] + ([("log-softmax", width)] if plain else [])
        backward = [("log-softmax", width), ("its gradient", width)] if plain else []
        backward += [("gradient of the logits", width)]
    else:
        narrow = width if width < 4 else 0
        copies = [("logits", narrow)] if recipe.upcast == "loss" and narrow else []
        copies += [("logits as fp32", 4)]
        copies += [("shifted copy", 4)] if recipe.shift_copies else []
        copies += [("log-softmax", 4)] if plain else []
        backward = [("log-softmax", 4), ("its gradient", 4)] if plain else [("logits", narrow)] if narrow else []
        backward += [("gradient of the logits", 4)]
    per_logit, of_backward = (sum(size for _name, size in each) for each in (copies, backward))
    shape = f"{num_tokens:,} tokens x {num_logits // max(1, num_tokens):,}"
    made_of, undone = (" + ".join(f"{name} {size}" for name, size in each) for each in (copies, backward))
    return LossPeak(
        forward_bytes=_bytes(num_logits * per_logit),
        backward_bytes=_bytes(num_logits * of_backward),
        kept_bytes=_bytes(num_logits * (4 if plain or recipe.upcast != "none" else width)),
        formula=f"{shape} x ({made_of})",
        backward_formula=f"{shape} x ({undone})",
        source="transformers@4.48.1:loss/loss_utils.py:ForCausalLMLoss",
    )


def _compiled(num_tokens: int, num_logits: int, width: int) -> LossPeak:
    """Return the peak of a loss inside a compiled graph.

    Formula: the head's product stays, with the largest value and the logarithm of the sum of each row; backward writes
        the gradient from it: 2 x bsV in the compute dtype.
    Source: torch@2.13.0:torch/_functorch/partitioners.py:min_cut_rematerialization_partition, as run on ForCausalLMLoss
        (tests/contract/test_compiled_tables.py).
    """
    return LossPeak(
        forward_bytes=_bytes(num_logits * width) + _bytes(8 * num_tokens),
        backward_bytes=_bytes(2 * num_logits * width),
        kept_bytes=_bytes(num_logits * width),
        formula=f"{num_tokens:,} tokens x {num_logits // max(1, num_tokens):,} x logits {width}, compiled",
        source="torch@2.13.0:torch/_functorch/partitioners.py:min_cut_rematerialization_partition",
    )


def _liger(num_tokens: int, vocab_size: int, hidden_size: int, compute_dtype: str, head_trained: bool) -> LossPeak:
    """Return the peak of the fused linear cross entropy: forward computes the gradients chunk by chunk.

    Formula: chunk = next power of two of ceil(bs / ceil(V/h)); chunk x V logits (their gradient is written over them) +
        gradient of the input 2bsh + the larger of a chunk's product 2h and, with a trained head, the gradient of the
        head 2Vh beside its product of a chunk 2Vh and the fp32 copy of that 4Vh.
    Source: liger-kernel@0.6.3:ops/fused_linear_cross_entropy.py:fused_linear_cross_entropy_forward.
    Known error: versions before 0.6.3 and after 0.7 add the product in place: 6Vh less where the head is trained.
    """
    width = int(dtype_bytes(compute_dtype))
    chunk = liger_chunk(num_tokens, vocab_size, hidden_size)
    head = _bytes(vocab_size * hidden_size * width) if head_trained else 0
    hidden = _bytes(num_tokens * hidden_size * width)
    logits = _bytes(chunk * vocab_size * width)
    copy = _bytes(vocab_size * hidden_size * 4) if width < 4 else 0
    made = 2 * head + copy if head else _bytes(chunk * hidden_size * width)
    return LossPeak(
        forward_bytes=logits + _bytes(num_tokens * 4) + hidden + made,
        backward_bytes=hidden + head,
        kept_bytes=hidden + head,
        head_grad_bytes=head,
        formula=f"chunk of {chunk:,} tokens x {vocab_size:,} logits + gradient of the head's input"
        + (" + gradient of the head, product and fp32 copy" if head else ""),
        source="liger-kernel@0.6.3:ops/fused_linear_cross_entropy.py:fused_linear_cross_entropy_forward",
    )


def liger_chunk(num_tokens: int, vocab_size: int, hidden_size: int) -> int:
    """Return the tokens of one chunk: as many logits as the hidden states have elements, rounded to a power of two.

    Source: liger-kernel@0.6.3:ops/fused_linear_cross_entropy.py:fused_linear_cross_entropy_forward.
    """
    tokens = cdiv(num_tokens, cdiv(vocab_size, hidden_size))
    return min(num_tokens, 1 << max(0, tokens - 1).bit_length())


def _chunked(recipe: LossRecipe, num_tokens: int, vocab_size: int, hidden_size: int, compute_dtype: str) -> LossPeak:
    """Return the peak of a loss over slices of the logits; without recompute the slices' logits all stay.

    Source: torchtune@0.6.1:modules/loss/ce_chunked_output_loss.py:CEWithChunkedOutputLoss (fp32 one slice at a time).
    """
    width = int(dtype_bytes(compute_dtype))
    chunk = cdiv(num_tokens, max(1, recipe.num_chunks))
    logits = _bytes(num_tokens * vocab_size * width)
    return LossPeak(
        forward_bytes=logits + _bytes(num_tokens * vocab_size * 4) + _bytes(chunk * vocab_size * 4),
        backward_bytes=2 * logits + _bytes(num_tokens * vocab_size * 4),
        kept_bytes=logits + _bytes(num_tokens * vocab_size * 4),
        formula=f"{num_tokens:,} tokens x {vocab_size:,} x (logits {width} + log-softmax 4) + fp32 slice of {chunk:,}",
        source="torchtune@0.6.1:modules/loss/ce_chunked_output_loss.py:CEWithChunkedOutputLoss",
    )


def _bytes(num_bytes: int) -> int:
    """Round up to the allocator's block."""
    return round_up(num_bytes, ALLOCATOR_BLOCK_BYTES)
