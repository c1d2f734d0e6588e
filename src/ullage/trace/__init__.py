"""nn.Module → events, on meta tensors, without a GPU: ``ullage.trace("deepseek-v3", micro_batch=1, recompute="full")``.

The package is also the function: :func:`ullage.trace.api.trace`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A package that can be called: ``ullage.trace`` names both."""

    def __call__(self, target: Any, **options: Any) -> Any:
        """Trace a step; see :func:`ullage.trace.api.trace`."""
        from ullage.trace.api import trace

        return trace(target, **options)


sys.modules[__name__].__class__ = _Callable
