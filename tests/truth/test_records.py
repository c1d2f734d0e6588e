"""Records are read strictly, compared figure by figure, and never skipped without a word."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ullage.engines.serving import Amount
from ullage.errors import InputError
from ullage.records import validate as validate_module
from ullage.records.compare import NotComparableError, Prediction
from ullage.records.schema import read_record
from ullage.records.scoreboard import markdown
from ullage.records.store import MAX_LINE_BYTES, read_records
from ullage.records.summary import quantile, to_json
from ullage.records.validate import SHIPPED, validate_files

GIB = 2**30


def entry(**changes: Any) -> dict[str, Any]:
    record = {
        "id": "one",
        "group": "somewhere",
        "completeness": "full",
        "job": {"kind": "stub", "engine": "stub"},
        "measured": [{"quantity": "weights", "value": 10.5, "unit": "GiB", "gib": 10.5, "rank": "0"}],
    }
    return {**record, **changes}


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in records))
    return path


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A room whose answer each test sets."""
    import sys

    module = ModuleType("stub_room")
    module.predict = lambda record: Prediction(engine="stub", figures={})
    monkeypatch.setitem(sys.modules, "stub_room", module)
    monkeypatch.setitem(validate_module.PREDICTORS, "stub", "stub_room")
    return module


def figures(**values: float) -> dict[str, Amount]:
    return {name: Amount(value=value, low=value, high=value) for name, value in values.items()}


def test_a_figure_is_read_in_bytes_with_the_half_digit_that_was_rounded_away() -> None:
    measured = read_record(entry(), "f:1").measured[0]
    assert measured.value == 10.5 * GIB
    assert measured.rounding == pytest.approx(0.005 * GIB)  # engines log two digits; JSON dropped the zero


def test_an_engine_that_says_gb_and_means_gib_is_read_by_its_gib_field() -> None:
    figure = {"quantity": "weights", "value": 105.59, "unit": "GB", "gib": 105.59}
    assert read_record(entry(measured=[figure]), "f:1").measured[0].value == 105.59 * GIB
    figure = {"quantity": "weights", "value": 105.59, "unit": "GB", "gib": 98.34}
    assert read_record(entry(measured=[figure]), "f:1").measured[0].value == 105.59e9


def test_an_open_unit_gives_both_readings_as_the_range() -> None:
    figure = {"quantity": "device_used", "value": 24.0, "unit": "GB", "gib_range": [22.35, 24.0]}
    measured = read_record(entry(measured=[figure]), "f:1").measured[0]
    assert measured.low <= 22.35 * GIB + 1 and measured.high >= 24.0 * GIB


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{", "not valid JSON"),
        ("[1]", "not a JSON object"),
        (json.dumps(entry(id=7)), "id"),
        (json.dumps(entry(job=[])), "job"),
        (json.dumps(entry(measured=[])), "nothing was measured"),
        (json.dumps(entry(measured=[{"quantity": "weights", "value": "x", "unit": "GiB"}])), "not a number"),
        (json.dumps(entry(measured=[{"quantity": "weights", "value": True, "unit": "GiB"}])), "not a number"),
        (json.dumps(entry(measured=[{"quantity": "weights", "value": 1, "unit": "furlong"}])), "unit"),
        (json.dumps(entry()).replace("10.5", "NaN"), "not finite"),
        (json.dumps(entry()).replace("10.5", "1e999"), "not finite"),
        ("[" * 100_000, "nested"),
        ('{"id": "' + "x" * MAX_LINE_BYTES + '"}', "longer"),
    ],
)
def test_a_broken_line_is_an_error_with_file_and_line(tmp_path: Path, line: str, word: str) -> None:
    path = write(tmp_path / "records.jsonl", entry(id="fine"), line)
    with pytest.raises(InputError, match=word) as caught:
        list(read_records(path))
    assert "records.jsonl:2" in str(caught.value)


def test_the_same_id_twice_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="already"):
        list(read_records(write(tmp_path / "r.jsonl", entry(), entry())))


