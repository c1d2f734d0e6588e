"""Where the program is: the phase of the step, and the module whose operator runs, in forward and in backward."""

from __future__ import annotations

import importlib
import weakref
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules import module as module_hooks

from ullage.trace.recorder.events import BACKWARD, FORWARD, OPTIMIZER, RECOMPUTE, Place

#: Parts of a path that wrappers put in.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "_orig_mod.", "module.")


def clean_path(path: str) -> str:
    """Return the path of a module without what wrappers put in."""
    for wrapper in _WRAPPERS[:3]:
        path = path.replace(wrapper, "")
    return path.removeprefix(_WRAPPERS[3])


def _sequence(node: Any) -> int:
    return -1 if node is None else node._sequence_nr()


class Positions:
    """Follows modules by global hooks, and backward by the numbers of autograd's nodes.

    Every node knows its sequence number; every entry to and exit from a module notes the number that the next node will
    get. The module that made a node is then the last one noted before it. Nothing is hooked into the graph itself.
    """

    def __init__(self) -> None:
        self.places: list[Place] = []
        self.step = self.micro_batch = 0
        self.forced = ""
        self._index: dict[tuple[str, str, int, int], int] = {}
        self._paths: dict[int, str] = {}
        self._owners: dict[int, str] = {}
        self._stack: list[str] = []
        self._numbers: list[int] = []
        self._makers: list[str] = []
        self._parent: tuple[int, str] = (-1, "")
        self._left_by: dict[int, Any] = {}
        self._repeating = 0  # modules that were entered in backward

    def learn(self, root: Any) -> None:
        """Learn the paths of a model's modules and parameters."""
        for path, each in root.named_modules():
            self._paths.setdefault(id(each), clean_path(path))
        for path, parameter in root.named_parameters():
            self._owners.setdefault(id(parameter), clean_path(path))

    def owner(self, parameter: Any) -> str:
        """Return the path of a parameter."""
        return self._owners.get(id(parameter), "")

    def stands_for(self, parameter: Any, other: Any) -> None:
        """Say that a parameter is another in another shape: whole instead of its shard."""
        self._owners[id(parameter)] = self.owner(other)

    def now(self) -> int:
        """Return the number of the place where the program is."""
        if torch._C._current_graph_task_id() == -1:
            phase, module = self.forced or FORWARD, self._stack[-1] if self._stack else ""
        elif torch.is_grad_enabled() or self._repeating:
            # autograd turns gradients off in backward, whoever recomputes turns them on; a function's forward has none
            phase, module = RECOMPUTE, self._stack[-1] if self._stack else self._repeated()
        else:
            phase, module = BACKWARD, self._maker(torch._C._current_autograd_node())
        return self.number(phase, module)

    def number(self, phase: str, module: str) -> int:
        """Return the number of a place."""
        key = (phase, module, self.step, self.micro_batch)
        found = self._index.get(key)
        if found is None:
            found = self._index[key] = len(self.places)
            self.places.append(Place(phase=phase, module=module, step=self.step, micro_batch=self.micro_batch))
        return found

    def _maker(self, node: Any) -> str:
        """Return the path of the module in which a node of the graph was made."""
        if node is None:
            return ""
        variable = getattr(node, "variable", None)
        if variable is not None:
            return self._owners.get(id(variable), "").rpartition(".")[0]
        at = bisect_right(self._numbers, node._sequence_nr()) - 1
        return self._makers[at] if at >= 0 else ""

    def _enter(self, module: Any, _arguments: Any) -> None:
        path = self._paths.get(id(module))
        if path is None:
            path = f"{self._stack[-1]}.{type(module).__name__}" if self._stack else type(module).__name__
        if id(module) not in self._left_by:  # behind the hooks of wrappers: what they do belongs to the module
            self._left_by[id(module)] = module.register_forward_hook(self._leave, always_call=True)
        self._stack.append(path)
        self._repeating = self._repeating + 1 if torch._C._current_graph_task_id() != -1 else 0
        self._note(path)

    def _leave(self, _module: Any, _arguments: Any, _result: Any) -> None:
        left = self._stack.pop() if self._stack else ""
        self._repeating = max(0, self._repeating - 1)
        if not self._stack and torch._C._current_graph_task_id() != -1:
            self._parent = (_sequence(torch._C._current_autograd_node()), left.rpartition(".")[0])
            self._note(self._parent[1])
        else:
            self._note(self._stack[-1] if self._stack else "")

    def _repeated(self) -> str:
        """Return the module whose ``forward`` is repeated without its hooks: the parent of the one that ran last."""
        node = torch._C._current_autograd_node()
        return self._parent[1] if self._parent[0] == _sequence(node) else self._maker(node)

    def _note(self, path: str) -> None:
        self._numbers.append(torch._C._autograd._get_sequence_nr())
        self._makers.append(path)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Say what is being done, for as long as the context lasts."""
        before, self.forced = self.forced, name
        try:
            yield
        finally:
            self.forced = before

    @contextmanager
    def followed(self, on_step: Any) -> Iterator[None]:
        """Follow modules and optimizers; ``on_step(optimizer)`` is called after each step."""
        mine = weakref.proxy(self)

        def before(*_arguments: Any) -> None:
            mine.forced = OPTIMIZER

        def after(optimizer: Any, *_arguments: Any) -> None:
            on_step(optimizer)
            mine.forced = ""

        optimizer_hooks = importlib.import_module("torch.optim.optimizer")
        handles = [
            module_hooks.register_module_forward_pre_hook(self._enter),
            optimizer_hooks.register_optimizer_step_pre_hook(before),
            optimizer_hooks.register_optimizer_step_post_hook(after),
        ]
        try:
            yield
        finally:
            for handle in (*handles, *self._left_by.values()):
                handle.remove()
            self._left_by.clear()
