"""Watch every operator of a step on meta tensors and write down each storage from its birth to its death."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ullage import garbage
from ullage.trace.recorder import events as names
from ullage.trace.recorder.accumulation import Accumulation
from ullage.trace.recorder.collectives import Collectives
from ullage.trace.recorder.data_dependent import HANDLERS
from ullage.trace.recorder.events import Allocation, Trace, classify
from ullage.trace.recorder.positions import Positions, clean_path
from ullage.trace.recorder.shadows import Routing, Shadows
from ullage.trace.recorder.temporaries import Kernels, hidden_temporaries

_SKIPPED_STACK = ("/torch/", "/ullage/trace/", "<frozen")


class Tracker(TorchDispatchMode):
    """The mode under which a step is traced. ``kernels`` says for which GPU, ``routing`` how experts are chosen."""

    def __init__(self, *, kernels: Kernels, routing: Routing, stacks: bool = False) -> None:
        super().__init__()
        self.positions, self.shadows, self.kernels = Positions(), Shadows(routing), kernels
        self.trace = Trace(places=self.positions.places)
        self._live: dict[int, tuple[Any, int]] = {}
        self._stacks: dict[tuple[str, ...], int] | None = {} if stacks else None
        self._workspaces: set[bool] = set()
        self._accumulation = Accumulation()
        self._collectives = Collectives()
        self._unwrapped: Any = None
        self._hooks: list[Any] = []
        self.stream = 0
        self._purpose = ""
        self.wrappers: tuple[type, ...] = ()  # tensors that run their operators on others, which are traced
        self.kept: list[Any] = []  # what a program would still hold when the trace ends

    # ------------------------------------------------------------------------------------------------ operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and write down what it makes."""
        if self.wrappers and any(issubclass(each, self.wrappers) for each in types):
            self._unwrapped = func
            return NotImplemented
        kwargs = kwargs or {}
        if func is self._unwrapped:  # for a wrapper, which is a subclass to the engine: never in place
            self._unwrapped = None
        else:
            func = self._accumulation.in_place(func, args)
        handler = HANDLERS.get(func) or self._collectives.handler_of(func)
        out = handler(self, func, args, kwargs) if handler is not None else NotImplemented
        if out is NotImplemented:
            out = func(*args, **kwargs)
        self._record(func, args, kwargs, out)
        if not isinstance(out, torch.Tensor) or not out.dtype.is_floating_point:
            self.shadows.follow(func, args, kwargs, out)
        return out

    def _record(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = func._schema.name.removeprefix("aten::")
        self._workspace(name)
        category = names.COMMUNICATION if name.startswith(names.COLLECTIVE) else ""
        listed = isinstance(out, (list, tuple))
        for index, each in enumerate(out if listed else (out,)):
            if isinstance(each, torch.Tensor) and each.device.type == "meta":
                self.note(each, name, like=(args, index if listed else None), category=category)
            elif isinstance(each, (list, tuple)):
                for one in tree_leaves(each):
                    if isinstance(one, torch.Tensor) and one.device.type == "meta":
                        self.note(one, name)
        self.burst(name, hidden_temporaries(func, args, kwargs, out))

    def burst(self, name: str, sizes: list[int]) -> None:
        """Write down temporaries that a kernel takes and gives back within itself."""
        numbers = [self.take(size, name, category=names.TEMPORARY) for size in sizes if size]
        for number in reversed(numbers):
            self.give_back(number)

    def _workspace(self, name: str) -> None:
        """Take the workspace of cuBLAS at the first product of each thread: backward runs in a thread of its own.

        Source: torch@2.13.0:aten/src/ATen/cuda/CublasHandlePool.cpp:getWorkspaceForHandle.
        """
        if name in self.kernels.PRODUCTS:
            thread = torch._C._current_graph_task_id() != -1
            if thread not in self._workspaces:
                self._workspaces.add(thread)
                self.take(self.kernels.workspace_bytes, "cublas", category=names.WORKSPACE)

    # ------------------------------------------------------------------------------------------------- storages

    def note(self, tensor: Any, op: str, *, like: Any = None, category: str = "", owner: str = "") -> None:
        """Write down the storage of a tensor unless it is known; it is given back when the storage dies."""
        if isinstance(tensor, self.wrappers):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size = storage.nbytes()
        if not size:
            return
        if self.positions.forced and not owner and like is not None:
            owner = self._owner_of(like)
        number = self.take(
            size, op, category=category, owner=owner, dtype=str(tensor.dtype)[6:], shape=tuple(tensor.shape)
        )
        self._live[key] = (weakref.ref(storage, partial(self._died, key)), number)

    def take(
        self, size: int, op: str, *, category: str = "", owner: str = "", dtype: str = "", shape: tuple[int, ...] = ()
    ) -> int:
        """Write down one allocation at this place."""
        trace, place = self.trace, self.positions.now()
        trace.allocations.append(
            Allocation(
                size_bytes=size,
                place=place,
                op=op,
                category=category or self._purpose or (names.COMMUNICATION if self.stream else ""),
                owner=owner,
                dtype=dtype,
                shape=shape,
                stack=self._stack(),
                stream=self.stream,
            )
        )
        number = len(trace.allocations) - 1
        trace.events.append(number)
        trace.where.append(place)
        return number

    @contextmanager
    def taking_for(self, category: str) -> Iterator[None]:
        """Say what is taken, for as long as the context lasts."""
        before, self._purpose = self._purpose, category
        try:
            yield
        finally:
            self._purpose = before

    def give_back(self, number: int) -> None:
        """Write down the end of an allocation."""
        self.trace.events.append(~number)
        self.trace.where.append(self.positions.now())

    def _died(self, key: int, _reference: Any) -> None:
        found = self._live.pop(key, None)
        self.shadows.forget(key)
        if found is not None:
            self.give_back(found[1])

    def resized(self, storage: Any, size: int) -> None:
        """Write down that a storage was given another size (FSDP frees and refills its storages)."""
        key = storage._cdata
        found = self._live.pop(key, None)
        if found is not None:
            self.give_back(found[1])
        if size:
            old = self.trace.allocations[found[1]] if found is not None else None
            number = self.take(size, "resize_", category=old.category if old else "", owner=old.owner if old else "")
            self._live[key] = (weakref.ref(storage, partial(self._died, key)), number)

    def number_of(self, tensor: Any) -> int | None:
        """Return the allocation that holds a tensor."""
        found = self._live.get(tensor.untyped_storage()._cdata)
        return None if found is None else found[1]

    def mark(self, tensor: Any, category: str, owner: str = "") -> None:
        """Say what a tensor is; a storage not yet known is written down now."""
        if not isinstance(tensor, torch.Tensor) or tensor.device.type != "meta":
            return
        local = getattr(tensor, "_local_tensor", tensor)
        local = getattr(local, "elem", local) if isinstance(local, self.wrappers) else local
        self.note(local, category, category=category, owner=owner)
        number = self.number_of(local)
        if number is not None:
            allocation = self.trace.allocations[number]
            allocation.category = category
            allocation.owner = owner or allocation.owner
            allocation.dtype, allocation.shape = str(local.dtype)[6:], tuple(local.shape)

    def _owner_of(self, like: Any) -> str:
        """Return the parameter that an optimizer's operator works for: the one that owns its (matching) input."""
        args, index = like
        for argument in args:
            each = argument
            if isinstance(argument, (list, tuple)) and index is not None:
                each = argument[index] if index < len(argument) else None
            if isinstance(each, torch.Tensor) and each.device.type == "meta":
                number = self.number_of(each)
                return self.trace.allocations[number].owner if number is not None else ""
        return ""

    def _stack(self) -> int:
        if self._stacks is None:
            return -1
        found: list[str] = []
        frame: Any = sys._getframe(2)
        while frame is not None and len(found) < 40:
            code = frame.f_code
            if not any(part in code.co_filename for part in _SKIPPED_STACK):
                found.append(f"{code.co_filename}:{frame.f_lineno}:{code.co_name}")
            frame = frame.f_back
        number = self._stacks.setdefault(tuple(found), len(self._stacks))
        if number == len(self.trace.stacks):
            self.trace.stacks.append(tuple(found))
        return number

    # ------------------------------------------------------------------------------------------------ lifecycle

    def hold(self, model: Any) -> None:
        """Write down parameters and buffers, and watch for gradients."""
        self.positions.learn(model)
        with self.positions.phase(names.SETUP):
            for path, parameter in model.named_parameters():
                self.mark(parameter, names.PARAMETER, clean_path(path))
            for path, buffer in model.named_buffers():
                self.mark(buffer, names.BUFFER, clean_path(path))
        for parameter in model.parameters():
            if parameter.requires_grad:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._gradient))

    def _gradient(self, parameter: Any) -> None:
        if parameter.grad is not None:
            self.mark(parameter.grad, names.GRADIENT, self.positions.owner(parameter))

    def _stepped(self, optimizer: Any) -> None:
        for parameter, state in optimizer.state.items():
            for value in tree_leaves(state):
                self.mark(value, names.OPTIMIZER_STATE, self.positions.owner(parameter))

    @contextmanager
    def watching(self) -> Iterator[Tracker]:
        """Trace what runs inside. Cycles are not collected meanwhile, so that two traces of one step are equal."""
        self._accumulation.calibrate()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # only small integers are computed for real
        try:
            with garbage.paused(), self.positions.followed(self._stepped), self:
                yield self
        finally:
            torch.set_num_threads(threads)
            self._live.clear()
            for hook in self._hooks:
                hook.remove()
            self.kept.clear()
            self._collectives.clear()
            if self.shadows.chose:
                self.trace.assumed.append(self.routing_sentence())
            classify(self.trace)

    def routing_sentence(self) -> str:
        """Say how tokens were spread over the experts."""
        from ullage.i18n import _

        skew = self.shadows.routing.skew
        if not skew:
            return _("every expert gets the same number of tokens; see --routing-skew")
        return _("expert e is chosen in proportion to 1 / (e + 1)^{skew}").format(skew=skew)
