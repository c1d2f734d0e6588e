"""``ullage bench serve`` against an endpoint that can be told to fail."""

import json
import os
import socket

import jsonschema
import pytest
from endpoint import endpoint

from ullage.cli import main
from ullage.cli.schema import FOLDER
from ullage.records.validate import validate_files

SMALL = ["--output-tokens", "3", "--prompt-tokens", "16", "--requests", "4", "--idle", "0.2"]


def bench(url, *words, capsys):
    code = main(["bench", "serve", url, *SMALL, "--json", *words])
    said = capsys.readouterr()
    answer = json.loads(said.out) if said.out else None
    if answer is not None:
        jsonschema.validate(answer, json.loads((FOLDER / "bench.json").read_text()))
    return code, answer, said.err


def test_the_break_point_is_where_requests_fail(capsys):
    with endpoint(most=5, pause=0.02) as server:  # long enough that those who ask together are there together
        code, answer, _said = bench(server.url, "--max-concurrency", "64", "--past-knee", capsys=capsys)
    found = answer["break_point"]
    assert code == 0 and (found["largest"], found["smallest_failing"], found["limited_by"]) == (5, 6, "errors")
    died = next(one for one in found["tries"] if not one["lives"])
    assert "HTTP 503: no memory" in died["detail"]
    assert [phase["name"] for phase in answer["phases"]] == ["idle", "full_load", "changing_load"]
    changing = answer["phases"][2]
    assert changing["figures"]["num_errors"] == 0 and max(one["concurrency"] for one in changing["waves"]) == 5
    lengths = [one["prompt_tokens"] for one in changing["waves"] if one["label"] == "sawtooth"]
    assert lengths == [2, 4, 8, 12, 16] * 2
    assert {one["measured_prompt_tokens"] for one in changing["waves"]} == {2, 4, 8, 12, 16}


def test_a_limit_on_latency_is_a_break_point(capsys):
    with endpoint(pause=0.01, slows=True) as server:
        _code, answer, _said = bench(
            server.url, "--max-ttft", "0.06", "--past-knee", "--max-concurrency", "64", capsys=capsys
        )
    found = answer["break_point"]
    assert found["limited_by"] == "latency" and 1 <= found["largest"] < found["smallest_failing"] <= 16


def test_past_the_knee_more_requests_bring_nothing(capsys):
    with endpoint(pause=0.01, slows=True) as server:
        _code, answer, _said = bench(server.url, "--max-concurrency", "64", capsys=capsys)
    assert answer["break_point"]["limited_by"] == "throughput" and answer["break_point"]["largest"] <= 16


def test_the_cap_is_said(capsys):
    with endpoint() as server:
        _code, answer, _said = bench(server.url, "--max-concurrency", "2", "--past-knee", capsys=capsys)
        paths = {path for path, _body, _key in server.seen}
    assert answer["break_point"]["limited_by"] == "cap" and answer["break_point"]["largest"] == 2
    assert answer["memory"] == "none" and paths == {"/v1/completions"}


def test_an_endpoint_that_refuses_one_request_is_an_error(capsys):
    with endpoint(most=0) as server:
        code, answer, said = bench(server.url, capsys=capsys)
    assert code == 2 and answer is None and "does not answer" in said and "no memory" in said


def test_an_endpoint_that_is_not_there_is_one_sentence(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        code, _answer, said = bench(url, "--model", "m", capsys=capsys)
    assert code == 2 and said.count("\n") == 1
    assert bench("ftp://x", capsys=capsys)[0] == 2


def test_an_endpoint_without_a_model_asks_for_its_name(capsys):
    with endpoint(lists=False) as server:
        code, _answer, said = bench(server.url, capsys=capsys)
    assert code == 2 and "--model" in said


def test_the_key_is_sent_and_never_printed(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MADE_UP_KEY", "not-a-real-key")
    records = tmp_path / "r.jsonl"
    words = ["--api-key", "MADE_UP_KEY", "--max-concurrency", "1", "--records", str(records)]
    with endpoint() as server:
        _code, answer, said = bench(server.url, *words, capsys=capsys)
        keys = {key for _path, _body, key in server.seen}
    assert keys == {"Bearer not-a-real-key"}
    assert "not-a-real-key" not in json.dumps(answer) + said + records.read_text()
    monkeypatch.delenv("MADE_UP_KEY")
    with endpoint() as server:
        assert bench(server.url, *words, capsys=capsys)[0] == 2


def test_memory_of_the_processes_is_seen_and_recorded(capsys, tmp_path):
    records = tmp_path / "r.jsonl"
    words = ["--pid", str(os.getpid()), "--max-concurrency", "2", "--records", str(records), "--engine", "vllm@0.33"]
    with endpoint() as server:
        _code, answer, _said = bench(server.url, *words, capsys=capsys)
    assert answer["memory"] == "rss"
    for phase in answer["phases"]:
        assert phase["peak_used_bytes"] > 10 * 2**20 and phase["ranks"][0]["curve"]
        times = [sample["t"] for sample in phase["ranks"][0]["curve"]]
        assert times == sorted(times) and times[0] >= 0 and times[-1] <= phase["seconds"] + 0.01
    report = validate_files([records])
    assert report.num_records == 1 and not report.internal_errors and report.comparisons[0].skipped


def test_a_recording_gives_the_curves(capsys, tmp_path):
    from datetime import datetime, timezone

    started = datetime.now(timezone.utc).isoformat()
    lines = [{"ullage_recording": 1, "started": started, "devices": []}]
    lines += [{"t": at / 20, "device": 0, "used_bytes": (1 + at) * 2**20} for at in range(12000)]
    path = tmp_path / "watch.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    with endpoint() as server:
        _code, answer, _said = bench(server.url, "--recording", str(path), "--max-concurrency", "1", capsys=capsys)
    assert answer["memory"] == "recording"
    peaks = [phase["peak_used_bytes"] for phase in answer["phases"]]
    assert peaks == sorted(peaks) and peaks[0] < peaks[2]


def test_the_text_and_the_page(capsys, tmp_path):
    pytest.importorskip("plotly")
    page = tmp_path / "bench.html"
    words = [*SMALL, "--max-concurrency", "2", "--past-knee", "--html", str(page), "--pid", str(os.getpid())]
    with endpoint() as server:
        assert main(["bench", "serve", server.url, *words]) == 0
    text = capsys.readouterr().out
    assert "2 lives, and no more was tried" in text and "changing load" in text
    html = page.read_text(encoding="utf-8")
    assert "stand-in" in html and "Search of the break point" in html and 'src="http' not in html
