"""Search, loads, curves, streams and recordings: nothing here needs torch or a network."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullage.bench.client import Answer, Endpoint, parse_event
from ullage.bench.curves import Sample, StepRow, median, quantile, stability, thinned
from ullage.bench.loads import changing_script, changing_waves, tooth
from ullage.bench.search import Try, break_point
from ullage.bench.serve import summary
from ullage.bench.watching import read_recording, watching
from ullage.errors import InputError
from ullage.units import MiB


def machine(largest):
    """Return an attempt that lives up to ``largest``, and the sizes it was asked for."""
    asked = []

    def attempt(size):
        asked.append(size)
        return Try(size=size, lives=size <= largest, cause="" if size <= largest else "memory")

    return attempt, asked


@given(largest=st.integers(0, 5000), cap=st.integers(1, 6000), first=st.integers(1, 20))
def test_the_search_finds_the_largest_that_lives(largest, cap, first):
    attempt, asked = machine(largest)
    found = break_point(attempt, unit="micro_batch", first=first, cap=cap)
    best = min(largest, cap)
    if found.smallest_failing is None:
        assert found.largest == cap <= largest and found.limited_by == "cap"
    else:
        assert (found.largest, found.smallest_failing, found.limited_by) == (best, best + 1, "memory")
    assert len(asked) == len(set(asked)) and max(asked) <= cap
    assert len(asked) <= 2 * (max(1, cap).bit_length() + 1) + 5


def test_the_search_says_when_nothing_lives():
    attempt, asked = machine(0)
    found = break_point(attempt, unit="micro_batch")
    assert (found.largest, found.smallest_failing, asked) == (0, 1, [1])


def test_a_tolerance_saves_tries():
    exactly, loosely = machine(1000), machine(1000)
    break_point(exactly[0], unit="x")
    found = break_point(loosely[0], unit="x", tolerance=0.1)
    assert len(loosely[1]) < len(exactly[1])
    assert found.largest <= 1000 < found.smallest_failing <= found.largest * 1.1 + 1


@given(batch=st.integers(1, 300), seq=st.integers(1, 5000))
def test_changing_load_never_goes_beyond_full_load_and_comes_back(batch, seq):
    script = changing_script(batch, seq)
    assert max(step.micro_batch for step in script) == batch and max(step.seq for step in script) == seq
    assert min(min(step.micro_batch, step.seq) for step in script) >= 1
    assert script[0] == script[-1] and script[0].label == "steady"
    assert {step.label for step in script} == {"steady", "ramp", "settle", "burst", "sawtooth"}
    waves = changing_waves(batch, seq, 4)
    assert max(wave.concurrency for wave in waves) == batch and waves[0] == waves[-1]
    assert all(wave.num_requests >= wave.concurrency for wave in waves)


@given(st.integers(1, 10_000))
def test_a_tooth_rises_to_the_longest(longest):
    lengths = tooth(longest)
    assert lengths == sorted(set(lengths)) and lengths[-1] == longest and lengths[0] >= 1


def row(t, label, seconds, reserved, micro_batch=2, allocated=100 * MiB):
    after = Sample(t=t + seconds, used_bytes=reserved, allocated_bytes=allocated, reserved_bytes=reserved)
    return StepRow(t=t, label=label, micro_batch=micro_batch, seq=8, seconds=seconds, after=after)


def test_drift_is_what_is_held_more_at_the_same_load():
    rows = [
        row(0, "steady", 1.0, 200 * MiB),
        row(1, "steady", 1.0, 220 * MiB),  # the last before the changes counts
        row(2, "burst", 2.0, 400 * MiB, 4),
        row(4, "settle", 3.0, 400 * MiB),
        row(7, "settle", 1.05, 400 * MiB),
        row(9, "steady", 1.0, 300 * MiB),
    ]
    found = stability(rows)
    assert found.drift_bytes == 80 * MiB and found.drift_bytes_per_step == 80 * MiB / 4
    assert found.num_bursts == 1 and found.recovered
    assert found.recovery_seconds == pytest.approx(8.05 - 4)


def test_a_burst_that_is_not_recovered_from_is_said():
    rows = [
        row(0, "steady", 1.0, 1),
        row(1, "burst", 2.0, 1),
        row(3, "settle", 1.2, 1),
        row(5, "burst", 2.0, 1),
        row(7, "settle", 1, 1),
    ]
    found = stability(rows)
    assert found.num_bursts == 2 and found.recovered is False and found.recovery_seconds is None
    assert found.drift_bytes is None  # it never came back to the steady load


def test_drift_is_not_read_off_steps_of_another_shape():
    rows = [row(0, "steady", 1, 1), row(1, "ramp", 1, 1), row(2, "steady", 1, 9, micro_batch=3)]
    assert stability(rows).drift_bytes is None


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=50))
def test_quantiles(values):
    assert quantile(values, 1.0) == max(values) and quantile(values, 0.0) == min(values)
    assert min(values) <= median(values) <= max(values)
    assert sum(value <= quantile(values, 0.95) for value in values) >= 0.95 * len(values)


@given(count=st.integers(1, 3000), limit=st.integers(3, 700))
def test_thinning_keeps_ends_and_the_peak(count, limit):
    samples = [Sample(t=float(at), used_bytes=(at * 7919) % 1009) for at in range(count)]
    kept = thinned(samples, limit)
    assert kept[0] == samples[0] and kept[-1] == samples[-1] and len(kept) <= max(limit, 3)
    assert max(one.used_bytes for one in kept) == max(one.used_bytes for one in samples)
    assert [one.t for one in kept] == sorted(one.t for one in kept)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ('{"choices":[{"text":"a"}]}', "a"),
        ('{"choices":[{"delta":{"content":"b"}}]}', "b"),
        ('{"choices":[{"delta":{"reasoning_content":"c","content":null}}]}', "c"),
        ('{"choices":[{"delta":{"role":"assistant"}}]}', ""),
        ('{"choices":[]}', ""),
        ('{"choices":[null]}', ""),
        ('{"choices":[{"delta":[1]}]}', ""),
        ("[1]", ""),
        ("{", ""),
    ],
)
def test_events_of_a_stream(data, text):
    assert parse_event(data)[1] == text


def test_a_wave_is_summed_up_without_the_requests_that_failed():
    answers = [
        Answer(t=0, seconds=2.0, ttft=0.5, gaps=(0.1, 0.2), prompt_tokens=7, output_tokens=3),
        Answer(t=0, seconds=4.0, ttft=1.5, gaps=(0.3,), output_tokens=2),
        Answer(t=0, seconds=9.0, error="HTTP 500: x"),
    ]
    found = summary(answers, 5.0)
    assert (found["num_answered"], found["num_errors"], found["errors"]) == (2, 1, ["HTTP 500: x"])
    assert (found["ttft_p50_seconds"], found["ttft_p95_seconds"]) == (1.0, 1.5)
    assert found["inter_token_p50_seconds"] == 0.2 and found["output_tokens_per_second"] == 1.0
    assert found["measured_prompt_tokens"] == 7
    assert summary([], 0.0)["output_tokens_per_second"] == 0.0


def test_the_two_apis_are_asked_in_their_own_words():
    plain, chat = Endpoint(url="http://x", model="m"), Endpoint(url="http://x", model="m", api="chat")
    assert plain.address == "http://x/v1/completions" and plain.body("p", 3)["prompt"] == "p"
    assert chat.address == "http://x/v1/chat/completions"
    assert chat.body("p", 3)["messages"] == [{"role": "user", "content": "p"}]


def recording(tmp_path, *lines, head=None):
    path = tmp_path / "watch.jsonl"
    first = {"ullage_recording": 1, "started": "2026-11-22T10:00:00+00:00", "devices": []} if head is None else head
    path.write_text(
        "\n".join([json.dumps(first), *(line if isinstance(line, str) else json.dumps(line) for line in lines)])
    )
    return path


def test_a_recording_adds_its_devices_up(tmp_path):
    path = recording(
        tmp_path,
        {"t": 0.0, "device": 0, "used_bytes": 5},
        {"t": 0.0, "device": 1, "used_bytes": 7},
        {"t": 0.5, "event": "oom", "text": "x"},
        {"t": 1.0, "device": 0, "used_bytes": 6},
        '{"t": 1.0, "dev',  # being written
    )
    started, found = read_recording(path)
    assert found == [(0.0, 12), (1.0, 13)] and started > 1.7e9


@pytest.mark.parametrize("head", [[], {"ullage_recording": 1}, {"ullage_recording": 1, "started": "soon"}, {"x": 1}])
def test_another_file_is_no_recording(tmp_path, head):
    with pytest.raises(InputError, match="is no recording"):
        read_recording(recording(tmp_path, head=head))


def test_what_cannot_be_watched_is_refused(tmp_path):
    with pytest.raises(InputError, match="no process"):
        watching(pid=2**22 + 7)
    with pytest.raises(InputError, match="cannot be read"):
        watching(recording=tmp_path / "absent")
