"""Laws that hold for any work under any settings."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ullage.allocator.events import WORK_ALLOC, WORK_EMPTY_CACHE, WORK_FREE, WORK_FREE_REQUESTED, WorkloadBuilder
from ullage.allocator.metrics import fragmentation, layout_of
from ullage.allocator.rounding import next_division, round_size
from ullage.allocator.run import run_workload
from ullage.allocator.settings import normalise, parse_settings, split_entries
from ullage.allocator.simulate import Allocator
from ullage.allocator.state import ADDRESS_BITS, AWAITING, FREE, IN_USE, UNMAPPED
from ullage.errors import InputError

KiB, MiB, GiB = 2**10, 2**20, 2**30
SIZES = st.one_of(
    st.integers(1, 4 * KiB),
    st.integers(1, 4 * MiB),
    st.integers(MiB, 80 * MiB),
    st.sampled_from([512, MiB, MiB + 1, 10 * MiB, 10 * MiB - 1, 19 * MiB, 20 * MiB, 32 * MiB]),
)
CONFS = st.sampled_from(
    [
        "",
        "expandable_segments:True",
        "expandable_segments:True,large_segment_size_mb:64",
        "max_split_size_mb:20",
        "max_split_size_mb:32,max_non_split_rounding_mb:40",
        "roundup_power2_divisions:4",
        "roundup_power2_divisions:[1:8,16:2,>:4]",
        "large_segment_size_mb:12",
        "garbage_collection_threshold:0.3,per_process_memory_fraction:0.9",
        "per_process_memory_fraction:0.5,throw_on_cudamalloc_oom:True",
    ]
)
CAPACITIES = st.sampled_from([None, 100 * MiB, 250 * MiB, GiB])


@st.composite
def work(draw, max_steps=60):
    """Allocations on two streams and three pools, frees at once or delayed, and calls of empty_cache."""
    builder = WorkloadBuilder()
    places = [builder._places.index(0), builder._places.index(7), builder._places.index(0, (0, 3))]
    live, waiting = [], []
    for _ in range(draw(st.integers(1, max_steps))):
        choice = draw(st.integers(0, 9))
        if choice < 5 or not (live or waiting):
            live.append(builder.allocate(draw(SIZES), place=draw(st.sampled_from(places))))
        elif choice < 8 and live:
            builder.free(live.pop(draw(st.integers(0, len(live) - 1))))
        elif choice == 8 and live:
            owner = live.pop(draw(st.integers(0, len(live) - 1)))
            builder.request_free(owner)
            waiting.append(owner)
        elif waiting:
            builder.complete_free(waiting.pop(0))
        else:
            builder.empty_cache()
    return builder.work


def check(allocator):
    """Check every law on the state as it is."""
    reserved = in_use = awaiting = requested = 0
    listed = {}
    for pool in allocator.pools.values():
        for free_set in pool.free_sets.values():
            assert free_set.keys == sorted(free_set.keys)
            assert free_set.keys == [block.size << ADDRESS_BITS | block.address for block in free_set.blocks]
            listed.update({block.address: (block.size, FREE) for block in free_set.blocks})
            listed.update({at: (free_set.unmapped[at].size, UNMAPPED) for at in free_set.unmapped_addresses})
    ends = 0
    for base in sorted(allocator.segments):
        blocks = allocator.blocks_of(base)
        assert blocks[0].address == base >= ends
        assert blocks[0].prev is None
        for before, after in pairwise(blocks):
            assert before.address + before.size == after.address, "blocks tile a segment"
            assert after.prev is before
            assert before.free_set is after.free_set
            assert before.state != after.state or before.state in (IN_USE, AWAITING), "free neighbours merge"
        ends = blocks[-1].address + blocks[-1].size
        for block in blocks:
            assert block.size > 0
            assert block.size % 512 == 0
            assert block.address % 512 == 0
            if block.state in (FREE, UNMAPPED):
                assert listed.pop(block.address) == (block.size, block.state)
            else:
                assert 0 < block.requested <= block.size
            reserved += block.size * (block.state != UNMAPPED)
            in_use += block.size * (block.state == IN_USE)
            awaiting += block.size * (block.state == AWAITING)
            requested += block.requested * (block.state == IN_USE)
    assert not listed, "every free block lies in a segment"
    assert (allocator.reserved, allocator.allocated, allocator.awaiting, allocator.requested) == (
        reserved,
        in_use,
        awaiting,
        requested,
    )
    assert allocator.peak_reserved >= allocator.reserved
    assert allocator.peak_active >= allocator.peak_allocated >= allocator.allocated
    assert allocator.capacity is None or allocator.peak_reserved <= allocator.capacity
    assert allocator.peak_active <= allocator.peak_reserved


@settings(max_examples=150, deadline=None)
@given(work(), CONFS, CAPACITIES)
def test_the_laws_hold_at_the_end_and_in_between(steps, conf, capacity):
    total = capacity or 4 * GiB
    for stop in (len(steps.codes) // 2, None):
        found = run_workload(steps, parse_settings(conf), capacity_bytes=capacity, total_bytes=total, stop_after=stop)
        check(found.allocator)
        used = fragmentation(layout_of(found.allocator), found.settings.large_segment_size_bytes)
        assert used.in_use_bytes + used.releasable_bytes + used.pinned_bytes == found.final_reserved_bytes
        assert 0 <= used.internal < 1
        assert found.death is None or capacity is not None or found.settings.memory_fraction is not None


@settings(max_examples=60, deadline=None)
@given(work(), CONFS)
def test_giving_everything_back_leaves_nothing(steps, conf):
    found = run_workload(steps, parse_settings(conf), total_bytes=GiB)
    allocator = found.allocator
    for base in list(allocator.segments):
        for block in list(allocator.blocks_of(base)):
            if block.state == IN_USE:
                allocator.free(block)
    allocator.synchronise()
    allocator.empty_cache()
    check(allocator)
    assert allocator.allocated == allocator.requested == allocator.awaiting == 0
    kept = sum(block.size for base in allocator.segments for block in allocator.blocks_of(base) if block.state == FREE)
    private = [pool for (pool_id, _small), pool in allocator.pools.items() if pool_id != (0, 0)]
    assert kept == sum(key >> ADDRESS_BITS for pool in private for one in pool.free_sets.values() for key in one.keys)


class Plain:
    """The rules of the default settings once more, as a list of [address, size, in use] per segment."""

    def __init__(self):
        self.segments = {}
        self.reserved = self.peak = 0

    def malloc(self, size, place):
        rounded = max(512, -(-size // 512) * 512)
        small = rounded <= MiB
        fits = [
            (block[1], block[0], base, at)
            for base, (owner, blocks) in self.segments.items()
            if owner == (place, small)
            for at, block in enumerate(blocks)
            if not block[2] and block[1] >= rounded
        ]
        if not fits:
            whole = 2 * MiB if small else 20 * MiB if rounded < 10 * MiB else -(-rounded // (2 * MiB)) * 2 * MiB
            base = max((one + sum(b[1] for b in blocks) for one, (_o, blocks) in self.segments.items()), default=0)
            self.segments[base] = ((place, small), [[base, whole, False]])
            self.reserved += whole
            self.peak = max(self.peak, self.reserved)
            fits = [(whole, base, base, 0)]
        have, address, base, at = min(fits)
        blocks = self.segments[base][1]
        blocks[at][2] = True
        if have - rounded >= 512 if small else have - rounded > MiB:
            blocks[at][1] = rounded
            blocks.insert(at + 1, [address + rounded, have - rounded, False])
        return address

    def free(self, address):
        for _owner, blocks in self.segments.values():
            for at, block in enumerate(blocks):
                if block[0] == address and block[2]:
                    block[2] = False
                    for other in (at + 1, at):
                        if 0 < other < len(blocks) and not blocks[other][2] and not blocks[other - 1][2]:
                            blocks[other - 1][1] += blocks.pop(other)[1]
                    return


@settings(max_examples=80, deadline=None)
@given(work())
def test_a_second_writing_of_the_rules_agrees(steps):
    plain, owners, count = Plain(), {}, 0
    for code, value in zip(steps.codes, steps.values, strict=True):
        if code == WORK_ALLOC:
            owners[count] = plain.malloc(*steps.requests[value])
            count += 1
        elif code in (WORK_EMPTY_CACHE, WORK_FREE_REQUESTED):
            return  # the second writing knows neither
        elif code == WORK_FREE:
            plain.free(owners.pop(value))
    found = run_workload(steps, parse_settings(""))
    ours = sorted((one.size_bytes, [block.size_bytes for block in one.blocks]) for one in layout_of(found.allocator))
    theirs = sorted(
        (sum(b[1] for b in blocks), [b[1] for b in blocks if b[2]]) for _owner, blocks in plain.segments.values()
    )
    assert (found.peak_reserved_bytes, ours) == (plain.peak, theirs)


@given(st.integers(1, 2**40), st.sampled_from([0, 1, 2, 4, 8, 16, 64]))
def test_rounding_is_the_least_step_above(size, divisions):
    rounded = round_size(size, (divisions,) * 16)
    assert rounded >= size
    assert rounded % 512 == 0
    assert round_size(rounded, (divisions,) * 16) == rounded
    if divisions > 1 and size > 512 * divisions:
        floor = 1 << (size.bit_length() - 1)
        assert rounded - size < max(512, floor // divisions)
    else:
        assert rounded - size < 512
    assert next_division(size, 1) == size


@settings(max_examples=60, deadline=None)
@given(st.lists(SIZES, min_size=1, max_size=40))
def test_expandable_segments_reserve_little_more_than_they_hold(sizes):
    """Without frees nothing is wasted but the last page of each pool."""
    builder = WorkloadBuilder()
    for size in sizes:
        builder.allocate(size)
    found = run_workload(builder.work, parse_settings("expandable_segments:True"))
    assert found.peak_allocated_bytes <= found.peak_reserved_bytes < found.peak_allocated_bytes + 22 * MiB


@given(st.text(alphabet="abcdefgh_mbexpandable:,[]0123456789>TrueFals. ", max_size=80))
def test_any_text_is_settings_or_one_error(text):
    try:
        found = parse_settings(text)
    except InputError as error:
        assert "\n" not in str(error)
        return
    assert normalise(found.text) == found.text
    assert parse_settings(found.text) == found


@given(st.sampled_from(["", "block_size", "max_split_size_mb", "roundup_power2_divisions"]), st.text(max_size=30))
def test_any_value_is_a_value_or_one_error(key, value):
    try:
        parse_settings(f"{key}:{value}")
        split_entries(value)
    except InputError as error:
        assert str(error)


def test_the_check_of_the_laws_can_fail():
    allocator = Allocator(parse_settings(""))
    place = WorkloadBuilder()._places
    place.index(0)
    block = allocator.malloc(allocator.request(512, place.places[0]))
    check(allocator)
    block.size -= 512
    with pytest.raises(AssertionError):
        check(allocator)
