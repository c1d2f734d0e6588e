"""Many layouts of one training job, as columns of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Any, get_args

from ullage.errors import InputError, MissingExtraError
from ullage.i18n import _
from ullage.spec.training import Recompute, Schedule, TrainingJob

try:
    import numpy as np
except ModuleNotFoundError as error:
    raise MissingExtraError("numpy", "plan") from error

#: Schedules by the number that stands in the column ``schedule``.
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


class Reason(IntEnum):
    """Why a layout cannot be: each stands for a LayoutError of the ledger of one layout."""

    LEGAL = 0
    WORLD = 1  #: DP x TP x PP x CP is not the number of GPUs
    EXPERT_GROUPS = 2  #: EP x ETP does not divide the ranks of a pipeline stage
    STAGES = 3  #: the layers cannot be placed on PP x VPP stages
    TENSOR = 4  #: TP or ETP does not divide a weight
    EXPERTS = 5  #: EP does not divide the experts


@dataclass(frozen=True, kw_only=True, eq=False)
class Layouts:
    """Columns of one length; element i of each is layout i.

    Attributes:
        recompute: numbers into ``recomputes``; schedule: numbers into :data:`SCHEDULES`.
        sequence_parallel: 0 or 1; zero_stage: 0 to 3.
    """

    data_parallel_size: Any
    tensor_parallel_size: Any
    pipeline_parallel_size: Any
    virtual_pipeline_parallel_size: Any
    context_parallel_size: Any
    expert_parallel_size: Any
    expert_tensor_parallel_size: Any
    sequence_parallel: Any
    zero_stage: Any
    micro_batch_size: Any
    seq_len: Any
    grad_accum: Any
    recompute: Any
    schedule: Any
    recomputes: tuple[Recompute, ...]

    def __len__(self) -> int:
        return len(self.data_parallel_size)

    def take(self, rows: Any) -> Layouts:
        """Return the layouts of these rows."""
        return replace(self, **{name: getattr(self, name)[rows] for name in COLUMNS})

    def job(self, template: TrainingJob, row: int) -> TrainingJob:
        """Return one layout as a job: what explains it is the ledger of that job."""
        sizes: dict[str, Any] = {name: int(getattr(self, name)[row]) for name in PARALLEL}
        parallel = replace(
            template.parallel,
            **sizes,
            sequence_parallel=bool(self.sequence_parallel[row]),
            schedule=SCHEDULES[int(self.schedule[row])],
        )
        return replace(
            template,
            parallel=parallel,
            micro_batch_size=int(self.micro_batch_size[row]),
            seq_len=int(self.seq_len[row]),
            grad_accum=int(self.grad_accum[row]),
            recompute=self.recomputes[int(self.recompute[row])],
        )


COLUMNS = tuple(field.name for field in fields(Layouts) if field.name != "recomputes")
#: Columns that are fields of ``TrainingParallel`` under the same name.
PARALLEL = (*COLUMNS[:7], "zero_stage")
#: No size of a layout is larger: products stay within 64 bits.
MAX_SIZE = 2**24


def layouts(columns: Mapping[str, Sequence[int] | int], *, recomputes: Sequence[Recompute] = (Recompute(),)) -> Layouts:
    """Return layouts of columns; what is not named is 1 (``sequence_parallel``, ``zero_stage``, ``recompute``: 0).

    Raises:
        InputError: unknown columns, unequal lengths, or sizes that are no sizes.
    """
    zeros = ("sequence_parallel", "zero_stage", "recompute")
    given = {"schedule": SCHEDULES.index("1f1b"), **dict.fromkeys(zeros, 0), **columns}
    unknown = sorted(given.keys() - set(COLUMNS))
    if unknown:
        raise InputError(_("unknown columns: {names}").format(names=", ".join(unknown)))
    try:
        arrays = np.broadcast_arrays(*(np.atleast_1d(np.asarray(given.get(name, 1))) for name in COLUMNS))
    except ValueError:
        raise InputError(_("columns of layouts must have one length")) from None
    found = dict(zip(COLUMNS, arrays, strict=True))
    limits = {"sequence_parallel": 1, "zero_stage": 3, "recompute": len(recomputes) - 1, "schedule": len(SCHEDULES) - 1}
    for name, column in found.items():
        low, high = (0, limits[name]) if name in limits else (1, MAX_SIZE)
        if column.ndim != 1 or column.dtype.kind not in "iub" or (column < low).any() or (column > high).any():
            raise InputError(_("{name} needs whole numbers from {low} to {high}").format(name=name, low=low, high=high))
    return Layouts(
        **{name: np.ascontiguousarray(column, dtype=np.int64) for name, column in found.items()},
        recomputes=tuple(recomputes),
    )


def grid(
    num_gpus: int,
    *,
    global_batch_size: int,
    recomputes: Sequence[Recompute] = (Recompute(),),
    **axes: Sequence[int],
) -> Layouts:
    """Return every combination of ``axes`` that uses all GPUs and divides the global batch.

    The data-parallel size is what the other sizes leave; accumulation what data parallelism and micro-batch leave.
    """
    names = list(axes)
    cells = np.meshgrid(*(np.asarray(values, dtype=np.int64) for values in axes.values()), indexing="ij")
    columns = {name: cells[at].reshape(-1) for at, name in enumerate(names)}
    ones = np.ones(cells[0].size, dtype=np.int64)
    sizes = [columns.get(f"{name}_parallel_size", ones) for name in ("tensor", "pipeline", "context")]
    others = sizes[0] * sizes[1] * sizes[2]
    data = num_gpus // others
    step = data * columns.get("micro_batch_size", ones)
    usable = (data * others == num_gpus) & (step > 0)
    usable[usable] = global_batch_size % step[usable] == 0
    columns |= {"data_parallel_size": data, "grad_accum": global_batch_size // np.maximum(step, 1)}
    return layouts({name: column[usable] for name, column in columns.items()}, recomputes=recomputes)
