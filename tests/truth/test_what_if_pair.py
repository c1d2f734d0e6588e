"""One job recorded on two devices, with and without expandable segments: the what-if of the one foretells the other.

Event by event the two recordings are the same, but for the blocks that are older than the first of them, three
requests of 40 MiB that it has more, and what the second one frees at its end.
"""

from difflib import SequenceMatcher

import pytest
from conftest import need_shared

from ullage.allocator.events import ALLOC, FREE_COMPLETED, FREE_REQUESTED, Recording
from ullage.allocator.replay import to_workload
from ullage.allocator.run import run_workload
from ullage.allocator.session import replay_device
from ullage.allocator.what_if import compare
from ullage.observe.snapshot import read_snapshot

PAIR = "codeasier__MemSnapDump__tests__test_data__snapshot_with_multi_devices.pkl"
MiB = 2**20
EXTRA = 40 * MiB


def requests(recording):
    return [(kind, size) for kind, _at, size, _place in recording if kind in (ALLOC, FREE_REQUESTED, FREE_COMPLETED)]


@pytest.fixture(scope="module")
def pair():
    """(what the device with expandable segments reserved, the work of the other one with the requests it lacks)."""
    snapshot = read_snapshot(need_shared("snapshots", PAIR))
    growing, plain = replay_device(snapshot, 0), replay_device(snapshot, 1)
    assert (growing.settings.expandable_segments, plain.settings.expandable_segments) == (True, False)
    first, second = (snapshot.devices[number].recording for number in (0, 1))
    steps = SequenceMatcher(None, requests(first), requests(second), autojunk=False).get_opcodes()
    lacking = {start for tag, _low, _high, start, _end in steps if tag in ("replace", "delete")}
    assert [requests(first)[low:high] for tag, low, high, *_rest in steps if tag in ("replace", "delete")] == [
        [(ALLOC, EXTRA)]
    ] * 3
    assert plain.peak_reserved_bytes == 526 * MiB
    assert steps[0][3:] == (0, 320)
    assert steps[-1][0] == "insert"
    mixed, number = Recording(known_places=second.known_places), 0
    after_first = {320 if start == 0 else start for start in lacking}
    for kind, address, size, place in second:
        if kind in (ALLOC, FREE_REQUESTED, FREE_COMPLETED):
            if number in after_first:
                mixed.append(ALLOC, 2**60 + number * EXTRA, EXTRA, place)
            number += 1
        mixed.append(kind, address, size, place)
    return growing, plain, to_workload(mixed, [])


def test_the_what_if_names_what_the_other_device_confirms(pair):
    growing, plain, work = pair
    recorded = plain.settings
    kept = run_workload(work, recorded)
    comparison = compare(work, recorded, kept)
    found = {outcome.settings.text: outcome for outcome in comparison.outcomes}
    winner = found["expandable_segments:True"]
    assert winner.peak_allocated_bytes == growing.peak_allocated_bytes
    assert winner.peak_reserved_bytes == growing.peak_reserved_bytes == 614 * MiB
    assert comparison.baseline.peak_reserved_bytes == 632 * MiB
    assert comparison.outcomes[0].peak_reserved_bytes == winner.peak_reserved_bytes
    assert comparison.gain_bytes(winner) == 18 * MiB
    assert comparison.better == []  # less than one segment, which other recordings show to be chance
