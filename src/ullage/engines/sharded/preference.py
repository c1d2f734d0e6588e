"""Losses on log-probabilities, and scalar heads, as allocations on a timeline.

The sizes are those of :mod:`ullage.account.activations.log_probs`, laid out in the order in which they come and go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ullage.account.activations.log_probs import TILE_ROWS, TILE_TOKENS
from ullage.account.timeline import Buffer, Timeline
from ullage.units import cdiv

if TYPE_CHECKING:
    from ullage.engines.sharded.loss import LossPlan, LossState


def _sizes(plan: LossPlan) -> tuple[int, int]:
    """Bytes of the logits as handed on, and of one row's."""
    size = plan.num_tokens * plan.vocab * (4 if plan.widened else plan.element_bytes)
    return size, cdiv(size, plan.num_rows)


def rows_forward(plan: LossPlan, timeline: Timeline, state: LossState, logits: Buffer) -> None:
    """Row by row: fp32 logits stay for logsumexp; narrow ones leave a log-softmax of every row.

    Source: trl@1.14.2:trainer/utils.py:selective_log_softmax.
    """
    size, row = _sizes(plan)
    if plan.widened:
        timeline.brief("logits", row)
        state.buffers["log_softmax"] = logits
    else:
        state.buffers["log_softmax"] = timeline.take("logits", size)
        timeline.drop(logits)


def rows_backward(plan: LossPlan, timeline: Timeline, state: LossState) -> Buffer:
    """The rows' gradients, stacked; with fp32 logits the gathered values' gradient besides, and the sum of both.

    Source: torch@2.13.0:torch/csrc/autograd/FunctionsManual.cpp:logsumexp_backward (three rows in one expression),
        autograd/input_buffer.cpp.
    """
    size, row = _sizes(plan)
    if not plan.widened:
        timeline.brief("logits_gradient", 2 * row)
        timeline.drop(state.buffers.pop("log_softmax"))
        rows = timeline.take("logits_gradient", size)
        stacked = timeline.take("logits_gradient", size)
        timeline.drop(rows)
        return stacked
    rows = timeline.take("logits_gradient", size - row)
    timeline.brief("logits_gradient", 3 * row)
    last = timeline.take("logits_gradient", row)
    timeline.drop(state.buffers.pop("log_softmax"))
    stacked = timeline.take("logits_gradient", size)
    timeline.drop(last)
    timeline.drop(rows)
    gathered = timeline.take("logits_gradient", size)
    total = timeline.take("logits_gradient", size)
    timeline.drop(gathered)
    timeline.drop(stacked)
    return _narrowed(plan, timeline, total)


def in_place_forward(plan: LossPlan, timeline: Timeline, state: LossState, logits: Buffer) -> None:
    """The logits stay.

    Source: verl@1dda039:verl/utils/torch_functional.py:logprobs_from_logits_flash_attn.
    """
    state.buffers["logits"] = logits


def in_place_backward(plan: LossPlan, timeline: Timeline, state: LossState) -> Buffer:
    """Their gradient is written over them."""
    return state.buffers.pop("logits")


def full_forward(plan: LossPlan, timeline: Timeline, state: LossState, logits: Buffer) -> None:
    """All at once: a contiguous copy of the shifted logits, and their log-softmax, which stays.

    Source: llamafactory@0.9.5:train/trainer_utils.py:get_batch_logps; trl@0.14.0:trainer/dpo_trainer.py.
    """
    size, _row = _sizes(plan)
    copy = timeline.take("logits", size if plan.num_rows > 1 else 0)
    state.buffers["log_softmax"] = timeline.take("logits", size)
    timeline.drop(copy)
    state.held.append(logits)


def full_backward(plan: LossPlan, timeline: Timeline, state: LossState) -> Buffer:
    """Gradient of the gathered values, of the log-softmax, then of the logits."""
    size, _row = _sizes(plan)
    for buffer in state.held:
        timeline.drop(buffer)
    state.held.clear()
    gathered = timeline.take("logits_gradient", size)
    grad = timeline.take("logits_gradient", size)
    timeline.drop(gathered)
    timeline.drop(state.buffers.pop("log_softmax"))
    return _narrowed(plan, timeline, grad)


def unused_forward(plan: LossPlan, timeline: Timeline, state: LossState, logits: Buffer) -> None:
    """Logits that nobody reads are dropped, and with them what the head kept.

    Source: trl@0.24.0:models/modeling_value_head.py:AutoModelForCausalLMWithValueHead.forward.
    """
    timeline.drop(logits)
    if state.head is not None:
        state.head.release(timeline)
        state.head = None


def unused_backward(plan: LossPlan, timeline: Timeline, state: LossState) -> Buffer:
    """The gradient of the hidden states, from the scores alone."""
    return timeline.take("activation_gradients", plan.head.input_bytes)


def _narrowed(plan: LossPlan, timeline: Timeline, grad: Buffer) -> Buffer:
    """Return the gradient as wide as the head made the logits."""
    if not plan.widened:
        return grad
    narrow = timeline.take("logits_gradient", plan.num_tokens * plan.vocab * plan.element_bytes)
    timeline.drop(grad)
    return narrow


def tiled_backward(plan: LossPlan, timeline: Timeline, state: LossState) -> tuple[Buffer, list[Buffer]]:
    """One tile of logits, fp32 gradients of hidden states and head, and their casts; no logits before.

    Source: trl@1.16.0:kernels/chunked_logprob.py:_ChunkedLogProbFunction.backward.
    """
    hidden = state.buffers.pop("hidden")
    wide = timeline.take("activation_gradients", hidden.num_bytes * 4 // plan.element_bytes)
    weights = [op.weight_grad_bytes for op in plan.head.ops if op.weight_grad_bytes]
    sums = [timeline.take("unsharded_gradients", size * 4 // plan.element_bytes) for size in weights]
    timeline.brief("logits", min(plan.num_tokens, TILE_TOKENS) * min(plan.vocab, TILE_ROWS) * plan.element_bytes)
    grad = timeline.take("activation_gradients", hidden.num_bytes)
    grads = [timeline.take("unsharded_gradients", size) for size in weights]
    for buffer in (wide, *sums, hidden):
        timeline.drop(buffer)
    return grad, grads
