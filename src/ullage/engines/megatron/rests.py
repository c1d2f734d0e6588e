"""What the allocator adds to the states of a rank and to kept activations, for one layout or many.

Placement follows every tensor, so layouts are gone through one by one, equal ones once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from ullage.engines.megatron.blocks import NEVER_FREE, SMALL, Batch, placed_bytes
from ullage.engines.megatron.blocks import placed_rest as one_rest
from ullage.engines.megatron.holdings import Side
from ullage.spec.training import TrainingJob
from ullage.units import MiB, round_up, tensor_bytes

#: Expert tensors of one shape that are placed one by one.
MAX_COPIES = 512


def batches(sizes: Sequence[int]) -> Batch | tuple[Batch, ...]:
    """Prepare tensors that are allocated one after the other; arrays of sizes make one batch a layout."""
    if all(isinstance(size, int) for size in sizes):
        return Batch(sizes)
    numpy = sys.modules["numpy"]
    rows = numpy.stack(numpy.broadcast_arrays(*sizes), axis=1).tolist()
    known: dict[tuple[int, ...], Batch] = {}
    found = []
    for row in map(tuple, rows):
        if row not in known:
            known[row] = Batch(row)
        found.append(known[row])
    return tuple(found)


def placed_rest(runs: Sequence[tuple[Any, int]]) -> int:
    """What the allocator adds to batches of tensors, each so many times in a row, beyond their own bytes."""
    if all(isinstance(batch, Batch) for batch, _times in runs):
        return one_rest(runs)
    known: dict[tuple[Any, ...], int] = {}
    found = []
    times = [number for _batch, number in runs]
    for row in zip(*(batch for batch, _number in runs), strict=True):
        if row not in known:
            known[row] = one_rest(list(zip(row, times, strict=True)))
        found.append(known[row])
    result: int = _array(found)
    return result


def _array(values: list[Any]) -> Any:
    return sys.modules["numpy"].array(values, dtype="int64")


def rest_of(sizes: Sequence[int]) -> int:
    """What the allocator adds to a few tensors in this order, none freed; of arrays, layout by layout.

    Where every tensor has segments of its own (19 MiB and more) or is small, no rest serves another.
    """
    if all(isinstance(size, int) for size in sizes):
        return placed_bytes(sizes) - sum(sizes)
    numpy = sys.modules["numpy"]
    rows = numpy.stack(numpy.broadcast_arrays(*sizes), axis=1)
    wants: Any = round_up(rows, 512)
    own: Any = round_up(wants, 2 * MiB)
    placed = numpy.where((wants > SMALL) & (own - wants <= SMALL), own, wants)
    found = placed.sum(axis=1) - rows.sum(axis=1)
    for at in numpy.flatnonzero(((wants > SMALL) & (wants < NEVER_FREE)).any(axis=1)).tolist():
        row = rows[at].tolist()
        found[at] = placed_bytes(row) - sum(row)
    result: int = found
    return result


def tensors_apart(job: TrainingJob, parts: list[Side], buffers: list[Any]) -> tuple[int, int]:
    """Rests of parameters, gradient buffers, master weights and moments that are tensors of their own.

    Returns expected bytes, and how many tensors may add a rest.
    """
    choices, index = parts[0].runs[0][0].choices, parts[0].runs[0][0].index
    if not choices:
        return _apart(job, [part.runs for part in parts], buffers)
    known = parts[0].runs[0][0].known
    what = tuple((id(holding.choices), times) for part in parts for holding, times in part.runs)
    for choice in set(index.tolist()):
        if (choice, what) not in known:
            at = int((index == choice).argmax())
            runs = [tuple((holding.choices[choice], times) for holding, times in part.runs) for part in parts]
            known[choice, what] = _apart(job, runs, [int(size[at]) for size in buffers], known)
    numbers = range(len(choices))
    rows = _array([known.get((choice, what), (0, 0)) for choice in numbers]).reshape(-1, 2)[index]
    return rows[:, 0], rows[:, 1]


def _apart(
    job: TrainingJob, runs: list[Any], buffers: list[int], known: dict[object, int] | None = None
) -> tuple[int, int]:
    params, master, moments, large = [], [], [], 0
    for holding, times in (run for part in runs for run in part):
        batches, number = _placement(job, holding)
        params.append((batches[0], times))
        master.append((batches[1], times))
        moments.append((batches[2], times))
        large += number * times
    held = Batch(buffers)
    first = [*params, (held, 1), *(master if job.precision.master else ())]
    return one_rest(first, None if held.placed else known) + one_rest(moments, known), 4 + large * 2


def _placement(job: TrainingJob, holding: Any) -> tuple[tuple[Batch, Batch, Batch], int]:
    """A holding's parameters, fp32 copies and pairs of moments one by one; how many of them pass 1 MiB in fp32."""
    known = holding.known.get("placement")
    if known is None:
        sizes = [
            tensor.num_elements // tensor.copies
            for tensor in holding.tensors
            for _copy in range(min(tensor.copies, MAX_COPIES))
        ]
        params = Batch(tensor_bytes(size, job.precision.params) for size in sizes)
        moments = Batch(4 * size for size in sizes for _moment in range(2))
        batches = params, Batch(4 * size for size in sizes), moments
        known = holding.known["placement"] = batches, sum(4 * size > MiB for size in sizes)
    found: tuple[tuple[Batch, Batch, Batch], int] = known
    return found
