"""How ranks agree: a small all-reduce on a CPU (gloo) group of its own, whose tensor is allocated beforehand.

Never on a device's stream: that may be the one that is stuck. Every vote is the same collective of the same size, so
a vote of a rank that failed pairs with whichever vote the others reach next.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _

#: What a rank says; the largest wins.
OK, SHRINK, REDO, OPTIMIZER = range(4)
TIMEOUT_SECONDS = 1800


class Tally(Frozen):
    """The largest of what all ranks said."""

    code: int = OK
    count: int = 0
    shape: int = 0
    no_room: int = 0


class Votes:
    """The agreement of the ranks of ``group`` (all ranks by default); with one rank, a vote is what it says itself."""

    def __init__(self, group: Any = None, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        import torch
        import torch.distributed as dist

        self._dist = dist if dist.is_available() and dist.is_initialized() else None
        self.size = dist.get_world_size(group) if self._dist else 1
        self.rank = dist.get_rank(group) if self._dist else 0
        self.num_votes = 0
        if self.size < 2:
            return
        if not dist.is_gloo_available():
            raise InputError(
                _("the ranks cannot agree: this build of torch has no gloo"),
                remedy=_("use a build with gloo: a vote on the device's own stream can hang"),
            )
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        self._group = dist.new_group(ranks, backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        self._tensor = torch.zeros(6, dtype=torch.int64)
        self.vote()  # connects now, not when memory is short

    def vote(self, code: int = OK, *, count: int = 0, shape: int = 0, no_room: bool = False) -> Tally:
        """Return the largest of each on all ranks; every rank must call it."""
        self.num_votes += 1
        if self.size < 2:
            return Tally(code=code, count=count, shape=shape, no_room=int(no_room))
        place = self.num_votes
        for slot, value in enumerate((code, count, shape, int(no_room), place, -place)):
            self._tensor[slot] = value
        self._dist.all_reduce(self._tensor, op=self._dist.ReduceOp.MAX, group=self._group)  # type: ignore[union-attr]
        code, count, shape, room, last, first = self._tensor.tolist()
        if code < REDO and last != -first:
            raise InputError(
                _("the ranks have come apart: one is at vote {first}, another at vote {last}").format(
                    first=-first, last=last
                ),
                remedy=_("every rank must call the guard equally often"),
            )
        self.num_votes = last
        return Tally(code=code, count=count, shape=shape, no_room=room)

    def exchange(self, value: Any) -> list[Any]:
        """Return what every rank gave, by rank. Off the usual path: after a failure, or at the start."""
        if self.size < 2:
            return [value]
        found: list[Any] = [None] * self.size
        self._dist.all_gather_object(found, value, group=self._group)  # type: ignore[union-attr]
        return found

    def total(self, number: int) -> int:
        """Return the sum of a number over the ranks."""
        if self.size < 2:
            return number
        self._tensor.zero_()
        self._tensor[0] = number
        self._dist.all_reduce(self._tensor, group=self._group)  # type: ignore[union-attr]
        return int(self._tensor[0])
