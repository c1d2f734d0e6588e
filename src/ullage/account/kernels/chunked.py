"""Losses on a linear head, chunk by chunk, with the gradients made in the forward pass.

Symbols: r rows (tokens), c rows of a chunk, h hidden size, V vocabulary, w bytes a value; a chunk's logits are cV.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ullage.account.activations.logits import liger_chunk
from ullage.account.kernels import ops
from ullage.account.kernels.tape import Backward, Tape, Tensor


def made_before(*, scaled: bool) -> Backward:
    """Hand out gradients of input and head that forward made; ``scaled``: their products with the loss's gradient."""

    def backward(t: Tape, kept: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        if scaled:
            return [t.empty(each.num_elements, each.width) for each in kept]
        return [each.detach() for each in kept]

    return backward


def liger_cross_entropy_head(
    t: Tape, x: Tensor, weight: Tensor, num_rows: int, vocab_size: int, *, version: tuple[int, ...], wide_sum: bool
) -> Tensor:
    """Liger's fused linear cross entropy.

    Args:
        t, x, weight, num_rows, vocab_size: the tape, the head's input and weight, tokens, vocabulary.
        version: of Liger: before 0.5 the logits are made fp32; before 0.6.2 the head's gradient is added up in
            place.
        wide_sum: the head's gradient is summed in fp32.

    Formula: gradients of head and input hVw + rhw + a chunk's logits cVw (before 0.5: + 4cV, and twice the gradient
        cVw) + the head's product hVw and its fp32 copy 4hV.
    Source: liger-kernel@0.4.2, @0.6.1, @0.8.0:ops/fused_linear_cross_entropy.py:fused_linear_cross_entropy_forward.
    """
    hidden = x.num_elements // num_rows
    chunk = liger_chunk(num_rows, vocab_size, hidden)
    input_grad = t.empty(x.num_elements, x.width)
    head_grad = t.empty(weight.num_elements, ops.WIDE if wide_sum else weight.width)
    losses = t.empty(num_rows, ops.WIDE)
    logits: Tensor | None = None
    scaled: Tensor | None = None
    for start in range(0, num_rows, chunk):
        rows = min(chunk, num_rows - start)
        logits = t.empty(rows * vocab_size, x.width)
        if version < (0, 5):
            logits = t.empty(rows * vocab_size, ops.WIDE)
            logits = t.empty(rows * vocab_size, x.width)
            scaled = t.empty(rows * vocab_size, x.width)
        t.brief(int(rows * hidden * x.width))
        if version >= (0, 6, 2):
            product = t.empty(weight.num_elements, weight.width)
            t.brief(weight.num_elements * ops.WIDE if weight.width < ops.WIDE else 0)
            del product
    if wide_sum:
        head_grad = t.empty(weight.num_elements, weight.width)
    made = t.empty(1, ops.WIDE)
    del losses, logits, scaled
    return t.record([x, weight], made, [input_grad, head_grad], made_before(scaled=False))


def whole_gradient_head(t: Tape, x: Tensor, weight: Tensor, num_rows: int, vocab_size: int) -> Tensor:
    """The linear cross entropy of cuTile: whole logits, whose gradient is written over them and kept.

    Formula: logits rVw (kept), gradient of the input rhw; backward: its product rhw, the head's gradient hVw.
    Source: liger-kernel@ead96b61:ops/cutile/ops/fused_linear_cross_entropy.py:fused_linear_cross_entropy_forward.
    """
    logits = t.empty(num_rows * vocab_size, x.width)
    input_grad = t.empty(x.num_elements, x.width)
    sizes = [(each.num_elements, each.width) for each in (x, weight)]

    def backward(t: Tape, kept: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [t.empty(size, width) for size, width in sizes]

    return t.record([x, weight], t.empty(1, ops.WIDE), [input_grad, logits, x], backward)


def liger_jensen_shannon_head(
    t: Tape, student: tuple[Tensor, Tensor], num_rows: int, vocab_size: int, *, wide: bool
) -> Tensor:
    """Liger's Jensen-Shannon divergence of two heads, chunk by chunk with gradients made in forward.

    ``wide``: from 0.4 on a chunk's tensors are fp32, and the head's product is a tensor of its own.

    Formula: loss of every value 4n + gradients of head and input + of one chunk (c rows): six to seven fp32 tensors
        of its logits 4cV, the product for the head's gradient.
    Source: liger-kernel@0.3.1, @0.8.0:ops/fused_linear_jsd.py:fused_linear_jsd_forward.
    """
    x, weight = student
    hidden = x.num_elements // num_rows
    chunk = liger_chunk(num_rows, vocab_size, hidden)
    head_grad = t.empty(weight.num_elements, weight.width)
    input_grad = t.empty(x.num_elements, x.width)
    values = t.empty(num_rows * vocab_size, ops.WIDE)
    held: dict[str, Tensor] = {}
    for start in range(0, num_rows, chunk):
        rows = min(chunk, num_rows - start)
        _divergence_chunk(t, held, rows * vocab_size, x.width, wide=wide)
        t.brief(int(rows * hidden * x.width))
        t.brief(weight.num_bytes if wide else 0)
    made = t.empty(1, ops.WIDE)
    del values, held
    return t.record([x, weight], made, [input_grad, head_grad], made_before(scaled=False))


def _divergence_chunk(t: Tape, held: dict[str, Tensor], size: int, narrow: float, *, wide: bool) -> None:
    """One chunk of ``size`` logits; ``held``: what variables hold, of the chunk before until they are set again.

    Logits of both models, their log-softmax (the first becomes the gradient), softmax, its product, the difference,
    and the logits' gradient: each variable lets go of its old tensor once the new one is there.
    """
    width = ops.WIDE if wide else narrow
    for name in ("logits", "teacher"):
        held[name] = _product(t, size, narrow, width)
    for name in ("logits", "teacher", "own", "other"):
        held[name] = t.empty(size, width)
    probabilities = t.empty(size, width)
    product = t.empty(size, width)
    del probabilities
    difference = t.empty(size, width)
    del product
    held["logits"] = t.empty(size, width)
    del difference
    if wide:
        held["logits"] = t.empty(size, narrow)


def _product(t: Tape, size: int, width: float, made_width: float) -> Tensor:
    """A product and its copy in another format; the product goes."""
    product = t.empty(size, width)
    return product if made_width == width else t.empty(size, made_width)


def compiled_preference_head(
    t: Tape, x: Tensor, weight: Tensor, num_rows: int, vocab_size: int, *, num_chunks: int, scaled: bool
) -> Tensor:
    """Liger's preference losses (ORPO, CPO, SimPO ...): pairs of sequences, each a chunk that Inductor compiles.

    Formula: gradients of head and input hVw + rhw, a chunk's input and gradient 2chw + the larger of its logits (whose
        gradient is written over them) and the gradients of the chosen tokens in fp32, cV (w + 4), and the logits'
        gradient beside the head's, cVw + hVw.
    Source: liger-kernel@0.4.1, @0.8.0:chunked_loss/fused_linear_preference.py:LigerFusedLinearPreferenceBase.forward;
        the buffers of torch@2.13.0's Inductor for its chunk (tests/trace/test_kernel_programs.py).
    Known error: versions of Inductor that make the logits' gradient anew need cVw more.
    """

    def pair(rows: int) -> Tensor:
        joined = t.empty(rows * x.num_elements // num_rows, x.width)
        made = _compiled_chunk(t, x, weight, rows, num_rows, vocab_size)
        del joined
        return made

    return _in_chunks(t, x, weight, [num_rows // num_chunks] * num_chunks, pair, scaled=scaled)


def compiled_policy_head(
    t: Tape, x: Tensor, weight: Tensor, num_rows: int, vocab_size: int, *, num_chunks: int
) -> Tensor:
    """Liger's policy-gradient loss (GRPO) before 0.8: each sequence a chunk that Inductor compiles.

    Formula: as the preference losses, with one sequence and no joined input; the reference's logits have gone by then.
    Source: liger-kernel@0.6.2:chunked_loss/fused_linear_ppo.py:LigerFusedLinearPPOBase.forward.
    """

    def sequence(rows: int) -> Tensor:
        return _compiled_chunk(t, x, weight, rows, num_rows, vocab_size)

    return _in_chunks(t, x, weight, [num_rows // num_chunks] * num_chunks, sequence, scaled=False)


def selective_policy_head(
    t: Tape, x: Tensor, weight: Tensor, num_rows: int, *, num_chunks: int, scaled: bool
) -> Tensor:
    """Liger's policy-gradient loss from 0.8 on: log-probabilities of the chosen tokens, over slices of the vocabulary.

    Formula: gradients of head and input hVw + rhw; each sequence sums its head's gradient in fp32 4hV and casts it hVw,
        beside its input's 4ch and chw.
    Source: liger-kernel@0.8.0:chunked_loss/fused_linear_ppo.py:_selective_logprob_backward,
        _ChunkedSelectiveLogProbFunction.backward.
    """

    def sequence(rows: int) -> Tensor:
        size = rows * x.num_elements // num_rows
        wide_input, wide_head = t.empty(size, ops.WIDE), t.empty(weight.num_elements, ops.WIDE)
        made = t.empty(size, x.width)
        t.brief(weight.num_bytes)
        del wide_input, wide_head
        return made

    return _in_chunks(t, x, weight, [num_rows // num_chunks] * num_chunks, sequence, scaled=scaled)


def compiled_distillation_head(
    t: Tape, x: Tensor, weight: Tensor, num_rows: int, vocab_size: int, *, chunk: int
) -> Tensor:
    """Liger's distillation by cosine similarity: chunks of tokens that Inductor compiles.

    Formula: gradients of head and input hVw + rhw + the larger of both models' logits and the gradient 3cVw, and the
        logits' gradient beside the head's cVw + hVw.
    Source: liger-kernel@0.5.10:chunked_loss/fused_linear_distillation.py:LigerFusedLinearDistillationBase.forward; the
        buffers of torch@2.13.0's Inductor for its chunk.
    """

    def tokens(rows: int) -> Tensor:
        both = t.empty(2 * rows * vocab_size, x.width)
        logits = t.empty(rows * vocab_size, x.width)
        del both
        made = t.empty(rows * x.num_elements // num_rows, x.width)
        t.brief(weight.num_bytes)
        del logits
        return made

    sizes = [min(chunk, num_rows - start) for start in range(0, num_rows, chunk)]
    return _in_chunks(t, x, weight, sizes, tokens, scaled=False)


def _in_chunks(
    t: Tape, x: Tensor, weight: Tensor, sizes: Sequence[int], one: Callable[[int], Tensor], *, scaled: bool
) -> Tensor:
    """A loss whose chunks of ``sizes`` rows make gradients: the head's is added up, the input's joined at the end.

    ``one`` runs a chunk and returns its part of the input's gradient.
    """
    head_grad = t.empty(weight.num_elements, weight.width)
    parts = [one(rows) for rows in sizes]
    input_grad = t.empty(x.num_elements, x.width)
    del parts
    return t.record([x, weight], t.empty(1, ops.WIDE), [input_grad, head_grad], made_before(scaled=scaled))


def _compiled_chunk(t: Tape, x: Tensor, weight: Tensor, rows: int, num_rows: int, vocab_size: int) -> Tensor:
    """A chunk as Inductor compiles it: logits, gradients of chosen tokens in fp32, the products for input and head."""
    logits = t.empty(rows * vocab_size, x.width)
    t.brief(rows * vocab_size * ops.WIDE)
    made = t.empty(rows * x.num_elements // num_rows, x.width)
    t.brief(weight.num_bytes)
    del logits
    return made
