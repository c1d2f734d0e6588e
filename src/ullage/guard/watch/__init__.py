"""``ullage watch``: the memory of devices, of the host and of PyTorch's allocator, as numbers, curves and alarms."""
