"""``module:function``: the user's own module, inputs and step. It is the user's code, and it runs.

The function takes no arguments, or any of ``micro_batch`` and ``seq_len`` by name. It runs with meta as the default
device, and returns one of

* ``module, inputs``: inputs a tensor, a tuple of positional or a dict of named arguments;
* ``module, step``: ``step()`` does one whole step by itself, optimizer included;
* a dict of ``module`` and ``inputs`` or ``step``, and if wished ``loss`` (``loss(outputs) -> scalar``) and
  ``optimizer`` (``optimizer(parameters) -> torch.optim.Optimizer``).

The loss of ``module, inputs`` is ``outputs.loss``, else the output itself where it is a scalar, else its sum.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ullage.errors import InputError
from ullage.i18n import _
from ullage.trace.job import TraceJob

_KEYS = {"module", "inputs", "step", "loss", "optimizer"}


class Traced:
    """What a user's function gave."""

    def __init__(
        self, module: Any, inputs: Any = None, step: Any = None, loss: Any = None, optimizer: Any = None
    ) -> None:
        self.module, self.inputs, self.step, self.loss, self.optimizer = module, inputs, step, loss, optimizer

    def call(self, module: Any, inputs: Any) -> Any:
        """Run the module on its inputs."""
        if isinstance(inputs, dict):
            return module(**inputs)
        return module(*inputs) if isinstance(inputs, (tuple, list)) else module(inputs)

    def loss_of(self, module: Any, inputs: Any) -> Any:
        """Return the outputs, or the loss that the user's function makes of them."""
        outputs = self.call(module, inputs)
        if self.loss is not None:
            return self.loss(outputs)
        if isinstance(outputs, torch.Tensor) or getattr(outputs, "loss", None) is not None:
            return outputs
        if isinstance(outputs, dict) and isinstance(outputs.get("loss"), torch.Tensor):
            return outputs
        tensors = [each for each in _leaves(outputs) if each.requires_grad]
        if not tensors:
            raise InputError(_("no output of the module depends on its parameters"), remedy=_("give a loss function"))
        return tensors[0].float().sum()


def _leaves(outputs: Any) -> list[Any]:
    from torch.utils._pytree import tree_leaves

    return [each for each in tree_leaves(outputs) if isinstance(each, torch.Tensor)]


def load_function(text: str) -> Callable[..., Any]:
    """Import ``module:function``; ``path/file.py:function`` will do too.

    Raises:
        InputError: no such module or function.
    """
    module_name, _colon, name = text.rpartition(":")
    path = Path(module_name)
    if module_name.endswith(".py"):
        if not path.is_file():
            raise InputError(_("no such file"), where=module_name)
        sys.path.insert(0, str(path.resolve().parent))
        module_name = path.stem
    elif "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(_("there is no module {name!r}").format(name=error.name), where=text) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(_("the module has no function {name!r}").format(name=name), where=text)
    return function  # type: ignore[no-any-return]


def call_function(function: Callable[..., Any], job: TraceJob, where: str) -> Traced:
    """Call a user's function on meta tensors, and understand what it gives.

    Raises:
        InputError: it gives something else.
    """
    takes = inspect.signature(function).parameters
    options = {"micro_batch": job.micro_batch, "seq_len": job.seq_len}
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in takes.values()):
        given = options
    else:
        given = {name: value for name, value in options.items() if name in takes}
    with torch.device("meta"):
        found = function(**given)
    return _understand(found, where)


def _understand(found: Any, where: str) -> Traced:
    wrong = InputError(
        _("the function must return (module, inputs), (module, step) or a dict, not {kind}").format(
            kind=type(found).__name__
        ),
        where=where,
        remedy=_("see docs/trace.md"),
    )
    if isinstance(found, dict):
        unknown = sorted(set(map(str, found)) - _KEYS)
        if unknown or "module" not in found:
            raise InputError(
                _("unknown keys {keys}").format(keys=", ".join(unknown))
                if unknown
                else _("the key 'module' is missing"),
                where=where,
                remedy=_("known are {known}").format(known=", ".join(sorted(_KEYS))),
            )
        traced = Traced(**found)
    elif isinstance(found, tuple) and len(found) == 2:
        module, other = found
        is_step = callable(other) and not isinstance(other, torch.Tensor)
        traced = Traced(module, step=other) if is_step else Traced(module, inputs=other)
    else:
        raise wrong
    if not isinstance(traced.module, torch.nn.Module) or (traced.inputs is None) == (traced.step is None):
        raise wrong
    return traced


def to_meta(model: Any) -> None:
    """Move parameters and buffers that were made on the host, shared ones together."""
    moved: dict[int, Any] = {}
    for module in model.modules():
        for name, each in list(module._parameters.items()):
            if each is not None and each.device.type != "meta":
                if id(each) not in moved:
                    moved[id(each)] = torch.nn.Parameter(each.detach().to("meta"), each.requires_grad)
                module._parameters[name] = moved[id(each)]
        for name, each in list(module._buffers.items()):
            if each is not None and each.device.type != "meta":
                moved.setdefault(id(each), each.to("meta"))
                module._buffers[name] = moved[id(each)]
