"""What CUDA kernels allocate inside themselves: meta kernels return outputs only, so this is written down by rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from ullage.account.activations.embedding import embedding_gradient_tables
from ullage.account.kernels.sorting import sort_scratch
from ullage.frozen import Frozen
from ullage.trace.recorder.arguments import arguments_of
from ullage.units import MiB, cdiv, round_up

#: Bytes of a 64-bit index.
INDEX = 8
#: Elements per chunk of the foreach kernels. Source: torch@2.13.0:aten/src/ATen/native/cuda/MultiTensorApply.cuh.
FOREACH_CHUNK = 65536


class Kernels(Frozen):
    """For which GPU the step is traced.

    Attributes:
        compute_capability: decides the size of cuBLAS' workspace.
        attention: which kernel scaled_dot_product_attention runs; "auto" takes the first that can.
    """

    compute_capability: tuple[int, int] = (9, 0)
    attention: str = "auto"
    PRODUCTS: ClassVar[frozenset[str]] = frozenset(("mm", "addmm", "bmm", "baddbmm", "addmv", "addbmm", "mv", "dot"))

    @property
    def workspace_bytes(self) -> int:
        """Bytes of one cuBLAS workspace: 32 MiB on Hopper and later, 2 x 4 MiB + 8 x 16 KiB before.

        Source: torch@2.13.0:aten/src/ATen/cuda/CublasHandlePool.cpp:parseChosenWorkspaceSize.
        """
        return 32 * MiB if self.compute_capability >= (9, 0) else 2 * 4096 * 1024 + 8 * 16 * 1024


def hidden_temporaries(func: Any, args: Any, kwargs: Any, out: Any) -> list[int]:
    """Return the bytes of each temporary of one operator's CUDA kernel."""
    rule = _RULES.get(func._schema.name)
    return [] if rule is None else rule([*arguments_of(func, args, kwargs).values()], out)


def _flash_backward(args: Any, _out: Any) -> list[int]:
    """Gradient of the queries in fp32, the row sums, and with grouped heads the expanded gradients of keys and values.

    Formula: dq_accum 4 b s' h d', softmax_d 4 b h s' (s' to 128, d' to 32 or 64); h_kv < h: 2 x b s_k h d elements.
    Source: torch@2.13.0:aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp:mha_bwd.
    """
    query, key = args[1], args[2]
    batch, heads, tokens, size = query.shape
    rounded = round_up(size, 32 if size <= 128 else 64)
    rows = round_up(tokens, 128)
    found = [4 * batch * heads * rows, 4 * batch * rows * heads * rounded]
    if key.shape[1] != heads:
        expanded = batch * key.shape[2] * heads * size * query.element_size()
        found += [expanded, expanded]
    return found


def _efficient_backward(args: Any, out: Any) -> list[int]:
    """Row sums of output times gradient, and fp32 accumulators of the gradients where the head is wide.

    Formula: delta 4 b h s; workspace 4 x (s' d' of the queries) per head where the value size exceeds 64.
    Source: torch@2.13.0:aten/src/ATen/native/transformers/cuda/attention_backward.cu:_efficient_attention_backward,
        mem_eff_attention/kernel_backward.h:workspace_elements_gq.
    Known error: the workspace of the gradients of keys and values (only where keys are split) is left out.
    """
    query, value = args[1], args[3]
    batch, heads, tokens, size = query.shape
    found = [4 * batch * heads * round_up(tokens, 32)]
    if max(size, value.shape[-1]) > 64:
        found.append(4 * batch * heads * round_up(tokens, 64) * round_up(size, 64))
    return found


def _embedding_backward(args: Any, _out: Any) -> list[int]:
    """Tables of indices, and partial sums in fp32; see :func:`embedding_gradient_tables`."""
    grad, indices, num_rows = args[:3]
    return list(embedding_gradient_tables(indices.numel(), num_rows, grad.shape[-1]))


def _index_put(args: Any, _out: Any) -> list[int]:
    """Linear, sorted, original and counted indices where values are accumulated, and the scratch of their sort.

    Formula: 4 x 8n, and keys and values once more 2 x 8n.
    Source: torch@2.13.0:aten/src/ATen/native/cuda/Indexing.cu:index_put_with_sort_kernel; cub's DeviceRadixSort
        without double buffers.
    """
    accumulates = len(args) > 3 and bool(args[3])
    if not accumulates:
        return []
    count = max((each.numel() for each in args[1] if each is not None), default=0)
    return [INDEX * count] * 6


def _foreach_norm(args: Any, _out: Any) -> list[int]:
    """Partial norms of every chunk: as many chunks for each tensor as the largest has.

    Formula: 4 x tensors x ceil(largest / 65536).
    Source: torch@2.13.0:aten/src/ATen/native/cuda/ForeachReduceOp.cu:foreach_tensor_norm_cuda.
    """
    tensors = args[0]
    chunks = max((cdiv(each.numel(), FOREACH_CHUNK) for each in tensors), default=0)
    return [4 * len(tensors) * chunks]


def _sort(args: Any, _out: Any) -> list[int]:
    """Scratch of a sort of long rows; see :func:`sort_scratch`."""
    source, axis = args[0], args[-2]
    row_size = source.shape[axis] if source.dim() else 1
    return list(sort_scratch(source.numel(), row_size, source.element_size()))


def _softmax_backward(args: Any, _out: Any) -> list[int]:
    """The product of gradient and output, in the gradient's dtype, which the kernel reads.

    Source: torch@2.13.0:aten/src/ATen/native/cuda/SoftMax.cu:softmax_backward_cuda_out (``tmp = grad * output``).
    """
    grad = args[0]
    return [grad.numel() * grad.element_size()]


_RULES: dict[str, Callable[[Any, Any], list[int]]] = {
    "aten::_scaled_dot_product_flash_attention_backward": _flash_backward,
    "aten::_scaled_dot_product_efficient_attention_backward": _efficient_backward,
    "aten::embedding_dense_backward": _embedding_backward,
    "aten::index_put_": _index_put,
    "aten::_index_put_impl_": _index_put,
    "aten::index_put": _index_put,
    "aten::_foreach_norm": _foreach_norm,
    "aten::sort": _sort,
    "aten::_softmax_backward_data": _softmax_backward,
}
