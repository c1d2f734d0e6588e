"""Judge the predictions by measured runs: every record is predicted, compared, or skipped for a reason that is said."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path

from ullage.errors import UllageError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.records.compare import Comparison, NotComparableError, Prediction, Verdict, compare, skipped, started
from ullage.records.schema import Measured, Record
from ullage.records.store import read_records

#: kind of job -> module with ``predict(record) -> Prediction``; imported only when a record of the kind comes.
PREDICTORS = {"serve": "ullage.records.serving", "train": "ullage.records.training", "kernel": "ullage.records.kernels"}
#: Fewer records than this do not pay for a process; so many go to one at a time.
RECORDS_PER_PROCESS, CHUNK = 100, 8
#: Rows, the verdict on the start, and what broke inside.
Judged = tuple[list[Comparison], Verdict | None, list[str]]
#: Published runs that come with the program: facts, each with the address where it was published.
SHIPPED = Path(__file__).parent / "data" / "serving.jsonl"


class ValidationReport(Frozen):
    """All rows, in the order of the records. ``warnings`` are sentences on the files."""

    comparisons: tuple[Comparison, ...]
    verdicts: tuple[Verdict, ...]
    warnings: tuple[str, ...]
    num_records: int
    internal_errors: tuple[str, ...] = ()


def validate_files(
    paths: Iterable[Path], *, include_partial: bool = False, progress: Callable[[int], None] | None = None
) -> ValidationReport:
    """Predict and compare every record of ``paths``.

    Args:
        paths: JSONL files of records.
        include_partial: judge records of completeness ``partial`` too (they miss a field that matters).
        progress: called with the number of records done.

    Raises:
        InputError: a file or line that cannot be read.
    """
    rows: list[Comparison] = []
    verdicts: list[Verdict] = []
    broken: list[str] = []
    records = [record for path in paths for record in read_records(path)]
    unknown = Counter(key for record in records for key in set(record.unknown_keys))
    judged = _judge_all(records, include_partial)
    for done, (found, verdict, failures) in enumerate(judged, start=1):
        rows += found
        verdicts += [verdict] if verdict else []
        broken += failures
        if progress:
            progress(done)
    warnings = tuple(
        _("unknown key {key} in {count} records, not used").format(key=key, count=count)
        for key, count in sorted(unknown.items())
    )
    return ValidationReport(
        comparisons=tuple(rows),
        verdicts=tuple(verdicts),
        warnings=warnings,
        num_records=len(records),
        internal_errors=tuple(broken),
    )


def _judge_all(records: list[Record], include_partial: bool) -> Iterator[Judged]:
    """Judge records in order, on all processors where there are enough of them to pay for the processes."""
    work = partial(_judge_one, include_partial=include_partial)
    processes = min(len(records) // RECORDS_PER_PROCESS, os.cpu_count() or 1)
    if processes < 2:
        yield from map(work, records)
        return
    with ProcessPoolExecutor(max_workers=processes) as pool:
        yield from pool.map(work, records, chunksize=CHUNK)


def _judge_one(record: Record, *, include_partial: bool) -> Judged:
    broken: list[str] = []
    rows, verdict = judge(record, include_partial=include_partial, broken=broken)
    return rows, verdict, broken


def judge(
    record: Record, *, include_partial: bool = False, broken: list[str] | None = None
) -> tuple[list[Comparison], Verdict | None]:
    """Return the rows of one record and the verdict on its start, if the record says whether it started."""
    if record.completeness == "partial" and not include_partial:
        return _skip_all(record, _("the record misses a field that matters (partial)")), None
    if record.kind not in PREDICTORS:
        return _skip_all(record, _no_room(record.kind)), None
    try:
        prediction: Prediction = import_module(PREDICTORS[record.kind]).predict(record)
        rows = list(compare(record, prediction))
    except NotComparableError as error:
        return _skip_all(record, str(error)), None
    except UllageError as error:
        return _skip_all(record, str(error), failed=True), None
    except Exception as error:  # one record must not hide the others; the caller reports it as a bug
        if broken is None:
            raise
        sentence = f"{record.record_id}: {type(error).__name__}: {error}"
        broken.append(sentence)
        return _skip_all(record, _("internal error: {error}").format(error=sentence), failed=True), None
    return rows, _verdict(record, prediction)


def _known_to_fit(record: Record, prediction: Prediction, size: float) -> Verdict | None:
    """Judge a job only known to run on a card of ``size`` bytes: surely too large is wrong, straddling tight."""
    used = prediction.figures.get("device_used")
    if used is None:
        return None
    return Verdict(
        record_id=record.record_id,
        group=record.group,
        engine=prediction.engine,
        measured=True,
        predicted=used.value <= size,
        tight=used.low <= size < used.high,
        reason=_("{used:.1f} GiB of {size:.1f} GiB").format(used=used.value / 2**30, size=size / 2**30),
    )


def _verdict(record: Record, prediction: Prediction) -> Verdict | None:
    if record.fits_in_gib is not None:
        return _known_to_fit(record, prediction, record.fits_in_gib * 2**30)
    measured = started(record)
    if measured is None:
        return None
    why = prediction.not_comparable.get("starts")
    return Verdict(
        record_id=record.record_id,
        group=record.group,
        engine=prediction.engine,
        measured=measured,
        predicted=None if why else prediction.starts,
        tight=bool(prediction.doubt) and not why,
        reason=prediction.reason,
        skipped=why,
    )


def _skip_all(record: Record, why: str, *, failed: bool = False) -> list[Comparison]:
    figures = record.measured
    if record.fits_in_gib is not None:
        size = record.fits_in_gib * 2**30
        figures = (*figures, Measured(quantity="fits_in", value=size, low=size, high=size, is_bytes=True))
    return [skipped(record, figure, why, failed=failed) for figure in figures]


def _no_room(kind: str) -> str:
    if kind == "train":
        return _("no training engine yet")
    if kind == "kernel":
        return _("no model of single kernels yet")
    return _("jobs of kind {kind!r} are not known").format(kind=kind[:40])
