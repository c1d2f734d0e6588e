"""DistributedDataParallel: a rank that failed still does its part of the collectives, then all ranks vote.

The gradients of a window are reduced in its last backward. A rank out of memory skips the rest of its work, but
hands DDP's reducer a gradient (of nothing) for each parameter that it still waits for: the others' all-reduces end,
and the vote before the optimizer's step tells them to throw the result away. The undisturbed step is DDP's own, with
its buckets, its overlap and its comm hooks; it costs one vote.

Rests on: torch@2.13.0:csrc/autograd/functions/accumulate_grad.cpp (an undefined gradient is skipped, the hooks run)
and torch@2.13.0:csrc/distributed/c10d/reducer.cpp:Reducer::mark_variable_ready_dense (it then reduces zeros).
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from ullage.errors import InputError
from ullage.guard.parallel import Parallel
from ullage.guard.votes import Votes
from ullage.i18n import _


class _Nothing(torch.autograd.Function):
    """Depends on every parameter, and gives none of them a gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Any, *parameters: Any) -> Any:
        ctx.num_parameters = len(parameters)
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, _gradient: Any) -> Any:
        return (None,) * (1 + ctx.num_parameters)


class _Stand(torch.nn.Module):
    """Takes the place of the module for one forward."""

    def __init__(self, parameters: list[Any]) -> None:
        super().__init__()
        self.__dict__["held"] = parameters

    def forward(self) -> Any:
        """Return a scalar that depends on every parameter."""
        return nothing(self.__dict__["held"])


def nothing(parameters: list[Any]) -> Any:
    """Return a scalar whose backward runs the hooks of the parameters' accumulators without a gradient."""
    anchor = torch.zeros(1, device=parameters[0].device, requires_grad=True)
    return _Nothing.apply(anchor, *parameters)


class Ddp(Parallel):
    """What a window of micro-batches needs around a DDP module."""

    def __init__(self, module: Any, votes: Votes) -> None:
        super().__init__(votes)
        self.module = module
        self.parameters = [each for each in module.module.parameters() if each.requires_grad]
        self._prepared = False
        module.register_forward_hook(self._after_forward)

    def _after_forward(self, _module: Any, _inputs: Any, _output: Any) -> None:
        if torch.is_grad_enabled() and self.module.require_backward_grad_sync:
            self._prepared = True

    def begin(self, num_micro: int) -> int:
        """Do DDP's own collectives of a forward now, while every rank is known to be well."""
        self._prepared = False
        if self.module._check_sync_bufs_pre_fwd():
            self.module._sync_buffers()
        self.module.require_forward_param_sync = False
        if self.module._lazy_init_ran:
            self.module.reducer._rebuild_buckets()
        return num_micro

    def micro(self, last: bool) -> Any:
        """Reduce gradients only in the last micro-batch of the window."""
        return contextlib.nullcontext() if last else self.module.no_sync()

    def vote_point(self) -> None:
        """Refuse: a rank that failed here does its part of DDP's collectives and of no others."""
        raise InputError(
            _("a window of DDP cannot have collectives of its own before its end"),
            remedy=_("move them behind guard.gradients"),
        )

    def join(self) -> bool:
        """Do this rank's part of the all-reduces that the others wait for; False: no vote has been cast."""
        if self._prepared:
            self._finish_backward()
        else:
            self._empty_pass()
        return False

    def _empty_pass(self) -> None:
        kept = self.module._modules["module"]
        self.module._modules["module"] = _Stand(self.parameters)
        try:
            with torch.enable_grad():
                output = self.module()
        finally:
            self.module._modules["module"] = kept
        output.backward()

    def _finish_backward(self) -> None:
        for parameter in self.parameters:  # the reducer refuses those it has, and is left as it was
            try:
                nothing([parameter]).backward()
            except RuntimeError as error:  # noqa: PERF203
                if "only once" not in str(error):
                    raise
