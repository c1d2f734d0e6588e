"""What the guard asks of a way to train on several ranks; this one is for one rank, or ranks with no collectives."""

from __future__ import annotations

import contextlib
from typing import Any

from ullage.guard.classify import PeerOutOfMemoryError
from ullage.guard.votes import OK, REDO, Votes
from ullage.i18n import _


class Parallel:
    """A window whose collectives, if any, are the job's own: it calls :meth:`vote_point` before each of them."""

    def __init__(self, votes: Votes) -> None:
        self.votes = votes
        self._voted = False

    def begin(self, num_micro: int) -> int:
        """Start a window; return the number of micro-batches that all ranks run."""
        self._voted = False
        return num_micro

    def micro(self, last: bool) -> Any:
        """Return the context in which a micro-batch runs forward and backward."""
        return contextlib.nullcontext()

    def vote_point(self) -> None:
        """Vote before a collective; raise where another rank, out of memory, will not join it."""
        if self.votes.size > 1 and self.votes.vote(OK).code >= REDO:
            self._voted = True
            raise PeerOutOfMemoryError(_("another rank is out of memory"))

    def join(self) -> bool:
        """After a failure on this rank: let the others come to a vote; True when this rank has voted already."""
        if not self._voted:
            self.votes.vote(REDO)
        return True

    def reset(self) -> None:
        """Bring the module back to where a window starts, on every rank, after a failure on any."""

    def good(self) -> None:
        """Note that the window went through on every rank."""

    def clip(self, parameters: Any, max_norm: float) -> None:
        """Clip the gradients by their norm."""
        import torch

        torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    def saved(self, model: Any) -> Any:
        """Return what a checkpoint saves of the model."""
        return model
