"""The optimizers of a traced step, as they run on a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch

from ullage.errors import InputError
from ullage.i18n import _
from ullage.trace.job import TraceJob
from ullage.units import cdiv

#: Elements that share one scale. Source: bitsandbytes@0.48.1:optim/optimizer.py:Optimizer2State (block_wise).
BLOCK = 256
#: Smaller tensors keep fp32 states. Source: as above (min_8bit_size).
LEAST_8BIT = 4096


class Adam8bit(torch.optim.Optimizer):
    """AdamW with two 8-bit states per element: a stand-in that allocates what bitsandbytes' AdamW8bit does.

    Formula: per element 2 x 1 byte; per 256 elements 2 x 4 bytes; two tables of 256 x 4 bytes for all; below 4096
        elements 2 x 4 bytes per element. The update is one kernel without temporaries.
    Source: bitsandbytes@0.48.1:optim/optimizer.py:Optimizer2State.init_state, update_step.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})
        self._maps: list[Any] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Make the states where there are none."""
        for group in self.param_groups:
            for each in group["params"]:
                if each.grad is not None and not self.state[each]:
                    self._begin(each)

    def _begin(self, parameter: Any) -> None:
        state = self.state[parameter]
        parameter = getattr(parameter, "_local_tensor", parameter)  # of a shard, this rank's
        if parameter.numel() < LEAST_8BIT:
            state["state1"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["state2"] = torch.zeros_like(parameter, dtype=torch.float32)
            return
        if not self._maps:
            self._maps = [torch.empty(256, dtype=torch.float32, device=parameter.device) for _each in range(2)]
        blocks = cdiv(parameter.numel(), BLOCK)
        for name in ("state1", "state2"):
            state[name] = torch.zeros_like(parameter, dtype=torch.uint8)
        state["qmap1"], state["qmap2"] = self._maps
        for name in ("absmax1", "absmax2"):
            state[name] = torch.zeros((blocks,), dtype=torch.float32, device=parameter.device)


def by_mesh(parameters: list[Any]) -> list[list[Any]]:
    """Return parameters by the mesh that they lie on: one call of a fused or foreach kernel takes one mesh.

    Source: transformers@5.23.0:trainer.py:create_optimizer (has_mixed_dtensor).
    """
    groups: dict[Any, list[Any]] = {}
    for each in parameters:
        groups.setdefault(getattr(each, "device_mesh", None), []).append(each)
    return list(groups.values())


def make_optimizer(job: TraceJob, model: Any) -> Any:
    """Return the optimizer of the job's step, None without one.

    Raises:
        InputError: nothing is trained, or this PyTorch lacks the optimizer.
    """
    trained = [each for each in model.parameters() if each.requires_grad]
    if not trained:
        raise InputError(_("no parameter of the module is trained"), remedy=_("trace it with --inference"))
    if job.optimizer == "none":
        return None
    if job.optimizer == "adamw8bit":
        return Adam8bit(trained)
    how = {"foreach": job.implementation == "foreach"}
    if job.implementation == "fused":
        how = {"fused": True}
    groups = [{"params": each} for each in by_mesh(trained)]
    if job.optimizer in ("adamw", "adam"):
        return (torch.optim.AdamW if job.optimizer == "adamw" else torch.optim.Adam)(groups, lr=1e-5, **how)
    if job.optimizer.startswith("sgd"):
        return torch.optim.SGD(groups, lr=1e-5, momentum=0.9 if "momentum" in job.optimizer else 0.0, **how)
    name = {"adafactor": "Adafactor", "muon": "Muon"}[job.optimizer]
    made = getattr(import_module("torch.optim"), name, None)
    if made is None:
        raise InputError(_("this PyTorch has no optimizer {name}").format(name=name))
    if name == "Muon":
        matrices = [each for each in trained if each.dim() == 2]
        if len(matrices) < len(trained):
            raise InputError(
                _("Muon of PyTorch takes matrices only, and this model has tensors of other shapes"),
                remedy=_("trace your own step with module:function"),
            )
    return made(trained, lr=1e-5)
