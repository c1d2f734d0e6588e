"""Real recordings: every placement, every peak and the final layout, to the byte."""

from dataclasses import replace

import pytest
from conftest import need_shared

from ullage.allocator.events import ALLOC
from ullage.allocator.recorded import recorded_peaks
from ullage.allocator.replay import Replayer, recover_beginning, to_workload
from ullage.allocator.run import run_workload
from ullage.allocator.session import choose_device, replay_device
from ullage.allocator.settings import AllocatorSettings, parse_settings
from ullage.observe.snapshot import read_snapshot

FULLSTEP = "kkaitlyn111__cs336-a2-systems__memory_files__memory_ctx128_fullstep.pickle"
SMALL = "JasperSolt__EoR_NN__snapshot.pickle"
LEGACY = "Yiyi-philosophy__LLM-inference__oom_snapshot.pickle"
ASCEND = "codeasier__MemSnapDump__tests__test_data__snapshot_expandable.pkl"
ASCEND_TWO = "codeasier__MemSnapDump__tests__test_data__snapshot_with_multi_devices.pkl"
#: file, device, events, allocations, segments at the end, segments and maps within the recording
RECORDINGS = [
    (FULLSTEP, 0, 19_342, 6_771, 1_010, 783, 0),
    (SMALL, 0, 5_803, 1_935, 10, 7, 0),
    (ASCEND, 0, 8_092, 2_899, 2, 0, 45),
    (ASCEND_TWO, 0, 8_132, 2_899, 3, 0, 75),
    (ASCEND_TWO, 1, 9_700, 3_216, 52, 52, 0),
]


def open_snapshot(name):
    return read_snapshot(need_shared("snapshots", name))


@pytest.mark.parametrize(("name", "device", "events", "allocations", "segments", "taken", "maps"), RECORDINGS)
def test_every_placement_is_foretold(name, device, events, allocations, segments, taken, maps):
    snapshot = open_snapshot(name)
    found = replay_device(snapshot, device)
    assert (found.num_events, found.num_segments_allocated, found.num_maps) == (events, taken, maps)
    placement = found.placement
    assert (placement.checked, placement.equal) == (allocations, allocations)
    assert (placement.final_segments, placement.final_equal) == (segments, segments)
    assert placement.first_difference == ""
    recorded = sum(segment.size_bytes for segment in snapshot.devices[device].segments)
    assert found.final_reserved_bytes == recorded


@pytest.mark.parametrize(("name", "device"), [row[:2] for row in RECORDINGS])
@pytest.mark.parametrize("afresh", [False, True])
def test_a_free_run_reserves_what_was_recorded(name, device, afresh):
    """Made-up addresses; even when the blocks from before the recording are allocated anew, all sums come out."""
    snapshot = open_snapshot(name)
    found = replay_device(snapshot, device)
    memory = snapshot.devices[device]
    beginning = recover_beginning(memory.segments, memory.recording, found.settings).segments
    outcome = run_workload(to_workload(memory.recording, beginning), found.settings, afresh=afresh)
    if afresh and name == ASCEND_TWO and device == 1:
        assert not beginning
    assert outcome.peak_reserved_bytes == found.peak_reserved_bytes
    assert outcome.final_reserved_bytes == found.final_reserved_bytes
    assert outcome.death is None
    if not afresh:
        assert (outcome.counters.num_segments_allocated, outcome.counters.num_maps) == (
            found.num_segments_allocated,
            found.num_maps,
        )


def test_a_wrong_rule_is_found_out():
    """The check can fail: other rounding, other padding, and a block that moved are all seen."""
    memory = open_snapshot(FULLSTEP).devices[0]
    for wrong in (
        AllocatorSettings(padding_bytes=32),
        AllocatorSettings(divisions=(4,) * 16),
        AllocatorSettings(large_segment_size_bytes=64 * 2**20),
    ):
        beginning = recover_beginning(memory.segments, memory.recording, wrong)
        replayer = Replayer(memory.recording, beginning.segments, wrong)
        placement = replayer.run()
        assert placement.equal < placement.checked or placement.checked < 6_771
        assert placement.first_difference
    settings = AllocatorSettings()
    beginning = recover_beginning(memory.segments, memory.recording, settings)
    last = max(at for at, kind in enumerate(memory.recording.kinds) if kind == ALLOC)
    memory.recording.addresses[last] += 512
    placement = Replayer(memory.recording, beginning.segments, settings).run()
    assert placement.equal == placement.checked - 1 == 6_770


