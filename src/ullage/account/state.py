"""The state that a request keeps in linear-attention and state-space layers: fixed, whatever its context.

A cache of keys and values grows with every token; these layers keep a matrix per head instead, and the last columns of
a short convolution. Shapes here are those of one request in one layer on one tensor-parallel rank.

Legend: t tensor_parallel_size, K conv_kernel, S speculative tokens.
"""

from __future__ import annotations

import math
from typing import Literal

from ullage.errors import LayoutError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.spec import model as spec


class StateTensor(Frozen):
    """One tensor of a request's state.

    Attributes:
        name: "conv" the last inputs of the convolution, "recurrent" the matrix that is updated by every token.
        shape: on one rank.
        dtype: where the layer or the model's config fixes it; None: the engine's default (vLLM: the model's dtype;
            SGLang: bfloat16 for conv, float32 for recurrent).
    """

    name: Literal["conv", "recurrent"]
    shape: tuple[int, ...]
    dtype: str | None = None

    @property
    def num_elements(self) -> int:
        """The product of the shape."""
        return math.prod(self.shape)


_KINDS = (
    spec.GatedDeltaNet,
    spec.KimiDeltaAttention,
    spec.LightningAttention,
    spec.Mamba,
    spec.Mamba2,
    spec.ShortConvolution,
)


def has_state(part: spec.Mixer) -> bool:
    """Tell whether a request keeps a fixed state in this kind of layer."""
    return isinstance(part, _KINDS)


def state_tensors(
    part: spec.Mixer, tensor_parallel_size: int = 1, *, num_speculative_tokens: int = 0
) -> tuple[StateTensor, ...]:
    """Return a request's state in one layer on one rank; empty for layers that cache keys and values.

    ``num_speculative_tokens`` widens the convolution's window by as many columns (draft tokens can be taken back); an
    engine that keeps one recurrent state per draft token multiplies on its own account. Mamba-1 has no such window.

    Source: vllm@0.33.0:vllm/model_executor/layers/mamba/mamba_utils.py:MambaStateShapeCalculator.

    Raises:
        LayoutError: the heads or channels cannot be divided over the ranks.
    """
    ranks, columns = tensor_parallel_size, num_speculative_tokens
    if isinstance(part, spec.GatedDeltaNet):
        return _gated_delta_net(part, ranks, columns)
    if isinstance(part, spec.KimiDeltaAttention):
        return _kimi_delta_attention(part, ranks, columns)
    if isinstance(part, spec.LightningAttention):
        return _lightning_attention(part, ranks)
    if isinstance(part, spec.Mamba):
        return _mamba(part, ranks)
    if isinstance(part, spec.Mamba2):
        return _mamba2(part, ranks, columns)
    if isinstance(part, spec.ShortConvolution):
        return _short_convolution(part, ranks, columns)
    return ()


def _share(size: int, ranks: int, what: str) -> int:
    if ranks < 1 or size % ranks:
        raise LayoutError(
            _("{size} {what} cannot be divided over {ranks} tensor-parallel ranks").format(
                size=size, what=what, ranks=ranks
            ),
            remedy=_("choose a size that divides {size}").format(size=size),
        )
    return size // ranks


