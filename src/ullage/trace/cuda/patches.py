"""What must be told, for the length of a trace, that meta tensors stand for those of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch.utils import _foreach_utils, checkpoint

#: Modules that hold their own name for the lists of devices.
_CHOOSERS = ("torch.optim.optimizer", "torch.optim.adam", "torch.nn.utils.clip_grad")


@contextmanager
def cuda_stand_ins(tracker: Any, functions: Any) -> Iterator[None]:
    """Let checkpointing, autocast and optimizers treat meta tensors as they treat CUDA's."""
    with ExitStack() as stack:
        for target, name, value in (
            (checkpoint, "_infer_device_type", lambda *_arguments: "cuda"),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.nn.functional, "scaled_dot_product_attention", functions.attend),
            (torch.cuda, "is_bf16_supported", lambda *_a, **_k: True),
            (torch.cuda, "synchronize", lambda *_a, **_k: None),
            (torch.cuda, "empty_cache", lambda: None),
            (torch.cuda, "reset_peak_memory_stats", lambda *_a, **_k: None),
            (torch.cuda, "current_device", lambda: 0),
        ):
            if hasattr(target, name):
                stack.enter_context(mock.patch.object(target, name, value))
        _optimizers(stack)
        _storages(stack, tracker)
        _autocast(stack, functions)
        _backward(stack, functions)
        yield


def _optimizers(stack: ExitStack) -> None:
    """Let optimizers choose on meta what they choose on CUDA: foreach by default, fused where asked for.

    Source: torch@2.13.0:torch/optim/optimizer.py:_default_to_fused_or_foreach.
    """
    foreach, fused = (
        _foreach_utils._get_foreach_kernels_supported_devices,
        _foreach_utils._get_fused_kernels_supported_devices,
    )
    for module in (_foreach_utils, *map(import_module, _CHOOSERS)):
        for name, original in (
            ("_get_foreach_kernels_supported_devices", foreach),
            ("_get_fused_kernels_supported_devices", fused),
        ):
            if hasattr(module, name):
                stack.enter_context(mock.patch.object(module, name, lambda original=original: [*original(), "meta"]))


def _storages(stack: ExitStack, tracker: Any) -> None:
    """Write down storages that are given another size."""
    original = torch.UntypedStorage.resize_

    def resize(storage: Any, size: int) -> Any:
        found = original(storage, size)
        if storage.device.type == "meta":
            tracker.resized(storage, size)
        return found

    stack.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", resize))


def _autocast(stack: ExitStack, functions: Any) -> None:
    """Drop the casts when the outermost autocast is left."""
    original = torch.clear_autocast_cache

    def clear() -> None:
        functions.clear()
        original()

    stack.enter_context(mock.patch.object(torch, "clear_autocast_cache", clear))


def _backward(stack: ExitStack, functions: Any) -> None:
    """Let a forward pass that backward repeats be seen as the first one was: modes are off while one is served."""
    original = torch.autograd._engine_run_backward

    def run(*arguments: Any, **named: Any) -> Any:
        with functions:
            return original(*arguments, **named)

    stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", run))