def test_unknown_keys_are_told_and_do_not_stop(tmp_path: Path, stub: ModuleType) -> None:
    report = validate_files([write(tmp_path / "r.jsonl", entry(mood="good"))])
    assert any("mood" in sentence for sentence in report.warnings)


def test_error_is_signed_and_relative_and_the_range_decides(tmp_path: Path, stub: ModuleType) -> None:
    stub.predict = lambda record: Prediction(engine="stub", figures=figures(weights=9.45 * GIB), starts=True)
    answer = to_json(validate_files([write(tmp_path / "r.jsonl", entry())]))
    row = answer["records"][0]
    assert row["error"] == pytest.approx(-0.1)
    assert row["inside"] is False and row["skipped"] is None
    assert row["low"] <= row["predicted"] <= row["high"] < row["measured"]
    group = next(one for one in answer["groups"] if one["group"] == "somewhere" and one["quantity"] == "weights")
    assert (group["count"], group["coverage"]) == (1, 0.0)
    assert group["worst_abs_error"] == pytest.approx(0.1)


def test_what_the_published_digits_leave_open_counts_as_inside(tmp_path: Path, stub: ModuleType) -> None:
    stub.predict = lambda record: Prediction(engine="stub", figures=figures(weights=10.504 * GIB))
    assert to_json(validate_files([write(tmp_path / "r.jsonl", entry())]))["records"][0]["inside"] is True


def test_every_rank_is_compared_with_its_own(tmp_path: Path, stub: ModuleType) -> None:
    figure = {"quantity": "weights", "value": 3, "unit": "MiB", "gib": 0.0029, "rank": "all", "per_rank": [1, 3]}
    ranks = (figures(weights=2**20), figures(weights=4 * 2**20))
    stub.predict = lambda record: Prediction(engine="stub", figures={}, ranks=ranks)
    rows = to_json(validate_files([write(tmp_path / "r.jsonl", entry(measured=[figure]))]))["records"]
    assert [(row["rank"], row["error"]) for row in rows] == [("0", 0.0), ("1", pytest.approx(1 / 3))]


def test_a_figure_of_all_ranks_is_compared_with_their_sum(tmp_path: Path, stub: ModuleType) -> None:
    figure = {"quantity": "weights", "value": 5, "unit": "MiB", "gib": 0.0049, "rank": "all"}
    ranks = (figures(weights=2**20), figures(weights=4 * 2**20))
    stub.predict = lambda record: Prediction(engine="stub", figures={}, ranks=ranks)
    rows = to_json(validate_files([write(tmp_path / "r.jsonl", entry(measured=[figure]))]))["records"]
    assert rows[0]["error"] == 0.0


@pytest.mark.parametrize(
    ("figure", "starts", "wrong"),
    [
        ({"value": 1.0, "note": "start fails: 2 GiB needed"}, True, 1),
        ({"value": 1.0, "note": "start fails: 2 GiB needed"}, False, 0),
        ({"value": -1.44}, True, 1),
        ({"value": 1.0}, False, 1),
        ({"value": 1.0}, True, 0),
    ],
)
def test_verdicts(tmp_path: Path, stub: ModuleType, figure: dict[str, Any], starts: bool, wrong: int) -> None:
    figure = {"quantity": "kv_cache", "unit": "GiB", "gib": figure["value"], **figure}
    stub.predict = lambda record: Prediction(engine="stub", figures=figures(kv_cache=GIB), starts=starts)
    answer = to_json(validate_files([write(tmp_path / "r.jsonl", entry(measured=[figure]))]))
    by_name = {(one["group"], one["quantity"]): one for one in answer["groups"]}
    assert by_name["somewhere", "kv_cache"]["wrong_verdicts"] == wrong
    assert by_name["engine:stub", "all"]["wrong_verdicts"] == wrong
    assert by_name["all:all", "all"]["num_verdicts"] == 1


