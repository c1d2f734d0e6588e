"""Unsloth's losses: one that writes the gradient over the logits, Apple's without logits, and one in chunks."""

from __future__ import annotations

import math

from ullage.engines.unsloth.rules import CHUNKS_CAPPED, CHUNKS_OF_FREE, Rules
from ullage.frozen import Frozen
from ullage.spec.training import TrainingJob
from ullage.units import GiB, cdiv, dtype_bytes

#: Multiples of chunks. Source: unsloth-zoo@ce232d6c:fused_losses/cross_entropy_loss.py:get_chunk_size.
STEP = 4
#: Of the free memory, and at most from 2026-07 on; before 2025-09 a fixed size.
#: Source: unsloth-zoo@ce232d6c:fused_losses/cross_entropy_loss.py:_get_chunk_multiplier; @fc29e051 (target_gb = 1).
SHARE = 0.5
CAP_BYTES = 4 * GiB
FIXED_BYTES = 1 * GiB


class LossMemory(Frozen):
    """What a loss takes beside the head's input, at its fullest; ``head_grad_bytes`` of it stays when it is done."""

    num_bytes: int
    low_bytes: int
    high_bytes: int
    head_grad_bytes: int
    formula: str
    source: str


def loss_memory(job: TrainingJob, rules: Rules, *, free_bytes: tuple[int, int, int]) -> LossMemory:
    """Return what the loss takes.

    Args:
        job: the job.
        rules: which loss.
        free_bytes: free on the GPU when the first loss is computed: expected, least and most.
    """
    head = _head_gradient(job)
    if rules.loss == "in_place":
        return _in_place(job, head)
    if rules.loss == "cut":
        return _cut(job, head)
    return _chunked(job, rules, head, free_bytes)


def _in_place(job: TrainingJob, head: int) -> LossMemory:
    """Logits in the compute dtype, whose gradient is written over them.

    Formula: nV + with a trained head the gradient of its weight, Vh; the gradient of the head's input takes the place
        of that input, which only a trained head keeps.
    Source: unsloth@659889c5:kernels/cross_entropy_loss.py:Fast_CrossEntropyLoss.backward (returns logits); models/
        llama.py:_CausalLM_fast_forward (no fp32 copy, labels are shifted).
    """
    tokens, width = job.micro_batch_size * job.seq_len, int(dtype_bytes(job.precision.compute))
    hidden = tokens * job.model.hidden_size * width if head else 0
    size = tokens * job.model.vocab_size * width + head + hidden
    return LossMemory(
        num_bytes=size,
        low_bytes=size,
        high_bytes=size,
        head_grad_bytes=head,
        formula=f"{tokens:,} tokens x {job.model.vocab_size:,} logits x {width}, gradient in place",
        source="unsloth@659889c5:kernels/cross_entropy_loss.py:Fast_CrossEntropyLoss",
    )


def _cut(job: TrainingJob, head: int) -> LossMemory:
    """Cut cross entropy: no logits, the gradient of the head's input in the backward, and of a trained head.

    Formula: nh + Vh + two fp32 values a token.
    Source: unsloth-zoo@e5aab212:loss_utils.py:fused_linear_cross_entropy; ml-cross-entropy@af5f96a:cut_cross_entropy/
        cce_backward.py:cce_backward_kernel (zeros_like e and c).
    """
    tokens, width = job.micro_batch_size * job.seq_len, int(dtype_bytes(job.precision.compute))
    size = tokens * job.model.hidden_size * width + head + 8 * tokens
    return LossMemory(
        num_bytes=size,
        low_bytes=size,
        high_bytes=size,
        head_grad_bytes=head,
        formula="gradient of the head's input, no logits",
        source="ml-cross-entropy@af5f96a:cut_cross_entropy/cce_backward.py",
    )


def _chunked(job: TrainingJob, rules: Rules, head: int, free: tuple[int, int, int]) -> LossMemory:
    """Forward and backward of the head and the loss, a chunk of tokens at a time, compiled.

    Formula: gradient of the head's input nh + a chunk's logits cV, over which their gradient is written, and its own
        gradient ch; with a trained head its gradient Vh and a chunk's, Vh. At most logits and gradient, 2cV.
    Source: unsloth-zoo@ce232d6c:fused_losses/cross_entropy_loss.py:UnslothFusedLoss.forward (grad_and_value);
        torch@2.13.0:torch/_inductor/codegen/wrapper.py (reuse of the product's buffer), as compiled for this function.
    Known error: where compiling fails a chunk takes 14 bytes per logit (16-bit logits, fp32 copy and log-softmax,
        their gradients).
    """
    tokens, width = job.micro_batch_size * job.seq_len, int(dtype_bytes(job.precision.compute))
    hidden, vocab = job.model.hidden_size, job.model.vocab_size
    chunks = [num_chunks(rules, tokens, vocab, one) for one in free]
    rows = [cdiv(tokens, count) for count in chunks]
    base = tokens * hidden * width + 2 * head
    sizes = [base + row * (vocab + hidden) * width for row in rows]
    return LossMemory(
        num_bytes=sizes[0],
        low_bytes=min(sizes),
        high_bytes=base + max(rows) * (2 * vocab + hidden) * width,
        head_grad_bytes=head,
        formula=f"{chunks[0]} chunks of {rows[0]:,} tokens x {vocab:,} logits x {width}",
        source="unsloth-zoo@ce232d6c:fused_losses/cross_entropy_loss.py:UnslothFusedLoss",
    )


def num_chunks(rules: Rules, num_tokens: int, vocab_size: int, free_bytes: int) -> int:
    """Return into how many chunks the loss is cut: fp32 logits over a target, in fours.

    Source: unsloth-zoo@fc29e051:fused_losses/cross_entropy_loss.py:get_chunk_size (rounded to the nearest multiple,
        one at least), @d9fe1f43 (rounded up). The target is measured once, at the first loss.
    """
    target = max(1.0, SHARE * free_bytes) if rules.version >= CHUNKS_OF_FREE else float(FIXED_BYTES)
    if rules.version >= CHUNKS_CAPPED:
        exact = num_tokens * vocab_size * 4 / min(target, float(CAP_BYTES))
        return 1 if exact <= 1 else min(num_tokens, math.ceil(exact / STEP) * STEP)
    return min(num_tokens, max(1, round(num_tokens * vocab_size * 4 / target / STEP) * STEP))


def _head_gradient(job: TrainingJob) -> int:
    """Return the gradient of the head's weight, where it is trained."""
    if job.lora is None or "lm_head" not in job.lora.trained_modules:
        return 0
    return int(job.model.vocab_size * job.model.hidden_size * dtype_bytes(job.precision.compute))
