"""The knobs that a running job can turn besides its micro-batch: recompute and offload."""

from __future__ import annotations

import contextlib
from typing import Any

from ullage.errors import InputError
from ullage.guard.plan import Plan
from ullage.i18n import _


class Switches:
    """Switch on what the plan asks for, and give the context in which forwards run."""

    def __init__(self, model: Any, recompute: Any, offload: Any) -> None:
        self._recompute, self._offload = recompute, offload
        self._recomputing = self._offloading = False
        self._hooks = False
        self._model = model
        if recompute == "auto" and self._enabler() is None:
            raise InputError(
                _("this model has no gradient_checkpointing_enable"),
                remedy=_("give recompute= a function that switches activation checkpointing on"),
            )

    def _enabler(self) -> Any:
        model = self._model
        while model is not None:
            if hasattr(model, "gradient_checkpointing_enable"):
                return model.gradient_checkpointing_enable
            model = getattr(model, "module", None)
        return None

    def apply(self, plan: Plan) -> None:
        """Switch on what the plan has and the job has not yet."""
        if plan.get("recompute", "none") == "full" and not self._recomputing and self._recompute is not None:
            self._recomputing = True
            if self._recompute == "auto":
                self._enabler()(gradient_checkpointing_kwargs={"use_reentrant": False})
            else:
                self._recompute(True)
        if plan.get("offload", False) and not self._offloading and self._offload is not None:
            self._offloading = True
            if self._offload == "auto":
                self._hooks = True
            else:
                self._offload(True)

    def forward(self) -> Any:
        """Return the context of a forward: with offload, what autograd saves is kept in host memory."""
        if not self._hooks:
            return contextlib.nullcontext()
        import torch

        return torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())
