"""Megatron's routed experts on one rank, from its tokens to their sum.

Symbols: T tokens of the rank, k experts a token, R = Tk rows after the exchange (balanced), Q rows received where a
    token goes to a rank once, h hidden size, I intermediate size, E local experts; bf16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from ullage.account.kernels import ops
from ullage.account.kernels.tape import Backward, Tape, Tensor
from ullage.frozen import Frozen

Dispatcher = Literal["alltoall", "deepep", "hybridep"]


class Sizes(Frozen):
    """Sizes of a layer.

    Attributes:
        num_tokens, hidden_size, intermediate_size, num_local_experts, top_k: as in the symbols.
        num_ranks: of the expert-parallel group.
        num_groups: groups that a token may choose from; 0: all of the ranks.
    """

    num_tokens: int
    hidden_size: int
    intermediate_size: int
    num_local_experts: int
    top_k: int
    num_ranks: int
    num_groups: int = 0

    @property
    def num_rows(self) -> int:
        """Rows that the experts work on."""
        return self.num_tokens * self.top_k

    @property
    def num_received(self) -> int:
        """Rows received where each token goes to a rank once.

        Formula: T x ranks to choose from x (1 - C(n - E, k) / C(n, k)), n experts of those ranks; routing at random.
        """
        ranks = self.num_groups or self.num_ranks
        choice = ranks * self.num_local_experts
        missed = math.comb(choice - self.num_local_experts, self.top_k) / math.comb(choice, self.top_k)
        return round(self.num_tokens * ranks * (1 - missed))


def experts_layer(
    t: Tape, x: Tensor, fc1: Tensor, fc2: Tensor, probabilities: Tensor, sizes: Sizes, dispatcher: Dispatcher
) -> Tensor:
    """Dispatch, experts with GELU and routing weights in fp32, combine.

    Formula: kept: fc1's input 2Rh, its output, the activation and fc2's input 3 x 2RI. Forward: what variables hold
        until the layer returns (tokens received, fc2's output 2Rh, rows put back); backward: fp32 product of
        activation and weights: its gradient, those of both factors 3 x 4RI and a cast 2RI.
    Source: megatron-core@d98e8a64:transformer/moe/moe_layer.py:MoELayer.forward, routed_experts_compute;
        experts.py:TEGroupedMLP.forward (bias_act_func); token_dispatcher.py; fused_a2a.py. Buffers of DeepEP and
        HybridEP are not PyTorch's: deep_ep@1.2:csrc/deep_ep.cpp:Buffer::Buffer (cudaMalloc).
    Known error: the router's own tensors (below 1 MiB a thousand tokens) and unequal routing are left out.
    """
    rows, hidden = sizes.num_rows, sizes.hidden_size
    sent, received, permuted = _dispatched(t, x, sizes, dispatcher)
    inner = _grouped(t, permuted, fc1, rows, sizes.num_local_experts)
    activated = ops.pointwise(t, inner)
    weighted = ops.cast(t, ops.mul(t, activated, probabilities), x.width)
    del activated
    outputs = _grouped(t, weighted, fc2, rows, sizes.num_local_experts)
    restored = outputs
    if dispatcher == "alltoall":
        restored = _moved(t, outputs, rows * hidden) if sizes.num_local_experts > 1 else outputs
        returned = _moved(t, restored, rows * hidden)
        made = _moved(t, returned, x.num_elements)
        del returned
    elif dispatcher == "deepep":
        restored = _moved(t, outputs, sizes.num_received * hidden)
        made = _moved(t, restored, x.num_elements)
    else:
        made = _through(t, outputs, [sizes.num_received * hidden], x.num_elements)
    del sent, received, permuted, inner, weighted, outputs, restored
    return made


def _dispatched(t: Tape, x: Tensor, sizes: Sizes, dispatcher: Dispatcher) -> tuple[Tensor, Tensor, Tensor]:
    """Return what was sent, what arrived, and the experts' rows; variables hold all three."""
    rows = sizes.num_rows * sizes.hidden_size
    if dispatcher == "alltoall":
        sent = _moved(t, x, rows)
        received = _moved(t, sent, rows)
        return sent, received, _moved(t, received, rows) if sizes.num_local_experts > 1 else received
    if dispatcher == "deepep":
        received = _moved(t, x, sizes.num_received * sizes.hidden_size)
        return x, received, _moved(t, received, rows)
    received = _through(t, x, [sizes.num_received * sizes.hidden_size], rows)
    return x, received, received


def _moved(t: Tape, x: Tensor, num_elements: int) -> Tensor:
    """Rows exchanged, permuted or summed: keeps nothing; the gradient is moved back."""
    return t.op([x], num_elements, x.width, backward=_back(x.num_elements, x.width, ()))


def _through(t: Tape, x: Tensor, between: Sequence[int], num_elements: int) -> Tensor:
    """Rows moved by way of others, which go at once."""
    return t.op(
        [x],
        num_elements,
        x.width,
        work=int(sum(between) * x.width),
        backward=_back(x.num_elements, x.width, between),
    )


def _back(num_elements: int, width: float, between: Sequence[int]) -> Backward:
    def backward(t: Tape, kept: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        t.brief(int(sum(between) * width))
        return [t.empty(num_elements, width)]

    return backward


def _grouped(t: Tape, x: Tensor, weight: Tensor, rows: int, num_experts: int) -> Tensor:
    """A grouped product: each expert's rows with its weight.

    Source: transformer_engine@2.9:pytorch/module/grouped_linear.py:_GroupedLinear.
    """
    sizes = [(each.num_elements, each.width) for each in (x, weight)]
    features = weight.num_elements // num_experts // (x.num_elements // rows)

    def backward(t: Tape, kept: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [t.empty(size, width) for size, width in sizes]

    return t.op([x, weight], rows * features, x.width, keeps=[x, weight], backward=backward)
