"""A batch of a framework's window, held until the window is whole, and its micro-batches with their shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ullage.frozen import Frozen
from ullage.guard.split import num_samples, split_batch


class Held(Frozen):
    """One batch, or a piece of it: ``share`` is the piece's part of the batch's loss; ``extra`` goes with it."""

    batch: Any
    extra: Any = None
    share: float = 1.0


def settings_for(given: dict[str, Any]) -> dict[str, Any]:
    """Return the guard's settings for held batches, whose backward the framework does itself."""
    measure = given.pop("num_samples", None) or num_samples
    cut = given.pop("split", None) or split_batch
    count: Callable[[Any], int] = given.pop("count", None) or measure

    def split(held: Held, start: int, stop: int) -> Held:
        if start == 0 and stop == measure(held.batch):
            return held
        piece = cut(held.batch, start, stop)
        whole = count(held.batch)
        return Held(batch=piece, extra=held.extra, share=count(piece) / whole if whole else 0.0)

    return {
        **given,
        "num_samples": lambda held: measure(held.batch),
        "split": split,
        "loss_reduction": "sum",
        "backward": lambda _loss: None,
        "shape": _shape(given.pop("shape", None)),
    }


def _shape(given: Callable[[Any], int] | None) -> Callable[[Any], int]:
    from ullage.guard.split import shape_of

    measure = given or shape_of
    return lambda held: measure(held.batch)
