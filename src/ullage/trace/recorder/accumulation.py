"""Where autograd writes into a tensor of its own: in place on a GPU, out of place under a dispatch mode."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

#: Files of frames between an operator and its dispatch mode.
_BETWEEN = ("eval_frame.py", "_compile.py", "_python_dispatch.py", "accumulation.py")
_aten = torch.ops.aten
#: What derivatives lay into new zeros with, and the same in place.
_INTO_ZEROS = {
    _aten.index_put.default: _aten.index_put_.default,
    _aten.scatter.src: _aten.scatter_.src,
    _aten.scatter_add.default: _aten.scatter_add_.default,
    _aten.index_add.default: _aten.index_add_.default,
}


class Accumulation:
    """Tell whether the engine would have added in place had no mode been watching.

    A dispatch mode makes every tensor look like a subclass to the engine, which then allocates a new sum; a real run
    writes into the older gradient when nothing else holds it. What "nothing else" counts as is measured once, on a
    graph in which it is so.

    Source: torch@2.13.0:torch/csrc/autograd/input_buffer.cpp:can_accumulate_inplace (dense, last reference);
        torch/include/ATen/TensorSubclassLikeUtils.h (dispatch_mode_enabled).
    """

    def __init__(self) -> None:
        self._alone: tuple[int, int] | None = None

    def in_place(self, func: Any, args: Any) -> Any:
        """Return the operator that a run without a mode takes: one that writes in place, or ``func`` itself.

        Derivatives lay a gradient into zeros that they have just made; under a mode they do it out of place.
        Source: torch@2.13.0:torch/csrc/autograd/FunctionsManual.cpp:index_backward, value_selecting_reduction_backward,
            gather_backward, index_select_backward (areAnyTensorSubclassLike).
        """
        if func is torch.ops.aten.add.Tensor:
            return torch.ops.aten.add_.Tensor if self._adds_in_place(args) else func
        written = _INTO_ZEROS.get(func)
        if written is None or torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled():
            return func
        return written if _engine_calls() else func

    def _adds_in_place(self, args: Any) -> bool:
        """Say whether this addition is one that the engine would do in place."""
        if torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled() or len(args) != 2:
            return False
        old, new = args
        if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor) or self._alone is None:
            return False
        if old.shape != new.shape or old.dtype != new.dtype or not _is_dense(old):
            return False
        return _counts(old) <= self._alone and _engine_calls()

    def calibrate(self) -> None:
        """Measure the reference counts of a gradient that only the engine holds."""
        if self._alone is None:
            probe = _Probe()
            source = torch.empty(2, device="meta", requires_grad=True)
            doubled = source * 2
            total = torch.sin(doubled) + torch.cos(doubled)
            del doubled
            with probe:
                total.sum().backward()
            self._alone = probe.counts


class _Probe(TorchDispatchMode):
    counts: tuple[int, int] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.add.Tensor:
            self.counts = self.look(args)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def look(args: Any) -> tuple[int, int]:
        old, _new = args
        return _counts(old)


def _counts(tensor: Any) -> tuple[int, int]:
    return tensor._use_count(), torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def _engine_calls() -> bool:
    """Say whether the engine itself calls the operator; a backward written in Python adds by its own frame."""
    frame = sys._getframe(1)
    while _is_between(frame.f_code) and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_name == "_engine_run_backward"


def _is_between(code: Any) -> bool:
    return bool(code.co_name == "__torch_dispatch__" or code.co_filename.endswith(_BETWEEN))


def _is_dense(tensor: Any) -> bool:
    return bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))