@pytest.mark.parametrize("starts", [True, False])
def test_a_start_whose_range_holds_both_outcomes_is_tight_and_never_wrong(
    tmp_path: Path, stub: ModuleType, starts: bool
) -> None:
    figure = {"quantity": "kv_cache", "unit": "GiB", "value": 1.0, "gib": 1.0, "note": "start fails: 2 GiB needed"}
    stub.predict = lambda record: Prediction(
        engine="stub", figures=figures(kv_cache=GIB), starts=starts, doubt="half a GiB either way"
    )
    report = validate_files([write(tmp_path / "r.jsonl", entry(measured=[figure]))])
    answer = to_json(report)
    assert answer["verdicts"][0]["tight"] and not answer["verdicts"][0]["wrong"]
    total = next(one for one in answer["groups"] if one["group"] == "all:all" and one["quantity"] == "all")
    assert (total["num_verdicts"], total["wrong_verdicts"], total["tight_verdicts"]) == (1, 0, 1)
    assert "Tight" in markdown(report)


def test_failures_are_told_apart_from_records_that_cannot_be_judged(tmp_path: Path, stub: ModuleType) -> None:
    def predict(record: Any) -> Prediction:
        if record.record_id == "gap":
            raise NotComparableError("no GPU")
        if record.record_id == "bad":
            raise InputError("layout is impossible")
        if record.record_id == "bug":
            raise KeyError("oops")
        return Prediction(engine="stub", figures={})

    stub.predict = predict
    records = [entry(id=name) for name in ("gap", "bad", "bug", "silent")] + [entry(id="part", completeness="partial")]
    report = validate_files([write(tmp_path / "r.jsonl", *records)])
    rows = {row.record_id: row for row in report.comparisons}
    assert all(row.skipped for row in rows.values())
    assert {name for name, row in rows.items() if row.failed} == {"bad", "bug", "silent"}
    assert len(report.internal_errors) == 1 and "bug: KeyError" in report.internal_errors[0]


def test_kinds_without_a_room_are_skipped_with_the_reason(tmp_path: Path) -> None:
    kernel = {"id": "k", "group": "g", "kernel": "x", "provider": "p", "measured": entry()["measured"]}
    fits = {"id": "f", "group": "g", "job": {"kind": "train", "engine": "e"}, "fits_in_gib": 79.65}
    other = {"id": "o", "group": "g", "job": {"kind": "dream"}, "measured": entry()["measured"]}
    rows = validate_files([write(tmp_path / "r.jsonl", kernel, fits, other)]).comparisons
    assert [row.quantity for row in rows] == ["weights", "fits_in", "weights"]
    assert "no count of x" in (rows[0].skipped or "") and "training engine" in (rows[1].skipped or "")
    assert "dream" in (rows[2].skipped or "") and not any(row.failed for row in rows)


def test_quantiles_interpolate_between_order_statistics() -> None:
    assert quantile([], 0.5) is None
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([0.0, 10.0], 0.9) == pytest.approx(9.0)


def test_the_json_is_what_its_schema_says(tmp_path: Path, stub: ModuleType) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((Path(validate_module.__file__).parents[1] / "schema" / "validate.json").read_text())
    stub.predict = lambda record: Prediction(engine="stub", figures=figures(weights=9 * GIB), starts=True)
    failing = {"quantity": "kv_cache", "value": -1.0, "unit": "GiB", "gib": -1.0}
    records = [entry(), entry(id="two", measured=[failing]), entry(id="three", completeness="partial")]
    answer = to_json(validate_files([write(tmp_path / "r.jsonl", *records)]))
    jsonschema.validate(answer, schema)
    answer["records"][0]["error"] = "much"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(answer, schema)


def test_shipped_records_are_sound_and_name_their_source() -> None:
    records = list(read_records(SHIPPED))
    assert len(records) > 50
    assert not [record.where for record in records if record.unknown_keys]
    assert not [record.where for record in records if not record.source_url.startswith("https://")]
