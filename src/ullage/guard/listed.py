"""A window whose collectives are always the same list: votes before each until the list is known, then none.

A vote stands between the allocation of a collective's buffers and the collective itself, where nothing can run out of
memory any more: a rank that fails casts its vote in place of the next collective, and the others raise there.

When a window has gone through once, the list of its collectives is known, and the next windows with as many
micro-batches run without votes: a rank that fails then joins the rest of the list with zeros, and the vote at the end
tells all to throw the result away. That costs an undisturbed step nothing but that one vote.
"""

from __future__ import annotations

from typing import Any

import torch

from ullage.errors import InputError
from ullage.guard.parallel import Parallel
from ullage.guard.votes import Votes
from ullage.i18n import _

MAX_LISTS = 16


class Listed(Parallel):
    """What FSDP1 and FSDP2 have in common; a subclass calls :meth:`before` and brings :meth:`shard_again`."""

    def __init__(self, module: Any, votes: Votes, *, always_vote: bool = False) -> None:
        super().__init__(votes)
        self.module, self.always_vote = module, always_vote
        self._known: dict[int, tuple[Any, ...]] = {}
        self._issued: list[Any] = []
        self._active = self._armed = False
        self._num_micro = 0

    def begin(self, num_micro: int) -> int:
        """Agree on the number of micro-batches: every rank must issue the same collectives."""
        self._num_micro = self.votes.vote(count=num_micro).count
        self._issued = []
        self._armed = self.always_vote or self._num_micro not in self._known
        self._active, self._voted = True, False
        return self._num_micro

    def before(self, collective: Any, operands: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Vote before a collective where the window is voted on, and note it."""
        if not self._active:
            return
        if self._armed:
            super().vote_point()
        outline = {key: _outline(value) for key, value in options.items()}
        self._issued.append((collective, _outline(operands), outline))

    def vote_point(self) -> None:
        """Vote before a collective of the job's own, in windows that are voted on."""
        if not self.always_vote:
            raise InputError(
                _("a collective of the job's own beside those of FSDP needs every vote"),
                remedy=_("give votes='always'"),
            )
        super().vote_point()

    def join(self) -> bool:
        """Vote in place of the next collective, or join the rest of the known ones with zeros."""
        self.reset()
        if self._armed:
            return super().join()
        for collective, operands, options in self._known[self._num_micro][len(self._issued) :]:
            work = collective(*_made(operands), **{key: _made(value) for key, value in options.items()})
            if work is not None:
                work.wait()
        return False

    def reset(self) -> None:
        """Shard all parameters again and forget what is in flight."""
        self._active = False
        self.shard_again()

    def shard_again(self) -> None:
        """Bring the module back to where a window starts."""
        raise NotImplementedError

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
