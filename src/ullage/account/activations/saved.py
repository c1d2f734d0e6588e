"""What autograd keeps for the backward pass, tensor by tensor.

A table is a tuple of :class:`SavedTensor` for one layer, one micro-batch and one rank. Tables differ by implementation
(which kernels run, what they save), never by the model's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ullage.units import tensor_bytes


@dataclass(frozen=True, kw_only=True)
class SavedTensor:
    """One tensor kept from forward to backward.

    Attributes:
        name: what it is, such as ``gate_proj.output``.
        module: the module it is kept for, a checkpoint name relative to the layer (``self_attn``, ``mlp``): what
            per-module recompute and the report go by.
        num_elements: on this rank, for one micro-batch.
        dtype: canonical name.
        formula: with symbols, such as ``b*s*h``.
        source: project@version:file:function where it is saved.
    """

    name: str
    module: str
    num_elements: int
    dtype: str
    formula: str = ""
    source: str = ""

    @property
    def bytes(self) -> int:
        """Bytes of the tensor."""
        return tensor_bytes(self.num_elements, self.dtype)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of one micro-batch on one rank.

    Attributes:
        micro_batch_size, seq_len: of the whole micro-batch; the table divides by the splits.
        tensor_parallel_size, sequence_parallel, context_parallel_size: as in the job.
        expert_parallel_size, expert_tensor_parallel_size: of the routed experts.
        expert_load: received tokens over the balanced number, 1.0 when routing is balanced.
    """

    micro_batch_size: int
    seq_len: int
    tensor_parallel_size: int = 1
    sequence_parallel: bool = False
    context_parallel_size: int = 1
    expert_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1
    expert_load: float = 1.0

    @property
    def num_tokens(self) -> int:
        """Tokens of one micro-batch on this rank outside sequence-parallel regions."""
        return self.micro_batch_size * self.seq_len // self.context_parallel_size


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """Which kernels run, as far as they differ in what they keep.

    Attributes:
        attention: flash (output and log-sum-exp), sdpa (as flash on CUDA), eager/unfused (scores and probabilities),
            te (Transformer Engine's fused attention).
        norm: "native" RMSNorm written in PyTorch (keeps the fp32 copy and more), "fused" (input and rstd), "te".
        gated_ffn: "native" (gate, up, activation, product) or "fused" (the gate-up output only).
        rotary: "native" or "fused".
        moe: "loop" (Transformers eager experts), "grouped" (grouped GEMM after permutation), "megatron".
        compute_dtype, residual_dtype: of activations.
        autocast: fp32 weights under autocast: casts are cached per forward.
        dropout: attention and hidden dropout keep masks.
        trained: parameters of the base are trained; False: frozen base (LoRA), whose linear inputs need not be kept.
    """

    attention: Literal["flash", "sdpa", "eager", "unfused", "te"] = "sdpa"
    norm: Literal["native", "fused", "te"] = "native"
    gated_ffn: Literal["native", "fused"] = "native"
    rotary: Literal["native", "fused"] = "native"
    moe: Literal["loop", "grouped", "megatron"] = "loop"
    compute_dtype: str = "bfloat16"
    residual_dtype: str = "bfloat16"
    autocast: bool = False
    dropout: float = 0.0
    trained: bool = True
