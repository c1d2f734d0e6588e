"""What other settings would have done: at a capacity that is known, given or recorded."""

import pytest

from ullage.allocator.events import WorkloadBuilder
from ullage.allocator.export import record_workload
from ullage.allocator.session import replay_device
from ullage.allocator.settings import parse_settings
from ullage.observe.snapshot import read_snapshot
from ullage.observe.write_snapshot import write_snapshot

MiB = 2**20


def in_pieces(num_blocks=100):
    """Blocks of 7 MiB: two in a segment of 20 MiB, and 6 MiB of it that fit nothing; end to end in one that grows."""
    builder = WorkloadBuilder(annotated=True)
    for _at in range(num_blocks):
        builder.allocate(7 * MiB)
    return builder.work


def snapshot_of(tmp_path, work, conf="", capacity=None):
    path = tmp_path / "snapshot.pickle"
    recorded = record_workload(work, parse_settings(conf), capacity_bytes=capacity)
    write_snapshot(path, {0: recorded})
    return read_snapshot(path), recorded.outcome


def test_a_request_that_was_refused_is_tried_at_the_capacity_of_then(tmp_path):
    capacity = 800 * MiB
    snapshot, outcome = snapshot_of(tmp_path, in_pieces(), capacity=capacity)
    assert outcome.death is not None
    found = replay_device(snapshot, 0, what_if=True)
    comparison = found.comparison
    assert comparison.capacity_bytes == capacity
    assert comparison.baseline.death is not None
    assert comparison.baseline.death.requested_bytes == outcome.death.requested_bytes
    assert all(one.death is None for one in comparison.better)
    assert {"large_segment_size_mb:64", "expandable_segments:True"} <= {one.settings.text for one in comparison.better}
    assert any("refused" in sentence for sentence in found.warnings)
    again = record_workload(in_pieces(81), comparison.better[0].settings, capacity_bytes=capacity)
    assert again.outcome.death is None
    assert record_workload(in_pieces(81), parse_settings(""), capacity_bytes=capacity).outcome.death is not None


def test_nothing_is_advised_where_no_setting_saves_it(tmp_path):
    builder = WorkloadBuilder()
    for _at in range(9):
        builder.allocate(100 * MiB)
    snapshot, outcome = snapshot_of(tmp_path, builder.work, capacity=800 * MiB)
    assert outcome.death is not None
    comparison = replay_device(snapshot, 0, what_if=True).comparison
    assert comparison.better == []
    assert all(one.death is not None for one in comparison.outcomes)


@pytest.mark.parametrize("conf", ["", "expandable_segments:True", "roundup_power2_divisions:4"])
def test_the_recorded_setting_is_not_tried_again(tmp_path, conf):
    snapshot, _outcome = snapshot_of(tmp_path, in_pieces(30), conf)
    comparison = replay_device(snapshot, 0, what_if=True).comparison
    tried = [outcome.settings.text for outcome in comparison.outcomes]
    assert conf not in tried
    assert len(set(tried)) == len(tried) >= 10
    assert ("" in tried) == (conf != "")


def test_what_it_names_is_what_a_run_of_it_takes(tmp_path):
    """Fragmentation made on purpose: the winner's figures are those of a run under it."""
    work = in_pieces()
    snapshot, outcome = snapshot_of(tmp_path, work)
    comparison = replay_device(snapshot, 0, what_if=True).comparison
    best = comparison.better[0]
    real = record_workload(work, best.settings).outcome
    assert real.peak_reserved_bytes == best.peak_reserved_bytes <= 0.7 * outcome.peak_reserved_bytes
    assert real.counters.num_driver_calls == best.counters.num_driver_calls
