"""Quotes of engine logs, read back into the figures of their own records."""

from __future__ import annotations

import json
import re

import pytest
from conftest import need_shared

from ullage.observe.engine_logs import Collected, Figure

#: The log of that build leaves the indexer out of the KV size; the record holds the true size, and says so.
NOT_WHAT_THE_LOG_SAYS = {("sglang-11309-v32-before", "kv_cache")}
#: Quantities that stand for one figure per card in the records and for one card in the quote.
TOLERANCE = 0.0051


def records() -> list[dict]:
    path = need_shared("truth", "serving.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read(quote: str) -> dict[str, list[Figure]]:
    """Read a quote, whose lines are joined by " / " and whose graph lines are written short in the records."""
    found = Collected()
    figures: dict[str, list[Figure]] = {}
    for number, line in enumerate(quote.split(" / "), 1):
        line = re.sub(
            r"^(?:Graph capturing \.\.\. )?took ([\d.]+ GiB)(?: \(graphs\))?$",
            r"Graph capturing finished, took \1",
            line,
        )
        found.take(number, "", line)
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
