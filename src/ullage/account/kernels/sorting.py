"""What PyTorch's sort of rows takes for a moment."""

from __future__ import annotations

#: Longest rows that are sorted in place. Source: torch@2.7.0:aten/src/ATen/native/cuda/Sort.h:should_use_small_sort.
SMALL_SORT = 4096
_INDEX = 8


def sort_scratch(num_elements: int, row_size: int, width: float) -> tuple[int, ...]:
    """Return the bytes of what a sort takes besides values and indices, nothing for short rows.

    Formula: the indices in order 8n; the sort's own keys and values n (w + 8).
    Source: torch@2.7.0:aten/src/ATen/native/cuda/Sort.cpp:sort_cuda_kernel, SortStable.cu:segmented_sort_pairs; cub's
        DeviceSegmentedRadixSort without double buffers.
    """
    if row_size <= SMALL_SORT:
        return ()
    return (_INDEX * num_elements, int(num_elements * (width + _INDEX)))
