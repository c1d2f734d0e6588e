"""ullage: where the GPU memory of a large model goes, whether the job fits, and what to change when it does not."""

__version__ = "0.1.0"
