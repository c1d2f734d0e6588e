"""The allocator's rules by small examples worked out by hand."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from ullage.allocator.events import BlockLayout, SegmentLayout, WorkloadBuilder
from ullage.allocator.metrics import fragmentation, layout_of, pins, utilisation
from ullage.allocator.rounding import is_small, round_size, segment_bytes
from ullage.allocator.run import run_workload
from ullage.allocator.settings import AllocatorSettings, parse_settings
from ullage.allocator.what_if import compare
from ullage.errors import InputError

KiB, MiB, GiB = 2**10, 2**20, 2**30
LIST = (8, 8, 8, 8, 8, 8, 8, 2, 4, 2, 4, 1, 1, 1, 1, 1)


@pytest.mark.parametrize(
    ("asked", "divisions", "rounded"),
    [
        (1, (), 512),
        (511, (), 512),
        (512, (), 512),
        (513, (), 1024),
        (1_200_000, (), 1_200_128),
        (1_200_000, (4,) * 16, 1_310_720),
        (3_000_001, (4,) * 16, 3_145_728),
        (130 * MiB, (4,) * 16, 160 * MiB),
        (130 * MiB, LIST, 192 * MiB),
        (128 * MiB, (4,) * 16, 128 * MiB),
        (1025, (4,) * 16, 1536),
        (2100, (4,) * 16, 2560),
        (700, (0,) * 16, 1024),
        (100 * GiB, (1,) * 15 + (2,), 128 * GiB - 32 * GiB + 32 * GiB),
    ],
)
def test_rounding(asked, divisions, rounded):
    assert round_size(asked, divisions) == rounded


def test_segments_and_pools():
    assert [segment_bytes(size) for size in (512, MiB, MiB + 512, 10 * MiB - 512, 10 * MiB, 21 * MiB)] == [
        2 * MiB, 2 * MiB, 20 * MiB, 20 * MiB, 10 * MiB, 22 * MiB,
    ]  # fmt: skip
    assert segment_bytes(5 * MiB, 64 * MiB) == 64 * MiB
    assert is_small(MiB)
    assert not is_small(MiB + 512)


REFERENCE = sys.executable if importlib.util.find_spec("torch") else os.environ.get("ULLAGE_REFERENCE_PYTHON")
ASK_TORCH = """
import ctypes, json, os, sys, torch
library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libc10.so"))
divisions = library._ZN3c1016CachingAllocator26AcceleratorAllocatorConfig24roundup_power2_divisionsEm
divisions.restype, divisions.argtypes = ctypes.c_size_t, [ctypes.c_size_t]
answers = []
for text in json.load(sys.stdin):
    torch._C._accelerator_setAllocatorSettings("large_segment_size_mb:20")
    try:
        torch._C._accelerator_setAllocatorSettings(text)
        answers.append([divisions(3 << (19 + i)) for i in range(16)])
    except (ValueError, RuntimeError):
        answers.append(None)
