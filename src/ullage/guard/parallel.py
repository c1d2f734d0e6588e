"""What the guard asks of a way to train on several ranks; this one is for one rank, or ranks with no collectives."""

from __future__ import annotations

import contextlib
from typing import Any

from ullage.guard.votes import Votes


class Parallel:
    """A window without collectives of its own: ranks agree only at its end."""

    def __init__(self, votes: Votes) -> None:
        self.votes = votes

    def begin(self, num_micro: int) -> int:
        """Start a window; return the number of micro-batches that all ranks run."""
        return num_micro

    def micro(self, last: bool) -> Any:
        """Return the context in which a micro-batch runs forward and backward."""
        return contextlib.nullcontext()

    def join(self) -> bool:
        """After a failure on this rank: let the others come to a vote; True when this rank has voted already."""
        return False

    def reset(self) -> None:
        """Bring the module back to where a window starts, on every rank, after a failure on any."""

    def good(self) -> None:
        """Note that the window went through on every rank."""
