"""What the gradient of an embedding takes while it is added up."""

from __future__ import annotations

#: Up to so many indices one kernel adds without sorting. Source: torch@2.9.0:aten/src/ATen/native/cuda/Embedding.cu:
#: embedding_dense_backward_cuda.
FEW_INDICES = 3072
#: Rows that one partial sum adds up. Source: torch@2.9.0:aten/src/ATen/native/cuda/EmbeddingBackwardKernel.cu
#: (NROWS_PER_THREAD).
ROWS_PER_SUM = 10
_INDEX, _WIDE = 8, 4


def embedding_gradient_tables(num_indices: int, num_rows: int, width: int) -> tuple[int, ...]:
    """Return the bytes of each table that stands beside an embedding's gradient, the largest last.

    Formula: n > 3072 indices into V rows of width d, s = min(n, V): indices sorted, their places, and the starts of
        equal ones 3 x 8n; sums of each and their offsets 2 x 8s; p = n // 10 + s partial sums: their starts 8p, and
        themselves in fp32 4pd.
    Source: torch@2.9.0:aten/src/ATen/native/cuda/EmbeddingBackwardKernel.cu:embedding_backward_cuda_kernel
        (max_segments, max_partial_segment; since 1.13: pytorch/pytorch#78588), Embedding.cu:
        embedding_dense_backward_cuda. The scratch of the sort has gone by then.
    Known error: newer versions sum a few indices that recur very often (n above some 30 V) in place.
    """
    if num_indices <= FEW_INDICES:
        return ()
    groups = min(num_indices, num_rows)
    sums = num_indices // ROWS_PER_SUM + groups
    return (*(_INDEX * num_indices,) * 3, *(_INDEX * groups,) * 2, _INDEX * sums, _WIDE * sums * width)
