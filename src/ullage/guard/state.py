"""What a forward changes besides gradients, taken at the start of a window and put back before it is redone."""

from __future__ import annotations

import random
import sys
from typing import Any


class WindowState:
    """Random number generators (CPU, the current device, Python, NumPy) and the statistics of batch norms."""

    def __init__(self, model: Any) -> None:
        import torch
        from torch.nn.modules.batchnorm import _NormBase

        self._torch = torch
        self._buffers = [
            buffer
            for module in model.modules()
            if isinstance(module, _NormBase) and module.track_running_stats
            for buffer in module.buffers(recurse=False)
        ]
        self.uses_batch_statistics = bool(self._buffers)
        self._kept: tuple[Any, ...] = ()

    def take(self) -> None:
        """Keep the state."""
        self._kept = (*random_state(), [buffer.clone() for buffer in self._buffers])

    def put_back(self) -> None:
        """Restore what :meth:`take` kept."""
        *generators, buffers = self._kept
        set_random_state(tuple(generators))
        with self._torch.no_grad():
            for buffer, kept in zip(self._buffers, buffers, strict=True):
                buffer.copy_(kept)


def random_state() -> tuple[Any, ...]:
    """Return the state of the generators: torch's CPU, its current device if in use, Python, NumPy if loaded."""
    import torch

    device = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    numpy = sys.modules.get("numpy")
    return torch.get_rng_state(), device, random.getstate(), numpy.random.get_state() if numpy else None


def set_random_state(kept: tuple[Any, ...]) -> None:
    """Restore what :func:`random_state` returned."""
    import torch

    cpu, device, python, of_numpy = kept
    torch.set_rng_state(cpu)
    if device is not None:
        torch.cuda.set_rng_state(device)
    random.setstate(python)
    if of_numpy is not None:
        sys.modules["numpy"].random.set_state(of_numpy)
