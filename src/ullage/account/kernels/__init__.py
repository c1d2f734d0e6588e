"""Single kernels and small modules: what a kernel makes, keeps and needs for a moment, forward and backward."""
