"""Traces of published runs against their measured peaks: fms-acceleration, one A100, complete records."""

from __future__ import annotations

import statistics
from functools import lru_cache
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from ullage.errors import InputError
from ullage.records.store import read_records
from ullage.records.training import record_job
from ullage.trace.records import trace_record

pytestmark = pytest.mark.reference
TRUTH = Path(__file__).resolve().parents[3] / "shared" / "truth" / "training.jsonl"


@lru_cache
def errors() -> tuple[tuple[float, ...], tuple[str, ...]]:
    """Return (relative errors of the traced records, why others were not traced)."""
    if not TRUTH.is_file():
        pytest.skip("the published records are not here")
    found, refused = [], []
    for record in read_records(TRUTH):
        measured = [one.value for one in record.measured if one.quantity == "max_allocated"]
        if record.group != "fms-acceleration" or record.completeness != "full" or not measured:
            continue
        try:
            trace = trace_record(record_job(record)[0])
        except InputError as error:
            refused.append(str(error))
            continue
        found.append(trace.peak()[1] / measured[0] - 1)
    return tuple(found), tuple(refused)


def test_traced_peaks_are_those_measured() -> None:
    found, _refused = errors()
    sizes = [abs(error) for error in found]
    assert len(found) >= 19
    assert statistics.median(sizes) <= 0.02
    assert max(sizes) <= 0.05


def test_only_quantised_bases_are_not_traced() -> None:
    _found, refused = errors()
    assert len(refused) <= 22
    assert all("quantised base" in why for why in refused)
