"""Cut a batch into micro-batches, and weigh each so that their sum is the loss of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.guard.sizes import round_up
from ullage.i18n import _

Split = Callable[[Any, int, int], Any]


class Piece(Frozen):
    """One micro-batch: of batch ``batch``, the samples from ``start`` to ``stop``, and its share of the loss."""

    batch: int
    start: int
    stop: int
    weight: float


def tensors(batch: Any) -> Iterator[Any]:
    """Yield the tensors of a batch of tuples, lists, mappings and dataclasses."""
    if hasattr(batch, "narrow") and hasattr(batch, "shape"):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from tensors(value)
    elif is_dataclass(batch) and not isinstance(batch, type):
        for field in fields(batch):
            yield from tensors(getattr(batch, field.name))


def num_samples(batch: Any) -> int:
    """Return the size of dimension 0, which all tensors of the batch must share."""
    sizes = {int(each.shape[0]) for each in tensors(batch) if len(each.shape)}
    if len(sizes) != 1:
        raise InputError(
            _("the tensors of a batch must share dimension 0, and have {sizes}").format(sizes=sorted(sizes)),
            remedy=_("give the guard split= and num_samples= for batches of another form"),
        )
    return sizes.pop()


def shape_of(batch: Any) -> int:
    """Return the elements of one sample of the largest tensor, rounded up to a power of two."""
    largest = 1
    for each in tensors(batch):
        if len(each.shape) and each.shape[0]:
            largest = max(largest, int(each.numel()) // int(each.shape[0]))
    return round_up(largest)


def split_batch(batch: Any, start: int, stop: int) -> Any:
    """Return samples ``start`` to ``stop`` as views; what is no tensor is handed on as it is."""
    if hasattr(batch, "narrow") and hasattr(batch, "shape"):
        return batch.narrow(0, start, stop - start) if len(batch.shape) else batch
    if isinstance(batch, Mapping):
        cut = {name: split_batch(value, start, stop) for name, value in batch.items()}
        try:
            return type(batch)(cut)  # type: ignore[call-arg]
        except TypeError:
            return cut
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(split_batch(value, start, stop) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(split_batch(value, start, stop) for value in batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        changed = {field.name: split_batch(getattr(batch, field.name), start, stop) for field in fields(batch)}
        return replace(batch, **changed)
    return batch


def ranges(size: int, micro_batch: int) -> list[tuple[int, int]]:
    """Return (start, stop) of micro-batches; the last may be smaller."""
    return [(start, min(start + micro_batch, size)) for start in range(0, size, micro_batch)]


def weigh(counts: Sequence[int], *, of: int | None = None, reduction: str = "mean") -> list[float]:
    """Return the factor of each micro-batch's loss.

    Formula: mean: n_i / N; sum: 1 (the losses simply add up). N is the sum of the counts, or ``of``.
    """
    if reduction == "sum":
        return [1.0] * len(counts)
    total = sum(counts) if of is None else of
    return [count / total if total else 0.0 for count in counts]
