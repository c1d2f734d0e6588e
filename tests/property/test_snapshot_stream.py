"""Reading event by event out of the bytes gives what reading the whole tree gives, however it was pickled."""

import copy
import pickle
import tracemalloc
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ullage.errors import InputError
from ullage.observe.pickle_limits import Limits
from ullage.observe.snapshot import parse_snapshot, read_snapshot

MiB = 2**20
FRAMES = [{"name": f"f{n}", "filename": f"model/{n % 7}.py", "line": n} for n in range(300)]
DEFAULT_POOL = [0, 0]
STACKS = [FRAMES[n : n + n % 40] for n in range(0, 250, 9)]
INTEGERS = st.sampled_from([0, 1, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**39, 2**47 + 512, 2**63, 2**64 - 1])
ODD = st.sampled_from([-1, 2**64, 2**70, None, "4", 1.5, True, [], (1, 2)])


@st.composite
def events(draw):
    event = {
        "action": draw(
            st.sampled_from(["alloc", "free_requested", "free_completed", "segment_alloc", "oom", "snapshot", "dance"])
        ),
        "addr": draw(INTEGERS),
        "size": draw(INTEGERS),
        "stream": draw(st.sampled_from([0, 7, 2**40])),
    }
    if event["action"] == "oom":
        event["device_free"] = event.pop("addr")
    flavour = draw(st.integers(0, 3))
    if flavour:
        event["time_us"] = draw(INTEGERS)
    if flavour > 1:
        event["compile_context"] = draw(st.sampled_from(["N/A", "", "0/0", "x" * 300, None]))
        event["user_metadata"] = "".join(draw(st.sampled_from(["", "step", "ü", "N/A"])))
        event["pool_id"] = draw(st.sampled_from([(0, 0), (0, 3), (300, 1), [0, 1]]))
    if draw(st.integers(0, 9)):
        stack = draw(st.sampled_from(STACKS))
        event["frames"] = stack if draw(st.booleans()) else list(stack)
    if draw(st.integers(0, 19)) == 0:
        event[draw(st.sampled_from([*event, "mood"]))] = draw(ODD)
    return event


def tree_of(traces, after):
    blocks = [
        {"address": 4096, "size": 512, "requested_size": 4, "state": "active_allocated", "frames": STACKS[5]},
        {"address": 4608, "size": 2 * MiB - 512, "requested_size": 0, "state": "inactive", "frames": []},
    ]
    segment = {
        "device": 0, "address": 4096, "total_size": 2 * MiB, "stream": 0, "segment_type": "small", "blocks": blocks,
    }  # fmt: skip
    parts = {"segments": [segment], "device_traces": traces, "allocator_settings": {"max_split_size": -1}}
    return dict(reversed(parts.items())) if after else parts


def answer(function, *arguments):
    """Return all that a snapshot holds, in values that can be compared; of a refusal the words."""
    try:
        snapshot = function(*arguments)
    except InputError as error:
        return error.what
    found = [snapshot.settings, snapshot.warnings]
    for device, memory in snapshot.devices.items():
        recording = memory.recording
        places = recording.known_places.places
        rows = [
            (kind, address, size, places[place], recording.known_stacks.stack(stack), time_us)
            for (kind, address, size, place), stack, time_us in zip(
                recording, recording.stacks, recording.times_us, strict=True
            )
        ]
        segments = [replace(segment, place=0) for segment in memory.segments]
        whose = [places[segment.place] for segment in memory.segments]
        found += [device, memory.num_events, memory.ooms, memory.stacks, segments, whose, rows]
    return found


def distinct(traces):
    """Copy the texts and pairs of the events: pybind makes a new object for each."""
    for trace in traces:
        for event in trace:
            for key in ("compile_context", "user_metadata"):
                if isinstance(event.get(key), str):
                    event[key] = "".join([*event[key]])
            if isinstance(event.get("pool_id"), tuple):
                event["pool_id"] = (*event["pool_id"],)
    return traces


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    traces=st.lists(st.lists(events(), max_size=30), max_size=3),
    protocol=st.integers(0, 5),
    after=st.booleans(),
    fresh=st.booleans(),
)
def test_both_ways_agree(tmp_path_factory, traces, protocol, after, fresh):
    tree = tree_of(distinct(traces) if fresh else traces, after)
    path = tmp_path_factory.mktemp("stream") / "snapshot.pickle"
    path.write_bytes(pickle.dumps(tree, protocol))
    assert answer(read_snapshot, path) == answer(parse_snapshot, tree)


