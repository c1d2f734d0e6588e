"""What of a device decides how much memory a kernel needs for a moment."""

from __future__ import annotations

from ullage.frozen import Frozen
from ullage.units import cdiv

#: Of PyTorch's reductions over rows. Source: torch@2.13.0:aten/src/ATen/native/cuda/Reduce.cuh (setReduceConfig:
#: mnt_wrapper, vectorised outputs, min_values_per_thread, max_values_per_thread).
_MAX_THREADS, _VECTOR, _WARP, _MIN_VALUES, _MAX_VALUES = 512, 4, 32, 16, 256


class Device(Frozen):
    """A GPU.

    Attributes:
        num_multiprocessors: 0 where they do not matter: no buffers of reductions are counted.
        threads_per_multiprocessor: most threads that one holds.
    """

    num_multiprocessors: int
    threads_per_multiprocessor: int = 2048

    def sum_buffer_bytes(self, num_outputs: int, num_rows: int) -> int:
        """Return the buffer of a sum over rows that is split over thread blocks, in fp32.

        Formula: 4 x outputs x blocks per output x (block width x 4 outputs a thread). A block is 32 wide and 4 high;
            a column is split over blocks once a thread would sum 256 values: as many as fill the device, at
            least 16 values a thread each, at most 256.
        Source: torch@2.13.0:aten/src/ATen/native/cuda/Reduce.cuh:setReduceConfig, ReduceConfig::global_memory_size.
        Known error: none for contiguous rows of a multiple of 4 outputs; sums along a row need a few KiB only.
        """
        if not self.num_multiprocessors or num_outputs < _WARP * _VECTOR or num_rows < 2:
            return 0
        width = _WARP
        height = min(1 << (num_rows.bit_length() - 1), _MAX_THREADS // _VECTOR // width)
        if num_rows < min(height * 16, _MAX_VALUES):
            return 0
        values = cdiv(num_rows, height)
        grid = cdiv(num_outputs // _VECTOR, width)
        target = self.num_multiprocessors * (self.threads_per_multiprocessor // (width * height))
        if values < _MAX_VALUES or grid > target:
            return 0
        blocks = max(min(cdiv(target, grid), cdiv(values, _MIN_VALUES)), cdiv(values, _MAX_VALUES))
        return 4 * num_outputs * blocks * width * _VECTOR if blocks > 1 else 0