print(json.dumps(answers))
"""
LEGAL = [
    "", "roundup_power2_divisions:4", "roundup_power2_divisions:[64:8,128:2,256:4,512:2,1024:4,>:1]",
    "roundup_power2_divisions:[>:4]", "roundup_power2_divisions:[512:2,256:4]", "roundup_power2_divisions:[1:4,>:2]",
    "roundup_power2_divisions:[65536:4]", "roundup_power2_divisions:[256:2,>:4,512:8]",
    "roundup_power2_divisions:[32768:16,>:2]", "roundup_power2_divisions:[1:2,2:4,4:8,8:16,>:32]",
    "max_split_size_mb:20", "max_split_size_mb:512,garbage_collection_threshold:0.5", "expandable_segments:True,",
    " max_split_size_mb : 64 ", "large_segment_size_mb:11", "large_segment_size_mb:64,max_split_size_mb:64",
    "max_non_split_rounding_mb:20", "pinned_max_round_threshold_mb:8", "pinned_use_background_threads:False",
]  # fmt: skip
ILLEGAL = [
    "roundup_power2_divisions:3", "roundup_power2_divisions:[3:4]", "roundup_power2_divisions:0",
    "max_split_size_mb:19", "max_split_size_mb:x", "max_split_size_mb", "large_segment_size_mb:10",
    "garbage_collection_threshold:0", "garbage_collection_threshold:1.0", "expandable_segments:true",
    "expandable_segments:1", "max_non_split_rounding_mb:19", "roundup_power2_divisions:[256-1]",
    "large_segment_size_mb:64,max_split_size_mb:63", ":",
]  # fmt: skip


@pytest.mark.reference
@pytest.mark.skipif(not REFERENCE, reason="torch is not installed, and ULLAGE_REFERENCE_PYTHON names no interpreter")
def test_settings_are_read_as_torch_reads_them():
    texts = LEGAL + ILLEGAL
    asked = subprocess.run(
        [REFERENCE, "-c", ASK_TORCH], input=json.dumps(texts), capture_output=True, text=True, check=True
    )
    for text, table in zip(texts, json.loads(asked.stdout), strict=True):
        if table is None:
            assert text in ILLEGAL
        else:
            assert text in LEGAL
            assert list(parse_settings(text).divisions or (0,) * 16) == table, text


@pytest.mark.parametrize("text", LEGAL)
def test_what_torch_takes_is_taken(text):
    assert parse_settings(text)


@pytest.mark.parametrize("text", ILLEGAL)
def test_what_torch_refuses_is_refused(text):
    with pytest.raises(InputError):
        parse_settings(text)


def run(steps, settings="", **limits):
    """Run steps: a size to allocate, ("free", number), "empty"."""
    builder = WorkloadBuilder()
    for step in steps:
        if step == "empty":
            builder.empty_cache()
        elif isinstance(step, tuple):
            {"free": builder.free, "ask": builder.request_free, "done": builder.complete_free}[step[0]](step[1])
        else:
            builder.allocate(step)
    parsed = parse_settings(settings) if isinstance(settings, str) else settings
    return run_workload(builder.work, parsed, **limits)


def blocks(outcome):
    return [[block.size for block in blocks] for blocks in outcome.allocator.mapped_ranges()]


def test_small_requests_share_a_segment():
    outcome = run([100, 600, 512])
    assert outcome.final_reserved_bytes == 2 * MiB
    assert blocks(outcome) == [[512, 1024, 512, 2 * MiB - 2048]]
    assert (outcome.final_allocated_bytes, outcome.final_requested_bytes) == (2048, 1212)


def test_neighbours_merge_on_both_sides():
    outcome = run([512, 512, 512, ("free", 0), ("free", 2), ("free", 1)])
    assert blocks(outcome) == [[2 * MiB]]


def test_the_smallest_fitting_block_is_taken():
    """Free: 12, 11 and 30 MiB; 10.5 MiB goes into 11 MiB, rounded up to a segment of 12, and is not split."""
    outcome = run([12 * MiB, 14 * MiB, 30 * MiB, ("free", 0), ("free", 1), ("free", 2), 13 * MiB])
    assert outcome.num_segments_allocated == 3
    assert blocks(outcome) == [[12 * MiB], [14 * MiB], [30 * MiB]]
    assert outcome.final_allocated_bytes == 14 * MiB


def test_a_large_block_is_split_above_one_mebibyte_only():
    assert blocks(run([20 * MiB, ("free", 0), 19 * MiB]))[0] == [20 * MiB]
    assert blocks(run([20 * MiB, ("free", 0), 19 * MiB - 512]))[0] == [19 * MiB - 512, MiB + 512]


def test_max_split_size_keeps_large_blocks_whole():
    steps = [64 * MiB, ("free", 0), 16 * MiB]
    assert run(steps).num_segments_allocated == 1
    assert run(steps, "max_split_size_mb:32").num_segments_allocated == 2
    near = [64 * MiB, ("free", 0), 50 * MiB]
    assert run(near, "max_split_size_mb:32").num_segments_allocated == 1
    assert run([64 * MiB, ("free", 0), 40 * MiB], "max_split_size_mb:32").num_segments_allocated == 2
    wide = "max_split_size_mb:32,max_non_split_rounding_mb:30"
    assert run([64 * MiB, ("free", 0), 40 * MiB], wide).num_segments_allocated == 1


def test_streams_and_pools_do_not_mix():
    builder = WorkloadBuilder()
    first = builder.allocate(512, stream=1)
    builder.free(first)
    builder.allocate(512, stream=2)
    places = builder._places
    builder.allocate(512, place=places.index(1, (0, 7)))
    outcome = run_workload(builder.work, AllocatorSettings())
    assert outcome.num_segments_allocated == 3
    outcome.allocator.empty_cache()
    assert outcome.allocator.reserved == 4 * MiB


def test_a_pool_of_a_graph_is_kept_by_empty_cache():
    builder = WorkloadBuilder()
    builder.free(builder.allocate(512, place=builder._places.index(0, (0, 7))))
    builder.empty_cache()
    assert run_workload(builder.work, AllocatorSettings()).final_reserved_bytes == 2 * MiB


def test_a_block_that_a_stream_still_uses_is_not_reused():
    outcome = run([512 * KiB, ("ask", 0), 512 * KiB, ("done", 0)])
    assert outcome.peak_allocated_bytes == 512 * KiB
    assert outcome.peak_active_bytes == MiB
    assert blocks(outcome) == [[512 * KiB, 512 * KiB, MiB]]
    assert outcome.allocator.blocks_of(next(iter(outcome.allocator.segments)))[0].state == 1


def test_out_of_memory_waits_for_streams_gives_back_and_then_dies():
    steps = [30 * MiB, ("ask", 0), 40 * MiB]
    met = run(steps, capacity_bytes=50 * MiB)
    assert met.death is None
    assert (met.counters.num_retries, met.counters.num_synchronisations, met.final_reserved_bytes) == (1, 1, 40 * MiB)
    dead = run([30 * MiB, 40 * MiB], capacity_bytes=50 * MiB)
    assert (dead.death.step, dead.death.requested_bytes, dead.death.reserved_bytes) == (1, 40 * MiB, 30 * MiB)
    assert dead.death.limit_bytes == 50 * MiB


def test_a_fitting_block_that_only_waited_is_not_searched_again():
    """The retry asks the driver again and does not look at what the synchronisation freed (PyTorch issue 189504)."""
    steps = [30 * MiB, 15 * MiB, ("ask", 0), 30 * MiB]
    split = [60 * MiB, ("free", 0), 30 * MiB, 15 * MiB, ("ask", 1), 30 * MiB]
    assert run(steps, capacity_bytes=50 * MiB).death is None
    assert run(split, capacity_bytes=70 * MiB).death is not None


def test_oversize_blocks_are_given_back_first():
    steps = [100 * MiB, 40 * MiB, ("free", 0), ("free", 1), 130 * MiB]
    outcome = run(steps, "max_split_size_mb:32", capacity_bytes=150 * MiB)
    assert outcome.death is None
    assert outcome.counters.num_retries == 0
    assert outcome.counters.num_segments_freed == 2


def test_the_garbage_collector_frees_the_oldest():
    text = "garbage_collection_threshold:0.5,per_process_memory_fraction:0.9"
    steps = [30 * MiB, 40 * MiB, ("free", 0), *[512] * 8, ("free", 1), 60 * MiB]
    outcome = run(steps, text, capacity_bytes=200 * MiB)
    assert outcome.counters.num_segments_freed == 0  # 72 MiB reserved, below the threshold of 90 MiB
    outcome = run([*steps, 70 * MiB], text, capacity_bytes=200 * MiB)
    assert outcome.counters.num_segments_freed >= 1
    assert outcome.counters.num_retries == 0
    assert run(steps, "garbage_collection_threshold:0.5", capacity_bytes=200 * MiB).counters.num_segments_freed == 0


def test_a_fraction_limits_and_may_reject_at_once():
    text = "per_process_memory_fraction:0.5"
    steps = [40 * MiB, ("free", 0), 50 * MiB]
    assert run(steps, text, capacity_bytes=120 * MiB).counters.num_retries == 1
    rejected = run(steps, f"{text},throw_on_cudamalloc_oom:True", capacity_bytes=120 * MiB)
    assert (rejected.death.step, rejected.counters.num_rejections, rejected.counters.num_retries) == (1, 1, 0)
    with pytest.raises(InputError, match="--capacity"):
        run(steps, text)


def test_expandable_segments_grow_by_pages_and_shrink_by_whole_pages():
    outcome = run([30 * MiB, 20 * MiB, 512], "expandable_segments:True")
    assert outcome.counters.num_maps == 3
    assert outcome.counters.num_segments_allocated == 0
    assert outcome.final_reserved_bytes == 60 * MiB + 2 * MiB
    assert blocks(outcome)[0] == [30 * MiB, 20 * MiB, 10 * MiB]
    freed = run([30 * MiB, 20 * MiB, ("free", 0), "empty"], "expandable_segments:True")
    assert freed.final_reserved_bytes == 40 * MiB
    assert freed.counters.num_unmaps == 1  # 30 MiB free hold one whole page
    assert blocks(freed) == [[10 * MiB, 20 * MiB, 10 * MiB]]
    gone = run([30 * MiB, ("free", 0), "empty"], "expandable_segments:True")
    assert (gone.final_reserved_bytes, gone.allocator.segments) == (0, {})


def test_expandable_segments_fill_holes_before_they_grow():
    steps = [30 * MiB, 20 * MiB, ("free", 0), "empty", 40 * MiB, 25 * MiB]
    outcome = run(steps, "expandable_segments:True")
    assert outcome.final_reserved_bytes == 100 * MiB
    assert len(outcome.allocator.segments) == 1
    fixed = run(steps)
    assert fixed.final_reserved_bytes == 20 * MiB + 40 * MiB + 26 * MiB


def test_an_expandable_segment_that_cannot_grow_gives_back_and_dies():
    steps = [30 * MiB, 30 * MiB, ("free", 0), 50 * MiB]
    assert run(steps, "expandable_segments:True", capacity_bytes=100 * MiB).death is None
    assert run(steps, "expandable_segments:True", capacity_bytes=80 * MiB).death is not None


def test_freeing_twice_is_refused():
    for steps in ([512, ("free", 0), ("free", 0)], [512, ("ask", 0), ("ask", 0)], [512, ("ask", 0), ("free", 0)]):
        with pytest.raises(InputError, match="twice"):
            run(steps)


def test_other_backends_are_not_simulated():
    with pytest.raises(InputError, match="native"):
        run([512], "backend:cudaMallocAsync")


def layout():
    used = [BlockLayout(address=10 * MiB, size_bytes=2 * MiB, requested_bytes=MiB + 1)]
    return [
        SegmentLayout(address=0, size_bytes=20 * MiB, place=0, small=False, blocks=used),
        SegmentLayout(address=40 * MiB, size_bytes=2 * MiB, place=0, small=True),
        SegmentLayout(
            address=100 * MiB, size_bytes=60 * MiB, place=0, small=False, expandable=True,
            blocks=[BlockLayout(address=110 * MiB, size_bytes=2 * MiB, requested_bytes=2 * MiB)],
        ),
    ]  # fmt: skip


def test_fragmentation_by_hand():
    found = fragmentation(layout())
    assert found.reserved_bytes == 82 * MiB
    assert found.in_use_bytes == 4 * MiB
    assert found.releasable_bytes == 2 * MiB + 40 * MiB  # the whole small segment, two pages of the expandable one
    assert found.pinned_bytes == 18 * MiB + 18 * MiB
    assert found.internal == pytest.approx((MiB - 1) / (4 * MiB))
    assert fragmentation([]).internal == 0.0
    assert utilisation(3, 4) == 0.75
    assert utilisation(0, 0) == 1.0


def test_pins_name_the_block_that_keeps_a_segment():
    found = pins(layout())
    assert [(pin.address, pin.pinned_bytes, pin.num_blocks) for pin in found] == [
        (0, 18 * MiB, 1),
        (100 * MiB, 18 * MiB, 1),
    ]
    assert found[0].block.address == 10 * MiB


def test_a_layout_comes_back_from_the_simulator():
    outcome = run([512, 2 * MiB, 30 * MiB, ("free", 2)])
    found = fragmentation(layout_of(outcome.allocator))
    assert found.reserved_bytes == outcome.final_reserved_bytes == 52 * MiB
    assert found.releasable_bytes == 30 * MiB
    assert found.in_use_bytes == outcome.final_allocated_bytes


def growing_batches():
    """Activations that grow with the batch: each step needs blocks a little larger than all that are free."""
    builder = WorkloadBuilder()
    for batch in range(11, 60, 2):
        kept = [builder.allocate(batch * MiB) for _ in range(8)]
        for owner in kept:
            builder.free(owner)
    return builder.work


def test_what_if_ranks_and_advises_what_gains():
    work = growing_batches()
    kept = run_workload(work, AllocatorSettings())
    found = compare(work, AllocatorSettings(), kept)
    assert found.disturbance_bytes == 0
    assert found.better[0].settings.text == "expandable_segments:True"
    assert found.gain_bytes(found.better[0]) > GiB
    peaks = [outcome.peak_reserved_bytes for outcome in found.outcomes]
    assert peaks == sorted(peaks)
    assert all(found.gain_bytes(outcome) > 0 for outcome in found.better)


def test_what_if_prefers_the_settings_that_survive():
    work = growing_batches()
    capacity = 8 * 59 * MiB + 40 * MiB
    kept = run_workload(work, AllocatorSettings(), capacity_bytes=capacity)
    found = compare(work, AllocatorSettings(), kept, capacity_bytes=capacity)
    alive = [outcome.death is None for outcome in found.outcomes]
    assert alive == sorted(alive, reverse=True)
    assert any("per_process_memory_fraction" in outcome.settings.text for outcome in found.outcomes)


def test_what_if_leaves_out_what_an_older_version_refuses():
    work = growing_batches()
    kept = run_workload(work, AllocatorSettings())
    texts = [outcome.settings.text for outcome in compare(work, AllocatorSettings(), kept, version=(2, 0)).outcomes]
    assert texts
    assert not any("expandable" in text or "large_segment" in text for text in texts)
