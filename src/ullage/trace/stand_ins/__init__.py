"""Stand-ins for kernels of other libraries: they allocate and keep what the kernels do, and compute nothing."""
