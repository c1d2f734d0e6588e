"""What PyTorch does on CUDA and not on meta tensors: its fused kernels, autocast, and choices by device."""
