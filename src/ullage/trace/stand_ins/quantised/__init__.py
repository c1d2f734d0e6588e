"""Frozen 4-bit layers as stand-ins on meta tensors: they hold, allocate and keep what the kernels do."""

from ullage.trace.stand_ins.quantised.base import num_elements, quantise
from ullage.trace.stand_ins.quantised.prepare import prepare_for_training

__all__ = ["num_elements", "prepare_for_training", "quantise"]
