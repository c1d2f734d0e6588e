"""FSDP2 (``fully_shard``): the ranks vote before each all-gather and reduce-scatter, until the order is known.

A vote stands between the allocation of a collective's buffers and the collective itself, where nothing can run out of
memory any more: a rank that fails casts its vote in place of the next collective, and the others raise there.

When a window has gone through once, the list of its collectives is known, and the next windows with as many
micro-batches run without votes: a rank that fails then joins the rest of the list with zeros, and the vote at the end
tells all to throw the result away. That costs an undisturbed step nothing but that one vote.

Rests on: torch@2.13.0:distributed/fsdp/_fully_shard/_fsdp_collectives.py (the comm objects, called after allocation)
and _fully_shard.py:FSDPModule.reset_iter_state.
"""

from __future__ import annotations

from typing import Any

import torch

from ullage.errors import InputError
from ullage.guard.parallel import Parallel
from ullage.guard.votes import Votes
from ullage.i18n import _

MAX_LISTS = 16


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


class Fsdp2(Parallel):
    """What a window of micro-batches needs around a module under ``fully_shard``."""

    def __init__(self, module: Any, votes: Votes, *, always_vote: bool = False) -> None:
        super().__init__(votes)
        self.module = module
        self.groups = [group for each in module.modules() for group in _groups(each)]
        self.always_vote = always_vote or any(group._is_hsdp for group in self.groups)
        self._known: dict[int, tuple[Any, ...]] = {}
        self._issued: list[Any] = []
        self._active = self._armed = False
        self._num_micro = 0
        for group in self.groups:
            for name in ("_all_gather_comm", "_reduce_scatter_comm"):
                inner = getattr(group, name)
                inner = inner.inner if isinstance(inner, _Watched) else inner  # of an earlier guard
                setattr(group, name, _Watched(inner, self))

    def begin(self, num_micro: int) -> int:
        """Agree on the number of micro-batches: every rank must issue the same collectives."""
        self._num_micro = self.votes.vote(count=num_micro).count
        self._issued = []
        self._armed = self.always_vote or self._num_micro not in self._known
        self._active, self._voted = True, False
        return self._num_micro

    def before(self, inner: Any, operands: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Vote before a collective where the window is voted on, and note it."""
        if not self._active:
            return
        if self._armed:
            super().vote_point()
        self._issued.append((inner, _outline(operands), {key: _outline(value) for key, value in options.items()}))

    def vote_point(self) -> None:
        """Vote before a collective of the job's own, in windows that are voted on."""
        _own_collectives(self.always_vote)
        super().vote_point()

    def join(self) -> bool:
        """Vote in place of the next collective, or join the rest of the known ones with zeros."""
        self._active = False
        self.module.reset_iter_state()
        if self._armed:
            return super().join()
        for inner, operands, options in self._known[self._num_micro][len(self._issued) :]:
            work = inner(*_made(operands), **{key: _made(value) for key, value in options.items()})
            if work is not None:
                work.wait()
        return False

    def reset(self) -> None:
        """Shard all parameters again and forget what is in flight."""
        self._active = False
        self.module.reset_iter_state()

    def good(self) -> None:
        """Remember the collectives of this window."""
        self._active = False
        if self._armed:
            if len(self._known) >= MAX_LISTS:
                self._known.pop(next(iter(self._known)))
            self._known[self._num_micro] = tuple(self._issued)


class _Outline:
    """Size, type and device of a tensor, without it."""

    __slots__ = ("device", "dtype", "shape")

    def __init__(self, tensor: Any) -> None:
        self.shape, self.dtype, self.device = tuple(tensor.shape), tensor.dtype, tensor.device


def _outline(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_outline(each) for each in value)
    return _Outline(value) if isinstance(value, torch.Tensor) else value


def _made(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_made(each) for each in value)
    if isinstance(value, _Outline):
        return torch.zeros(value.shape, dtype=value.dtype, device=value.device)
    return value


def _own_collectives(always_vote: bool) -> None:
    if not always_vote:
        raise InputError(
            _("a collective of the job's own beside those of FSDP2 needs every vote"), remedy=_("give votes='always'")
        )


def _groups(module: Any) -> list[Any]:
    """Return the parameter groups whose collectives belong to a module."""
    state = module._get_fsdp_state() if hasattr(module, "_get_fsdp_state") else None
    return list(getattr(state, "_fsdp_param_groups", None) or ())
