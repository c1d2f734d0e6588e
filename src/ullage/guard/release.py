"""Give back what a failed step holds: frames, gradients, caches. To be called outside of the ``except`` block."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Iterable
from typing import Any

from ullage.guard.classify import chain


def release_exception(error: BaseException) -> None:
    """Empty the frames of an exception and of all that led to it, and cut them off.

    A live exception holds its traceback, that the frames, those their tensors. Frames that still run keep their
    variables.
    """
    for each in list(chain(error)):
        traceback.clear_frames(each.__traceback__)
        each.__traceback__ = None
        each.__cause__ = each.__context__ = None
    for name in ("last_exc", "last_value", "last_traceback"):  # what an interactive interpreter keeps
        if getattr(sys, name, None) is not None:
            setattr(sys, name, None)


def release_memory(parameters: Iterable[Any] = ()) -> None:
    """Drop gradients and autocast's casts, collect cycles, and give the device's cached blocks back."""
    import torch

    for parameter in parameters:
        parameter.grad = None
    torch.clear_autocast_cache()
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
