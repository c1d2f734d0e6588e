"""Frozen 4-bit layers as stand-ins on meta tensors: they hold, allocate and keep what the kernels do."""

from ullage.trace.quantised.base import num_elements, quantise
from ullage.trace.quantised.prepare import prepare_for_training

__all__ = ["num_elements", "prepare_for_training", "quantise"]