def _gated_delta_net(part: spec.GatedDeltaNet, ranks: int, speculative: int) -> tuple[StateTensor, ...]:
    """State of a gated delta net.

    Formula: conv (K - 1 + S, (2*Nk*Dk + Nv*Dv) / t); recurrent (Nv / t, Dv, Dk).
    Symbols: Nk, Nv num_k_heads and num_v_heads; Dk, Dv their head sizes.
    Source: arXiv:2412.06464 sec. 3; vllm@0.33.0:mamba_utils.py:gated_delta_net_state_shape.
    """
    _share(part.num_k_heads, ranks, "num_k_heads")
    channels = 2 * part.num_k_heads * part.k_head_dim + part.num_v_heads * part.v_head_dim
    heads = _share(part.num_v_heads, ranks, "num_v_heads")
    return (
        StateTensor(name="conv", shape=(part.conv_kernel - 1 + speculative, channels // ranks)),
        StateTensor(name="recurrent", shape=(heads, part.v_head_dim, part.k_head_dim), dtype=part.state_dtype),
    )


def _kimi_delta_attention(part: spec.KimiDeltaAttention, ranks: int, speculative: int) -> tuple[StateTensor, ...]:
    """State of Kimi Delta Attention: the convolutions of q, k and v side by side; the recurrent state is float32.

    Formula: conv (K - 1 + S, 3*N*D / t); recurrent (N / t, D, D).
    Symbols: N num_heads, D head_dim.
    Source: arXiv:2510.26692 eq. 1; vllm@0.33.0:mamba_utils.py:kda_state_shape, kda_state_dtype.
    """
    heads = _share(part.num_heads, ranks, "num_heads")
    return (
        StateTensor(name="conv", shape=(part.conv_kernel - 1 + speculative, 3 * heads * part.head_dim)),
        StateTensor(name="recurrent", shape=(heads, part.head_dim, part.head_dim), dtype="float32"),
    )


def _lightning_attention(part: spec.LightningAttention, ranks: int) -> tuple[StateTensor, ...]:
    """State of lightning attention: one key-value outer product per head, no convolution.

    Formula: recurrent (N / t, D, D).
    Symbols: N num_heads, D head_dim.
    Source: arXiv:2501.08313 sec. 2.2; vllm@0.33.0:mamba_utils.py:linear_attention_state_shape.
    """
    heads = _share(part.num_heads, ranks, "num_heads")
    return (StateTensor(name="recurrent", shape=(heads, part.head_dim, part.head_dim)),)


def _mamba(part: spec.Mamba, ranks: int) -> tuple[StateTensor, ...]:
    """State of a Mamba-1 layer.

    Formula: conv (K - 1, I / t); recurrent (I / t, N).
    Symbols: I inner_size, N state_size.
    Source: arXiv:2312.00752 alg. 2; vllm@0.33.0:mamba_utils.py:mamba1_state_shape.
    """
    channels = _share(part.inner_size, ranks, "inner_size")
    return (
        StateTensor(name="conv", shape=(part.conv_kernel - 1, channels)),
        StateTensor(name="recurrent", shape=(channels, part.state_size)),
    )


def _mamba2(part: spec.Mamba2, ranks: int, speculative: int) -> tuple[StateTensor, ...]:
    """State of a Mamba-2 layer. A single group is repeated on every rank; several must divide.

    Formula: conv (K - 1 + S, (N*P + 2*G'*n) / t); recurrent (N / t, P, n); G' = t if G is 1, else G.
    Symbols: N num_heads, P head_dim, n state_size, G num_groups.
    Source: arXiv:2405.21060 sec. 7; vllm@0.33.0:mamba_utils.py:mamba2_state_shape, mamba_mixer2.py:MambaMixer2.
    """
    heads = _share(part.num_heads, ranks, "num_heads")
    groups = 1 if part.num_groups == 1 else _share(part.num_groups, ranks, "num_groups")
    channels = heads * part.head_dim + 2 * groups * part.state_size
    return (
        StateTensor(name="conv", shape=(part.conv_kernel - 1 + speculative, channels)),
        StateTensor(name="recurrent", shape=(heads, part.head_dim, part.state_size), dtype=part.state_dtype),
    )


def _short_convolution(part: spec.ShortConvolution, ranks: int, speculative: int) -> tuple[StateTensor, ...]:
    """State of a gated short convolution: the window alone.

    Formula: conv (K - 1 + S, C / t).
    Symbols: C size.
    Source: vllm@0.33.0:mamba_utils.py:short_conv_state_shape.
    """
    channels = _share(part.size, ranks, "size")
    return (StateTensor(name="conv", shape=(part.conv_kernel - 1 + speculative, channels)),)
