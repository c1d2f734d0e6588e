"""What autograd keeps for the backward pass, tensor by tensor.

A table is a tuple of :class:`SavedTensor` for one layer, one micro-batch and one rank. Tables differ by implementation
(which kernels run, what they save), never by the model's name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from ullage.frozen import Frozen
from ullage.units import round_up, tensor_bytes

ALLOCATOR_BLOCK_BYTES = 512


class SavedTensor(Frozen):
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


class Shape(Frozen):
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

    @property
    def num_split_tokens(self) -> int:
        """Tokens on this rank inside sequence-parallel regions: norms, residual stream, inputs of split linears."""
        return self.num_tokens // (self.tensor_parallel_size if self.sequence_parallel else 1)

    def num_routed_tokens(self, top_k: int) -> int:
        """Rows that this rank's routed experts work on: every rank sends ``top_k`` copies and receives as many.

        Formula: split tokens x top_k x expert_tensor_parallel_size x expert_load; the expert-parallel size cancels.
        """
        return round(self.num_split_tokens * top_k * self.expert_tensor_parallel_size * self.expert_load)


class Implementation(Frozen):
    """Which kernels run, as far as they differ in what they keep.

    Attributes:
        attention: flash (output and log-sum-exp), sdpa (as flash on CUDA), eager/unfused (scores and probabilities),
            te (Transformer Engine's fused attention).
        norm: "native" RMSNorm written in PyTorch (keeps the fp32 copy and more), "late_cast" (the weight is multiplied
            in fp32, Gemma and gpt-oss), "fused" (input and rstd), "te".
        gated_ffn: "native" (gate, up, activation, product), "fused" (the gate-up output only) or "clamped" (gpt-oss:
            gate and up are clamped, and the gate's sigmoid is written out).
        rotary: "native" or "fused".
        moe: "loop" (Transformers eager experts), "grouped" (grouped GEMM after permutation), "megatron".
        compute_dtype, residual_dtype: of activations.
        autocast: products run under autocast (fp32 weights or adapters); casts are cached per forward.
        dropout: attention and hidden dropout keep masks.
        trained: parameters of the base are trained; False: frozen base (LoRA), whose linear inputs need not be kept.
        repeat_kv: keys and values are copied to the number of query heads before the kernel (eager attention always;
            SDPA with a mask, or before ``enable_gqa``).
        pads_values: the kernel wants equal head sizes, so MLA's narrower values are padded (FlashAttention 2).
        router_dtype: of the router's scores, and of the weights that the experts' outputs are multiplied by.
        router_wide: the router's product runs on copies of its input and of its weight, made fp32 (and, under
            autocast, narrow again).
        ffn_dtype: of feed-forward blocks where it is not the compute dtype (quantised linears answer in the format of
            their input).
        softmax_dtype: attention written out computes its softmax in this format (GPT-2: the compute dtype).
        recurrent: delta rules and state-space layers run by the packages written for them, or by PyTorch alone.
        compiled: torch.compile: the partitioner keeps inputs and results of products and of attention, residual sums
            and statistics; what lies between is made again (norm, gate and rotation are then "fused").
    """

    attention: Literal["flash", "sdpa", "eager", "unfused", "te"] = "sdpa"
    norm: Literal["native", "late_cast", "fused", "te"] = "native"
    gated_ffn: Literal["native", "fused", "clamped"] = "native"
    rotary: Literal["native", "fused"] = "native"
    moe: Literal["loop", "grouped", "megatron"] = "loop"
    compute_dtype: str = "bfloat16"
    residual_dtype: str = "bfloat16"
    autocast: bool = False
    dropout: float = 0.0
    trained: bool = True
    repeat_kv: bool = False
    pads_values: bool = False
    router_dtype: str = "float32"
    router_wide: bool = False
    softmax_dtype: str = "float32"
    ffn_dtype: str | None = None
    recurrent: Literal["packages", "torch"] = "packages"
    compiled: bool = False


class Keeper(Frozen):
    """Makes the rows of one module's table: ``keep`` always, ``keep_input`` of a linear only where it is trained."""

    shape: Shape
    implementation: Implementation
    module: str
    source: str

    def keep(self, name: str, num_elements: int, formula: str, dtype: str | None = None) -> SavedTensor:
        """Return a row; ``dtype`` None: the compute dtype."""
        return SavedTensor(
            name=name,
            module=self.module,
            num_elements=num_elements,
            dtype=dtype or self.implementation.compute_dtype,
            formula=formula,
            source=self.source,
        )

    def keep_input(self, name: str, num_elements: int, formula: str) -> tuple[SavedTensor, ...]:
        """Return the input of a linear, which only the gradient of its weight needs."""
        return (self.keep(name, num_elements, formula),) if self.implementation.trained else ()


def table_bytes(table: Iterable[SavedTensor]) -> int:
    """Return the bytes of a table, each tensor rounded up to the allocator's 512-byte block.

    Source: torch@2.13.0:c10/cuda/CUDACachingAllocator.cpp (kMinBlockSize).
    """
    return sum(round_up(tensor.bytes, ALLOCATOR_BLOCK_BYTES) for tensor in table)
