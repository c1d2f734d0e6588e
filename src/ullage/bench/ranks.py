"""The ranks of a bench under torchrun: parents that agree with each other, each with a process of its own per try."""

from __future__ import annotations

import os
import socket
from typing import Any, Protocol, TypeVar

from ullage.errors import InputError
from ullage.i18n import _

T = TypeVar("T")


class Ranks(Protocol):
    """How the processes of a bench speak with each other."""

    rank: int
    local_rank: int
    world_size: int

    def from_first(self, value: T) -> T:
        """Return rank 0's value on every rank."""

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in order, on every rank."""

    def agree(self, *, finished: bool, dead: bool) -> tuple[bool, bool]:
        """Return whether all have finished, and whether any is dead."""


class Alone:
    """One process."""

    rank, local_rank, world_size = 0, 0, 1

    def from_first(self, value: T) -> T:
        """Return the value."""
        return value

    def gather(self, value: T) -> list[T]:
        """Return the value alone."""
        return [value]

    def agree(self, *, finished: bool, dead: bool) -> tuple[bool, bool]:
        """Return what is known."""
        return finished, dead


class Gathered:
    """Several processes of torchrun that speak over gloo; none of them touches a device."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self._dist = dist
        self.rank, self.local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
        self.world_size = int(os.environ["WORLD_SIZE"])
        dist.init_process_group("gloo")

    def from_first(self, value: T) -> T:
        """Broadcast from rank 0."""
        box: list[Any] = [value if self.rank == 0 else None]
        self._dist.broadcast_object_list(box, src=0)
        found: T = box[0]
        return found

    def gather(self, value: T) -> list[T]:
        """All-gather."""
        boxes: list[Any] = [None] * self.world_size
        self._dist.all_gather_object(boxes, value)
        return boxes

    def agree(self, *, finished: bool, dead: bool) -> tuple[bool, bool]:
        """All-reduce two flags."""
        import torch

        flags = torch.tensor([int(not finished), int(dead)])
        self._dist.all_reduce(flags, op=self._dist.ReduceOp.MAX)
        return not flags[0].item(), bool(flags[1].item())


def ranks_here() -> Ranks:
    """Return the ranks that torchrun's environment names; one where there is none."""
    try:
        size = int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        raise InputError(_("is not a number"), where="WORLD_SIZE") from None
    return Gathered() if size > 1 else Alone()


def free_port() -> int:
    """Return a port that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
