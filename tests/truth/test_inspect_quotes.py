"""Quotes of engine logs, read back into the figures of their own records."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from conftest import need_shared

from ullage.errors import InputError
from ullage.observe.engine_logs import Collected, Figure
from ullage.observe.inspection import Inspection, inspect_stream
from ullage.observe.job_ledger import beside_job

#: The log of that build leaves the indexer out of the KV size; the record holds the true size, and says so.
NOT_WHAT_THE_LOG_SAYS = {("sglang-11309-v32-before", "kv_cache")}
#: Quantities that stand for one figure per card in the records and for one card in the quote.
TOLERANCE = 0.0051
#: How the records shorten the lines on CUDA graphs.
GRAPHS = re.compile(r"^(?:Graph capturing \.\.\. )?took ([\d.]+ GiB)(?: \(graphs\))?$")


def records() -> list[dict]:
    path = need_shared("truth", "serving.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read(quote: str) -> dict[str, list[Figure]]:
    """Read a quote, whose lines are joined by " / " and whose graph lines are written short in the records."""
    found = Collected()
    figures: dict[str, list[Figure]] = {}
    for number, line in enumerate(quote.split(" / "), 1):
        found.take(number, "", GRAPHS.sub(r"Graph capturing finished, took \1", line))
    for figure in found.all():
        figures.setdefault(figure.quantity, []).append(figure)
    return figures


def value(figure: Figure) -> float:
    return figure.size.bytes / 2**30 if figure.size is not None else figure.value


def test_no_figure_of_a_quote_is_read_wrongly_and_most_are_read() -> None:
    num_read, wrong, unread = 0, [], []
    for record in records():
        figures = read(record["quote"])
        for measured in record["measured"]:
            key = (record["id"], measured["quantity"])
            got = figures.get(measured["quantity"], [])
            want = measured["value"] if measured.get("gib") is None else measured["gib"]
            values = [want, *([each / 1024 for each in measured.get("per_rank") or [] if measured["unit"] == "MiB"])]
            if any(abs(value(each) - one) <= TOLERANCE for each in got for one in values):
                num_read += 1
            elif got and key not in NOT_WHAT_THE_LOG_SAYS:
                wrong.append((key, want, [value(each) for each in got]))
            else:
                unread.append(key)
    print(
        f"{num_read} figures read back, {len(wrong)} wrongly, {len(unread)} are not in the engine's words in the quotes"
    )
    assert wrong == []
    assert num_read >= 200


@pytest.mark.parametrize("engine", ["vllm", "sglang", "llamacpp"])
def test_weights_and_cache_are_found_in_each_engine(engine: str) -> None:
    found = {
        quantity for record in records() if record["job"]["engine"] == engine for quantity in read(record["quote"])
    }
    assert {"weights", "kv_cache"} <= found


#: Logs whose terms are more than the share that the job states: 47.11 + 31.99 GiB of 0.8 x 94.97 GiB.
MORE_THAN_THE_SHARE = {"vllm-file-glm47-nvfp4-4xpro6000"}


def test_the_rest_of_a_vllm_log_is_shown_beside_its_job(tmp_path: Path) -> None:
    """What a start leaves unexplained is the profiled peak and memory outside PyTorch: never less than nothing."""
    rests = {}
    for record in records():
        found = inspected(record["quote"])
        if found is None or found.engine != "vllm" or "gpu" not in record["job"]:
            continue
        if not {"weights", "kv_cache"} <= {term.name for term in found.engine_terms}:
            continue
        path = tmp_path / "job.json"
        path.write_text(json.dumps(record["job"]), encoding="utf-8")
        beside = beside_job(found, path)
        assert beside.listings[0].name == "ledger"
        rests[record["id"]] = next(term for term in beside.engine_terms if term.name == "unexplained")
        assert not any("so the rest is not known" in note for note in beside.notes)
    below = {name for name, rest in rests.items() if rest.high_bytes < 0}
    assert below == MORE_THAN_THE_SHARE
    assert len(rests) >= 20


def test_where_the_rest_is_not_known_it_is_said() -> None:
    for record in records():
        found = inspected(record["quote"])
        if found is not None and {"weights", "kv_cache"} <= {term.name for term in found.engine_terms}:
            told = any("the rest is not known" in note for note in found.notes)
            assert told or any(term.name == "unexplained" for term in found.engine_terms), record["id"]


def inspected(quote: str) -> Inspection | None:
    """Inspect a quote as the log that it is from."""
    lines = [GRAPHS.sub(r"Graph capturing finished, took \1", line) for line in quote.split(" / ")]
    try:
        return inspect_stream(io.BytesIO("\n".join(lines).encode()))
    except InputError:
        return None
