"""Megatron-LM's rules over many layouts: the functions of :mod:`ullage.engines.megatron`, on arrays.

What is a number in a layout is an array with an element a layout; what decides which tensors there are (stages,
schedule, recompute, ZeRO stage) splits the layouts. Every part is worked out once for all layouts that share it:
tables of layers by sizes of the micro-batch, parameters by shares of tensor and expert parallelism, moments by
micro-batches in flight.
"""