def test_counted_and_simulated_peaks_agree():
    memory = open_snapshot(SMALL).devices[0]
    peaks = recorded_peaks(memory.segments, memory.recording, AllocatorSettings())
    found = replay_device(open_snapshot(SMALL), 0)
    assert peaks.peak_reserved_bytes == found.peak_reserved_bytes == 134_217_728
    assert peaks.peak_allocated_bytes <= found.peak_allocated_bytes == 110_110_720


def test_figures_of_the_large_recording():
    found = replay_device(open_snapshot(FULLSTEP), 0)
    assert found.peak_reserved_bytes == found.final_reserved_bytes == 61_111_009_280
    assert found.peak_allocated_bytes == 55_079_000_576
    final = found.final
    assert final.in_use_bytes + final.releasable_bytes + final.pinned_bytes == final.reserved_bytes == 61_111_009_280
    snapshot = open_snapshot(FULLSTEP).devices[0]
    free = {address: size for address, _block, size in snapshot.free_blocks}
    whole = sum(one.size_bytes for one in snapshot.segments if free.get(one.address) == one.size_bytes)
    assert final.releasable_bytes == whole
    assert final.pinned_bytes == sum(size for _segment, _block, size in snapshot.free_blocks) - whole
    assert found.pinned_by[0].num_blocks == 1
    assert found.at_peak.reserved_bytes == 61_111_009_280


def test_expandable_segments_would_have_saved_gigabytes():
    found = replay_device(open_snapshot(FULLSTEP), 0, what_if=True)
    comparison = found.comparison
    assert comparison.baseline.peak_reserved_bytes == found.peak_reserved_bytes
    assert comparison.better[0].settings.text == "expandable_segments:True"
    assert comparison.better[0].peak_reserved_bytes >= comparison.better[0].peak_allocated_bytes
    assert comparison.gain_bytes(comparison.better[0]) > 5 * 2**30


def test_a_gain_of_one_segment_is_no_advice():
    comparison = replay_device(open_snapshot(SMALL), 0, what_if=True).comparison
    assert comparison.gain_bytes(comparison.outcomes[0]) == 20 * 2**20
    assert comparison.better == []


@pytest.mark.parametrize("settings", ["", "expandable_segments:True"])
def test_less_memory_is_met_by_giving_back_and_then_by_death(settings):
    snapshot = open_snapshot(FULLSTEP)
    parsed = parse_settings(settings)
    peak = replay_device(snapshot, 0, settings=parsed).peak_allocated_bytes
    for capacity in (62 * 2**30, 56 * 2**30, 52 * 2**30):
        found = replay_device(open_snapshot(FULLSTEP), 0, settings=parsed, capacity_bytes=capacity)
        assert found.death is None
        assert found.peak_reserved_bytes <= capacity
    dying = replay_device(open_snapshot(FULLSTEP), 0, settings=parsed, capacity_bytes=peak - 2**20)
    assert dying.death is not None
    assert dying.death.reserved_bytes <= peak


def test_a_snapshot_without_history_says_how_to_make_one():
    snapshot = open_snapshot(LEGACY)
    device, notes = choose_device(snapshot, None)
    found = replay_device(snapshot, device, what_if=True)
    assert (device, notes) == (0, [])
    assert (found.num_events, found.placement.checked) == (1, 0)
    assert found.peak_reserved_bytes == found.final_reserved_bytes == 11_844_714_496
    assert found.placement.final_equal == found.placement.final_segments == 176
    assert any("_record_memory_history" in sentence for sentence in found.warnings)
    assert found.stacks[snapshot.devices[0].segments[0].blocks[0].address]


def test_the_ascend_flavour_is_seen_in_the_blocks():
    found = replay_device(open_snapshot(ASCEND_TWO), 1)
    assert found.settings == replace(AllocatorSettings(), padding_bytes=32, alignment_bytes=16_384)
    assert any("Ascend" in sentence for sentence in found.warnings)
    assert replay_device(open_snapshot(FULLSTEP), 0).settings == AllocatorSettings()


def test_the_busiest_of_several_devices_is_shown():
    device, notes = choose_device(open_snapshot(ASCEND_TWO), None)
    assert device == 1
    assert "--device 0" in notes[0]
