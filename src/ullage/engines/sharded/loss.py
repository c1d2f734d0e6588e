"""The last part of a step: final norm, output head and loss, as frameworks write them.

n tokens, V vocabulary rows on this rank, h hidden size, e bytes of the compute dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from ullage.account.activations import graph as graphs
from ullage.account.activations.graph import Graph, Kept
from ullage.account.timeline import Buffer, Timeline
from ullage.engines.sharded import preference
from ullage.units import cdiv

LossKind = Literal[
    "plain", "compiled", "compiled_chunks", "vocab_parallel", "listed_chunks", "chunked", "fused", "native", "rows",
    "full", "tiled", "unused", "inplace",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LossPlan:
    """Final norm, head and loss of one micro-batch.

    Attributes:
        kind: "plain" cross_entropy(logits.float()); "compiled" the same through torch.compile (logits are read and
            their gradient written, nothing in fp32 is stored); "compiled_chunks" the same over a list of chunks, whose
            logits go one after the other; "vocab_parallel" torch's loss-parallel functions;
            "native" cross_entropy in the dtype of the logits; "listed_chunks" head and loss in chunks that all stay
            (litgpt); "chunked" forward and backward of one chunk at a time (torchtitan, torchtune); "fused" no logits
            kept (Liger); "rows", "full", "tiled", "inplace", "unused": :mod:`ullage.engines.sharded.preference`.
        norm: graph of the final norm.
        head: graph of the head for the whole micro-batch (its ops stand for chunks too).
        num_tokens, vocab: rows and columns of the logits on this rank; num_rows: sequences that they are of.
        element_bytes: of the logits as the head makes them.
        widened: the framework hands logits on in fp32 (Lightning Fabric's convert_output).
        num_chunks: for the chunked kinds; compiled: the loss of a chunk is compiled, and stores nothing in fp32.
        logits_held: the caller keeps the logits until the next forward pass has made new ones.
        upcast: the model returns fp32 logits (Transformers before 4.45 and with labels).
        returned: the model's output object holds the logits until the step is over (Transformers).
        shift_copies: Transformers' shifted contiguous copy of the fp32 logits.
    """

    kind: LossKind
    norm: Graph | None
    head: Graph
    num_tokens: int
    vocab: int
    num_rows: int = 1
    widened: bool = False
    element_bytes: int = 2
    num_chunks: int = 1
    compiled: bool = False
    logits_held: bool = False
    upcast: bool = False
    shift_copies: bool = False
    returned: bool = False


@dataclass
class LossState:
    """What is alive between the loss's forward and backward."""

    norm: Kept | None = None
    head: Kept | None = None
    buffers: dict[str, Buffer] = field(default_factory=dict)
    held: list[Buffer] = field(default_factory=list)


def forward(plan: LossPlan, timeline: Timeline, x: Buffer, before: list[Buffer]) -> LossState:
    """Run norm, head and loss; ``before`` are logits the caller still holds from the last micro-batch."""
    state = LossState()
    h = x.hold()
    if plan.norm is not None:
        out, state.norm = graphs.forward(plan.norm, timeline, x)
        timeline.drop(h)
        h = out
    if plan.kind in ("chunked", "fused", "tiled"):
        state.buffers["hidden"] = h
        return state
    logits, state.head = graphs.forward(plan.head, timeline, h, category="activations")
    timeline.drop(h)
    if plan.widened:
        wide = timeline.take("logits", 4 * plan.num_tokens * plan.vocab)
        timeline.drop(logits)
        logits = wide
    for buffer in before:
        timeline.drop(buffer)
    before.clear()
    _FORWARDS[plan.kind](plan, timeline, state, logits)
    return state


def backward(
    plan: LossPlan,
    timeline: Timeline,
    state: LossState,
    on_weight_grad: Callable[[Buffer], None],
    *,
    before_head: Callable[[], None] = lambda: None,
) -> Buffer | None:
    """Run the backward pass of loss, head and norm; return the gradient of the last block's output.

    ``before_head`` is called when the gradient of the model's output is there.
    """
    if plan.kind in ("chunked", "fused"):
        grad: Buffer | None = _chunks(plan, timeline, state, on_weight_grad)
    elif plan.kind == "unused":
        grad = preference.unused_backward(plan, timeline, state)
        before_head()
    elif plan.kind == "tiled":
        grad, weight_grads = preference.tiled_backward(plan, timeline, state)
        for buffer in weight_grads:
            on_weight_grad(buffer)
    else:
        logits_grad = _BACKWARDS[plan.kind](plan, timeline, state)
        before_head()
        assert state.head is not None
        grad = graphs.backward(plan.head, timeline, state.head, logits_grad, on_weight_grad=on_weight_grad)
    before_head()
    if plan.norm is not None and state.norm is not None and grad is not None:
        grad = graphs.backward(plan.norm, timeline, state.norm, grad, on_weight_grad=on_weight_grad)
    if not plan.logits_held:
        for buffer in state.held:
            timeline.drop(buffer)
        state.held.clear()
    return grad


def _sizes(plan: LossPlan) -> tuple[int, int]:
    """Bytes of the logits in the head's dtype and in fp32."""
    values = plan.num_tokens * plan.vocab
    return values * plan.element_bytes, values * 4


def _plain_forward(plan: LossPlan, timeline: Timeline, state: LossState, logits: Buffer) -> None:
    """Cast to fp32, log-softmax (kept), nll. Transformers adds a shifted copy and returns the fp32 logits.

    Source: torchtitan@9dec370:train.py:loss_fn; torch@2.13.0:aten/src/ATen/native/LossNLL.cpp:cross_entropy_loss;
        transformers@4.38.2:models/llama/modeling_llama.py:LlamaForCausalLM.forward.
    """
    _small, wide = _sizes(plan)
    fp32 = timeline.take("logits", wide)
    if plan.upcast:
        timeline.drop(logits)
        logits = fp32.hold()
    inputs = timeline.take("logits", wide) if plan.shift_copies else fp32.hold()
    state.buffers["log_softmax"] = timeline.take("logits", wide)
    timeline.drop(inputs)
    timeline.drop(fp32)
    if plan.logits_held or plan.returned:
        state.held.append(logits)
    else:
        timeline.drop(logits)


def _plain_backward(plan: LossPlan, timeline: Timeline, state: LossState) -> Buffer:
    """Nll's gradient fp32, log-softmax's fp32, then the cast to the head's dtype."""
    small, wide = _sizes(plan)
    nll = timeline.take("logits_gradient", wide)
    grad = timeline.take("logits_gradient", wide)
    timeline.drop(nll)
    timeline.drop(state.buffers.pop("log_softmax"))
    if plan.shift_copies:
        whole = timeline.take("logits_gradient", wide)
        timeline.drop(grad)
        grad = whole
    narrow = timeline.take("logits_gradient", small)
    timeline.drop(grad)
    return narrow


def _parallel_forward(plan: LossPlan, timeline: Timeline, state: LossState, logits: Buffer) -> None:
    """Loss over a split vocabulary: shifted logits, their exponential, then log-probabilities (kept).

    Source: torch@2.13.0:torch/distributed/tensor/parallel/loss.py:_log_softmax, _nll_loss_forward.
    """
    _small, wide = _sizes(plan)
    fp32 = timeline.take("logits", wide)
    shifted = timeline.take("logits", wide)
    timeline.brief("logits", wide)
    state.buffers["log_softmax"] = timeline.take("logits", wide)
    timeline.drop(shifted)
    timeline.drop(fp32)
    timeline.drop(logits)


def _parallel_backward(plan: LossPlan, timeline: Timeline, state: LossState) -> Buffer:
    """One-hot gradient, exponential of the log-probabilities, their sum, times the incoming gradient.

    Source: torch@2.13.0:torch/distributed/tensor/parallel/loss.py:_nll_loss_and_log_softmax_backward.
    """
    small, wide = _sizes(plan)
    one_hot = timeline.take("logits_gradient", wide)
    exponential = timeline.take("logits_gradient", wide)
    summed = timeline.take("logits_gradient", wide)
    timeline.drop(exponential)
    grad = timeline.take("logits_gradient", wide)
    timeline.drop(summed)
    timeline.drop(one_hot)
    timeline.drop(state.buffers.pop("log_softmax"))
    narrow = timeline.take("logits_gradient", small)
    timeline.drop(grad)
    return narrow


def _compiled_forward(plan: LossPlan, timeline: Timeline, state: LossState, logits: Buffer) -> None:
    """Only the logits and two numbers per row stay."""
    state.buffers["logits"] = logits
    state.buffers["rows"] = timeline.take("logits", 8 * plan.num_tokens)


def _compiled_backward(plan: LossPlan, timeline: Timeline, state: LossState) -> Buffer:
    """The gradient is written in the head's dtype straight from the logits."""
    grad = timeline.take("logits_gradient", _sizes(plan)[0])
    timeline.drop(state.buffers.pop("logits"))
    timeline.drop(state.buffers.pop("rows"))
    return grad


def _compiled_chunks_backward(plan: LossPlan, timeline: Timeline, state: LossState) -> Buffer:
    """The backward pass of every chunk's loss frees its logits before the next chunk's gradient is made.

    Source: torchtune@0.6.1:torchtune/modules/loss/ce_chunked_output_loss.py, recipes/lora_finetune_single_device.py
        (``del logits``); torch@2.13.0:torch/csrc/autograd/engine.cpp (later nodes first: all losses before the head).
    """
    timeline.brief("logits_gradient", cdiv(_sizes(plan)[0], plan.num_chunks))
    timeline.drop(state.buffers.pop("logits"))
    timeline.drop(state.buffers.pop("rows"))
    return timeline.take("logits_gradient", _sizes(plan)[0])


def _native_forward(plan: LossPlan, timeline: Timeline, state: LossState, logits: Buffer) -> None:
    """Log-softmax in the dtype of the logits, kept; the logits stay while the caller holds them, a shifted copy not.

    Source: litgpt@26857050:litgpt/utils.py:chunked_cross_entropy, litgpt/finetune/lora.py:fit.
    """
    shifted = timeline.take("logits", _sizes(plan)[0] if plan.shift_copies else 0)
    state.buffers["log_softmax"] = timeline.take("logits", _sizes(plan)[0])
    timeline.drop(shifted)
    if plan.logits_held:
        state.held.append(logits)
    else:
        timeline.drop(logits)


def _native_backward(plan: LossPlan, timeline: Timeline, state: LossState) -> Buffer:
    """Chunk by chunk where the loss is chunked; gradients of all chunks meet at the head."""
    size = cdiv(_sizes(plan)[0], plan.num_chunks)
    nll = timeline.take("logits_gradient", size)
    grad = timeline.take("logits_gradient", size)
    timeline.drop(nll)
    timeline.drop(grad)
    timeline.drop(state.buffers.pop("log_softmax"))
    return timeline.take("logits_gradient", plan.head.ops[-1].num_bytes)


def _chunks(plan: LossPlan, timeline: Timeline, state: LossState, on_weight_grad: Callable[[Buffer], None]) -> Buffer:
    """Head and loss forward and backward, one chunk at a time; the gradient of the hidden states is collected.

    Source: torchtitan@b5bcd76:torchtitan/components/loss.py:ChunkedCELoss; liger-kernel@0.6.3:
        ops/fused_linear_cross_entropy.py:fused_linear_cross_entropy_forward.
    """
    hidden = state.buffers.pop("hidden")
    grad = timeline.take("activation_gradients", hidden.num_bytes)
    small, wide = _sizes(plan)
    small, wide = cdiv(small, plan.num_chunks), 0 if plan.compiled else cdiv(wide, plan.num_chunks)
    weight = [op.weight_grad_bytes for op in plan.head.ops if op.weight_grad_bytes]
    total = [timeline.take("unsharded_gradients", size * (2 if plan.kind == "chunked" else 1)) for size in weight]
    for _chunk in range(min(plan.num_chunks, 2)):
        logits = timeline.take("logits", small)
        kept = timeline.take("logits", wide if plan.kind == "chunked" else 0)
        first = timeline.take("logits_gradient", wide if plan.kind == "chunked" else 0)
        second = timeline.take("logits_gradient", wide if plan.kind == "chunked" else 0)
        timeline.drop(first)
        timeline.drop(kept)
        narrow = timeline.take("logits_gradient", small if plan.kind == "chunked" else 0)
        timeline.drop(second)
        for size in weight:
            timeline.brief("unsharded_gradients", size)
        timeline.drop(narrow)
        timeline.drop(logits)
    for buffer in total:
        on_weight_grad(buffer)
    timeline.drop(hidden)
    return grad


_FORWARDS: dict[str, Callable[[LossPlan, Timeline, LossState, Buffer], None]] = {
    "plain": _plain_forward,
    "compiled": _compiled_forward,
    "compiled_chunks": _compiled_forward,
    "vocab_parallel": _parallel_forward,
    "native": _native_forward,
    "listed_chunks": _native_forward,
    "rows": preference.rows_forward,
    "full": preference.full_forward,
    "unused": preference.unused_forward,
    "inplace": preference.in_place_forward,
}
_BACKWARDS: dict[str, Callable[[LossPlan, Timeline, LossState], Buffer]] = {
    "plain": _plain_backward,
    "compiled": _compiled_backward,
    "compiled_chunks": _compiled_chunks_backward,
    "vocab_parallel": _parallel_backward,
    "native": _native_backward,
    "listed_chunks": _native_backward,
    "rows": preference.rows_backward,
    "full": preference.full_backward,
    "inplace": preference.in_place_backward,
}
