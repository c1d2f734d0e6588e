"""FSDP2 (``fully_shard``): its comm objects let the guard vote before each all-gather and reduce-scatter.

Rests on: torch@2.13.0:distributed/fsdp/_fully_shard/_fsdp_collectives.py (the comm objects, called after allocation)
and _fully_shard.py:FSDPModule.reset_iter_state.
"""

from __future__ import annotations

from typing import Any

from ullage.guard.listed import Listed
from ullage.guard.votes import Votes


class _Watched:
    """A comm object of FSDP2 that lets the guard know, or vote, before each call."""

    def __init__(self, inner: Any, owner: Fsdp2) -> None:
        self.inner, self.owner = inner, owner

    def allocate(self, *sizes: Any, **options: Any) -> Any:
        """Allocate as the inner object does."""
        return self.inner.allocate(*sizes, **options)

    def __call__(self, *operands: Any, **options: Any) -> Any:
        """Vote if the window is voted on, note the call, and make it."""
        self.owner.before(self.inner, operands, options)
        return self.inner(*operands, **options)


class Fsdp2(Listed):
    """What a window of micro-batches needs around a module under ``fully_shard``."""

    def __init__(self, module: Any, votes: Votes, *, always_vote: bool = False) -> None:
        self.groups = [group for each in module.modules() for group in _groups(each)]
        super().__init__(module, votes, always_vote=always_vote or any(group._is_hsdp for group in self.groups))
        for group in self.groups:
            for name in ("_all_gather_comm", "_reduce_scatter_comm"):
                inner = getattr(group, name)
                inner = inner.inner if isinstance(inner, _Watched) else inner  # of an earlier guard
                setattr(group, name, _Watched(inner, self))

    def shard_again(self) -> None:
        """Shard all parameters again, by FSDP2's own means."""
        self.module.reset_iter_state()


def _groups(module: Any) -> list[Any]:
    """Return the parameter groups whose collectives belong to a module."""
    state = module._get_fsdp_state() if hasattr(module, "_get_fsdp_state") else None
    return list(getattr(state, "_fsdp_param_groups", None) or ())
