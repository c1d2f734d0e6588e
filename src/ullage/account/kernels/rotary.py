"""Rotary embedding of queries and keys, written out and as one kernel.

Symbols: q, k bytes of the queries and keys (bsh and the keys' share of it).
"""

from __future__ import annotations

from collections.abc import Sequence

from ullage.account.kernels import ops
from ullage.account.kernels.tape import Tape, Tensor


def rotate_halves(t: Tape, q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """Transformers' rotary embedding: x cos + (-x2, x1) sin, in the compute dtype.

    Formula: per tensor: x cos, the negative half, the turned whole, its product with sin, the sum 4.5x; the sum stays.
    Source: transformers@4.44.0, @5.23.0:models/llama/modeling_llama.py:apply_rotary_pos_emb, rotate_half.
    """
    return _turned(t, q, cosine, sine), _turned(t, k, cosine, sine)


def _turned(t: Tape, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    return ops.add(t, ops.mul(t, x, cosine), ops.mul(t, _rotated(t, x), sine))


def _rotated(t: Tape, x: Tensor) -> Tensor:
    half = x.num_elements // 2
    one, other = t.view(x, half), t.view(x, x.num_elements - half)
    return ops.cat(t, [ops.scale(t, other), one])


def complex_product(t: Tape, q: Tensor, k: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """Llama 4's rotary embedding: fp32, seen as complex, multiplied, back.

    Formula: fp32 of q and k 2(q + k), their products 2(q + k), the results q + k for 2-byte inputs.
    Source: transformers@4.55.0:models/llama4/modeling_llama4.py:apply_rotary_emb.
    """
    wide_q, wide_k = (t.view(ops.cast(t, each, ops.WIDE)) for each in (q, k))
    out_q = t.view(_times(t, wide_q, angles))
    out_k = t.view(_times(t, wide_k, angles))
    return ops.cast(t, out_q, q.width), ops.cast(t, out_k, k.width)


def _times(t: Tape, x: Tensor, angles: Tensor) -> Tensor:
    """Complex product: the conjugate in backward is a view."""
    return t.op([x], x.num_elements, x.width, keeps=[angles])


def in_place(t: Tape, q: Tensor, k: Tensor, kept: Sequence[Tensor], *, copies: int = 0) -> Sequence[Tensor]:
    """Liger's rotary embeddings: written over the queries and keys, backward over the gradients.

    Formula: nothing but ``copies`` bytes of tables for a moment. A gradient that nobody gives is zeros, made for it.
    Source: liger-kernel@0.8.0:ops/rope.py:rope_forward, rope_backward; ops/llama4_rope.py:llama4_rope_forward.
    """
    sizes = [(each.num_elements, each.width) for each in (q, k)]

    def backward(t: Tape, kept: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        given = [*grads, *[None] * (2 - len(grads))]
        table = t.empty(copies, 1)
        made: list[Tensor | None] = []
        for grad, (num_elements, width) in zip(given, sizes, strict=True):
            storage = t.empty(num_elements, width).storage if grad is None else grad.storage
            made.append(Tensor(storage, num_elements, width))
        del table
        return made

    t.brief(copies)
    return t.record_all(
        [q, k], [Tensor(each.storage, each.num_elements, each.width) for each in (q, k)], kept, backward
    )
