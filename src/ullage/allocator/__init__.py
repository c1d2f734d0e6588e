"""EVENTS to segments, peaks and fragmentation: PyTorch's native CUDA caching allocator, simulated to the byte.

Nothing here imports torch, and nothing here needs a GPU. Rules: pytorch@2.11:c10/cuda/CUDACachingAllocator.cpp and
pytorch@2.13.0:c10/core/AllocatorConfig.h; each function names the one it mirrors.
"""