def long_trace(num_events):
    """As PyTorch writes it: a list of frames for each event, texts and pairs of their own."""
    return [
        {
            "action": ("alloc", "free_requested", "free_completed")[at % 3],
            "addr": 2**46 + at // 3 % 5000 * 512,
            "size": 500 + at // 3 % 7,
            "stream": 0,
            "time_us": 1_748_730_219_000_000 + at,
            "compile_context": "".join(["N/", "A"]),
            "user_metadata": "".join(["st", "ep"]),
            "pool_id": (*DEFAULT_POOL,),
            "frames": list(STACKS[at % len(STACKS)]),
        }
        for at in range(num_events)
    ]


def test_a_long_trace_is_read_by_its_shape(tmp_path, monkeypatch):
    """All but a few of the events: the first one, and those that a frame of the pickle cuts."""
    from ullage.observe.snapshot import _Reader

    trace, slow = long_trace(20_000), []
    plain = _Reader.events
    monkeypatch.setattr(_Reader, "events", lambda self, device, items: slow.extend(items) or plain(self, device, items))
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(pickle.dumps(tree_of([trace], False), 4))
    found = answer(read_snapshot, path)
    assert len(slow) < 400
    assert found == answer(parse_snapshot, tree_of([trace], False))


@pytest.mark.parametrize("protocol", [2, 4])
def test_memory_does_not_grow_with_the_file(tmp_path, protocol):
    """Of 10,000 events of several hundred bytes each only the arrays stay."""
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(pickle.dumps(tree_of([long_trace(10_000)], False), protocol))
    tracemalloc.start()
    memory = read_snapshot(path).devices[0]
    _now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(memory.recording) == 10_000
    assert path.stat().st_size > MiB // 2
    assert peak < 10_000 * 120 + 4 * MiB


def test_what_is_left_out_takes_no_memory_either(tmp_path):
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(pickle.dumps(tree_of([long_trace(30)], False) | {"host_traces": long_trace(10_000)}, 4))
    tracemalloc.start()
    found = answer(read_snapshot, path)
    _now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 * MiB
    assert found == answer(parse_snapshot, tree_of([long_trace(30)], False))


BOMBS = {
    "empty lists": b"]",
    "empty dicts, kept": b"}\x94",
    "integers": b"J\x01\x02\x03\x04",
    "texts": b"X\x00\x10\x00\x00" + b"x" * 4096,
    "marks": b"(",
    "integers of 9 bytes": b"\x8a\x09" + b"\xff" * 8 + b"\x1f",
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_would_fill_the_memory_is_refused_in_time(tmp_path, name):
    """Far below the usual limits; they are looked at once per window."""
    piece = BOMBS[name]
    path = tmp_path / "bomb.pickle"
    path.write_bytes(b"\x80\x04(" + piece * (3 * MiB // len(piece)) + b"l.")
    with pytest.raises(InputError, match="limit"):
        read_snapshot(path, limits=Limits(opcodes=150_000, containers=50_000))


def test_progress_is_told(tmp_path):
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(pickle.dumps(tree_of([long_trace(20_000)], False), 4))
    told = []
    read_snapshot(path, progress=lambda done, total: told.append((done, total)))
    size = path.stat().st_size
    assert told == sorted(told)
    assert told[0] == (0, size)
    assert all(total == size for _done, total in told)
    assert len(told) > size // 2**20


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tree: tree["device_traces"].append(tree["device_traces"][0]),
        lambda tree: tree["device_traces"][0].append(tree["device_traces"][0][0]),
        lambda tree: tree["device_traces"][0].append(tree["device_traces"][0]),
        lambda tree: tree.update(other=tree["device_traces"][0][5]),
        lambda tree: tree["device_traces"].extend([] for _ in range(2000)),
    ],
)
@pytest.mark.parametrize("num_events", [12, 3000])
def test_what_stands_twice_is_refused(tmp_path, spoil, num_events):
    tree = tree_of([copy.deepcopy(long_trace(num_events))], False)
    spoil(tree)
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(pickle.dumps(tree, 4))
    with pytest.raises(InputError) as refused:
        read_snapshot(path)
    assert "\n" not in str(refused.value)


def test_a_second_list_of_traces_is_no_way_in(tmp_path):
    """The same key twice: the first list was taken, the second one is read as any other."""
    event = {"action": "alloc", "addr": 1, "size": 1, "stream": 0}
    inner = pickle.dumps([[event]], 4)[11:-1]
    body = b"\x80\x04}(" + b"".join(b"\x8c\x0ddevice_traces" + inner.replace(b"\x94", b"") for _ in range(2))
    path = tmp_path / "twice.pickle"
    path.write_bytes(body + b"\x8c\x08segments]u.")
    memory = read_snapshot(path).devices[0]
    assert memory.num_events == 1
