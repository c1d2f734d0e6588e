"""A run written as a snapshot and read again: the same events, placements and peaks."""

import pickle
import pickletools

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ullage.allocator.events import OOM, WorkloadBuilder
from ullage.allocator.export import export_snapshot, record_workload
from ullage.allocator.replay import recover_beginning, to_workload
from ullage.allocator.run import run_workload
from ullage.allocator.session import replay_device
from ullage.allocator.settings import parse_settings
from ullage.observe.snapshot import read_snapshot

KiB, MiB, GiB = 2**10, 2**20, 2**30
SIZES = st.one_of(
    st.integers(1, 4 * KiB), st.integers(1, 4 * MiB), st.integers(MiB, 80 * MiB), st.sampled_from([512, MiB, 10 * MiB])
)
#: Settings whose every step a recording shows: the collector and the limited split give memory back in parts.
CONFS = st.sampled_from(
    ["", "expandable_segments:True", "roundup_power2_divisions:4", "roundup_power2_divisions:[1:8,16:2,>:4]"]
)
CAPACITIES = st.sampled_from([None, 100 * MiB, 250 * MiB, GiB])


@st.composite
def work(draw, max_steps=60):
    builder = WorkloadBuilder(annotated=True)
    streams, live, waiting = (0, 7), [], []
    for step in range(draw(st.integers(1, max_steps))):
        builder.stack = builder.known_stacks.number(
            [("malloc", "??", 0)] * draw(st.integers(0, 1)) + [(f"f{draw(st.integers(0, 3))}", "a.py", step % 5)]
        )
        builder.time_us = 10**15 + step
        choice = draw(st.integers(0, 9))
        if choice < 5 or not (live or waiting):
            live.append(builder.allocate(draw(SIZES), stream=draw(st.sampled_from(streams))))
        elif choice < 8 and live:
            builder.free(live.pop(draw(st.integers(0, len(live) - 1))))
        elif choice == 8 and live:
            waiting.append(live.pop(draw(st.integers(0, len(live) - 1))))
            builder.request_free(waiting[-1])
        elif waiting:
            builder.complete_free(waiting.pop(0))
        else:
            builder.empty_cache()
    return builder.work


def columns(recording):
    places = recording.known_places.places
    stacks = [recording.known_stacks.stack(number) for number in recording.stacks]
    return [*zip(recording, [places[at] for at in recording.places], stacks, recording.times_us, strict=True)]


def without_place_numbers(rows):
    return [((kind, address, size), place, stack, time) for (kind, address, size, _), place, stack, time in rows]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=work(), conf=CONFS, capacity=CAPACITIES, shared=st.booleans())
def test_what_is_written_is_read_and_replayed(tmp_path_factory, steps, conf, capacity, shared):
    from ullage.observe.write_snapshot import write_snapshot

    path = tmp_path_factory.mktemp("export") / "snapshot.pickle"
    recorded = record_workload(steps, parse_settings(conf), capacity_bytes=capacity)
    write_snapshot(path, {0: recorded}, share_stacks=shared)
    outcome = recorded.outcome
    plain = run_workload(steps, parse_settings(conf), capacity_bytes=capacity)
    assert (outcome.peak_reserved_bytes, outcome.peak_allocated_bytes, outcome.death, outcome.counters) == (
        plain.peak_reserved_bytes,
        plain.peak_allocated_bytes,
        plain.death,
        plain.counters,
    )
    snapshot = read_snapshot(path)
    memory = snapshot.devices[0]
    assert snapshot.warnings == []
    assert memory.num_events == len(recorded.recording)
    assert without_place_numbers(columns(memory.recording)) == without_place_numbers(columns(recorded.recording))
    assert sorted(memory.free_blocks) == sorted(recorded.free_blocks)
    table = steps.known_stacks
    assert memory.stacks == {address: table.stack(number) for address, number in recorded.block_stacks.items()}
    found = replay_device(snapshot, 0)
    placement = found.placement
    assert (placement.checked, placement.final_equal) == (placement.equal, placement.final_segments)
    assert found.settings == parse_settings(conf)
    assert (found.peak_reserved_bytes, found.peak_allocated_bytes, found.final_reserved_bytes) == (
        outcome.peak_reserved_bytes,
        outcome.peak_allocated_bytes,
        outcome.final_reserved_bytes,
    )
    assert bool(memory.ooms) == (outcome.death is not None) == (OOM in memory.recording.kinds)


@settings(max_examples=60, deadline=None)
@given(work(), CONFS)
def test_a_free_run_of_what_was_written_takes_the_same(steps, conf):
    asked = parse_settings(conf)
    recorded = record_workload(steps, asked)
    beginning = recover_beginning(recorded.segments, recorded.recording, asked)
    assert (beginning.segments, beginning.num_inconsistent) == ([], 0)
    again = run_workload(to_workload(recorded.recording, []), asked)
    assert again.peak_reserved_bytes == recorded.outcome.peak_reserved_bytes
    assert again.final_reserved_bytes == recorded.outcome.final_reserved_bytes
    assert again.peak_allocated_bytes == recorded.outcome.peak_allocated_bytes


def opcodes(raw):
    """Return the opcodes without the frames of the pickle, which change nothing."""
    return [(one.name, argument) for one, argument, _at in pickletools.genops(raw) if one.name != "FRAME"]


def test_the_file_is_as_pythons_pickler_writes_it(tmp_path):
    """Opcode by opcode what the pickler itself makes of the tree, numbers of the memo included."""
    builder = WorkloadBuilder(annotated=True)
    for step in range(1500):
        builder.stack = builder.known_stacks.number([("f", "a.py", step % 7), ("main", "b.py", 1)])
        builder.time_us = 10**15 + step
        owner = builder.allocate(4096 * (1 + step % 9))
        if step % 3:
            builder.free(owner)
    path = tmp_path / "snapshot.pickle"
    outcome = export_snapshot(path, builder.work, parse_settings(""), device=1)
    raw = path.read_bytes()
    tree = pickle.loads(raw)
    assert [len(trace) for trace in tree["device_traces"]] == [
        0,
        1500 + 2 * 1000 + outcome.num_segments_allocated,
    ]
    assert opcodes(raw) == opcodes(pickle.dumps(tree, 4))
    assert {event["frames"][0]["filename"] for event in tree["device_traces"][1]} == {"a.py"}
    assert not list(tmp_path.glob(".*"))
