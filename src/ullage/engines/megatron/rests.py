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
    numpy, known = sys.modules["numpy"], parts[0].runs[0][0].known
    runs = [run for part in parts for run in part.runs]
    times = [number for _holding, number in runs]
    tables = [_table(job, holding) for holding, _times in runs]
    present, first, row = numpy.unique(index, return_index=True, return_inverse=True)
    free = sum(table[0] * number for table, number in zip(tables, times, strict=True))[present]
    large = sum(table[1] * number for table, number in zip(tables, times, strict=True))[present]
    tied = numpy.stack([table[2] for table in tables], axis=1)[present].tolist()
    held = numpy.stack([size[first] for size in buffers], axis=1).tolist()
    for at, choice in enumerate(present.tolist()):
        batch, key = Batch(held[at]), _joined(tied[at], times)
        found = None if batch.placed else known.get(key)
        if found is None:
            sides = {mark: _placement(job, run[0].choices[choice])[0] for mark, run in zip(tied[at], runs, strict=True)}
            number = [each for _mark, each in key]
            used = [sides[mark] for mark, _number in key]
            found = _one_after_the_other(job, used, number, batch if batch.placed else None)
            if not batch.placed:
                known[key] = found
        free[at] += found + (0 if batch.placed else batch.fixed_bytes - batch.num_bytes)
    return free[row], (4 + large * 2)[row]


def _joined(marks: list[int], times: list[int]) -> tuple[tuple[int, int], ...]:
    """Leave out what places nothing, and join what then comes in a row."""
    found: list[tuple[int, int]] = []
    for mark, number in zip(marks, times, strict=True):
        if mark and found and found[-1][0] == mark:
            found[-1] = (mark, found[-1][1] + number)
        elif mark:
            found.append((mark, number))
    return tuple(found)


def _table(job: TrainingJob, holding: Any) -> tuple[Any, Any, Any]:
    """Of each choice of a holding: rests where no tensor depends on what is free, large tensors, else a mark."""
    key = ("placement", id(holding.choices))
    if key not in holding.known:
        rows = []
        for choice in holding.choices:
            batches, large = _placement(job, choice)
            used = [batches[0], batches[2], *([batches[1]] if job.precision.master else [])]
            if any(batch.placed for batch in used):
                rows.append((0, large, id(batches)))
            else:
                rows.append((sum(batch.fixed_bytes - batch.num_bytes for batch in used), large, 0))
        table = _array(rows).reshape(-1, 3)
        holding.known[key] = table[:, 0], table[:, 1], table[:, 2]
    found: tuple[Any, Any, Any] = holding.known[key]
    return found


def _apart(job: TrainingJob, runs: list[Any], buffers: list[int]) -> tuple[int, int]:
    held = [run for part in runs for run in part]
    placements = [_placement(job, holding) for holding, _times in held]
    times = [number for _holding, number in held]
    large = sum(number * each for (_sides, number), each in zip(placements, times, strict=True))
    sides = [batches for batches, _number in placements]
    return _one_after_the_other(job, sides, times, Batch(buffers)), 4 + large * 2


def _one_after_the_other(
    job: TrainingJob, sides: list[tuple[Batch, Batch, Batch]], times: list[int], buffers: Batch | None
) -> int:
    """Parameters, gradient buffers and master weights in one pool; moments, which the first step makes, in another."""
    params, master, moments = ([(side[at], n) for side, n in zip(sides, times, strict=True)] for at in range(3))
    first = [*params, *([(buffers, 1)] if buffers is not None else ()), *(master if job.precision.master else ())]
    return one_rest(first) + one_rest(moments)


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
