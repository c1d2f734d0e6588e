"""The parts that need no torch: the ladder, sizes, tokens, skew, the trend of peaks."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullage.errors import InputError
from ullage.guard.batches import TokenBatches, pack
from ullage.guard.budget import Trend
from ullage.guard.classify import Failure
from ullage.guard.experts import ExpertWatch, Skew
from ullage.guard.ladder import CANNOT_FIT, REDO, RESTART, RETRY, Ladder
from ullage.guard.plan import Plan
from ullage.guard.sizes import MAX_SHAPES, bounded, has_room, known_shapes, micro_batch_for
from ullage.guard.split import ranges, weigh


def failure(**changes):
    return Failure(**{"kind": "device", "phase": "forward", "text": "", "shape": 64, "micro_batch": 8, **changes})


def test_the_ladder_goes_down_rung_by_rung():
    ladder = Ladder(recompute=True, offload=True, restart_plans=({"zero_stage": 3},), can_restart=True)
    plan, actions, micro = Plan(), [], 8
    for _step in range(20):
        found = ladder.after(plan, [failure(micro_batch=micro)], retried=False)
        actions.append(found.action)
        if found.action == CANNOT_FIT:
            break
        assert found.plan.generation == plan.generation + 1
        plan = found.plan
        micro = micro_batch_for(plan, 64, 8)
    assert actions == [REDO] * 5 + [RESTART, RESTART, CANNOT_FIT]
    assert [plan.get(name) for name in ("recompute", "offload", "zero_stage")] == ["full", True, 3]


def test_every_rank_decides_the_same_whatever_its_own_failure():
    ladder = Ladder()
    several = [failure(rank=2, micro_batch=4, shape=128), failure(rank=0, kind="peer"), failure(rank=1, micro_batch=8)]
    found = ladder.after(Plan(), several, retried=False)
    assert known_shapes(found.plan) == {64: 4}
    assert ladder.after(Plan(), several[::-1], retried=False) == found


def test_retry_once_only_where_all_that_failed_may_succeed():
    ladder = Ladder()
    assert ladder.after(Plan(), [failure(transient=True)], retried=False).action == RETRY
    assert ladder.after(Plan(), [failure(transient=True)], retried=True).action == REDO
    assert ladder.after(Plan(), [failure(transient=True), failure(rank=1)], retried=False).action == REDO
    assert Ladder(can_restart=True).after(Plan(), [failure(kind="dead")], retried=False).action == RESTART
    assert ladder.after(Plan(), [failure(kind="dead")], retried=False).action == CANNOT_FIT


def test_the_optimizer_is_not_helped_by_a_smaller_micro_batch():
    found = Ladder(recompute=True, offload=True).after_optimizer(Plan(), [failure()])
    assert found.action == REDO and known_shapes(found.plan) == {} and found.plan.get("offload")
    assert found.plan.get("recompute") is None


@given(st.dictionaries(st.integers(0, 20).map(lambda power: 1 << power), st.integers(1, 64), max_size=12))
def test_a_larger_shape_never_gets_a_larger_micro_batch(sizes):
    plan = Plan(knobs={f"micro_batch@{shape}": size for shape, size in sizes.items()})
    found = [micro_batch_for(plan, 1 << power, 32) for power in range(22)]
    assert found == sorted(found, reverse=True) and min(found) >= 1 and max(found) <= 32
    assert all(micro_batch_for(plan, shape, 32) <= size for shape, size in sizes.items())


def test_shapes_are_bounded_and_stay_safe():
    plan = Plan(knobs={f"micro_batch@{shape}": 100 - shape % 7 for shape in range(1, 200)})
    small = bounded(plan)
    assert len(known_shapes(small)) == MAX_SHAPES
    for shape in range(1, 300):
        assert micro_batch_for(small, shape, 100) <= micro_batch_for(plan, shape, 100)


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 60), st.booleans())
def test_packs_keep_order_and_budget(lengths, budget, padded):
    runs = pack(lengths, budget, padded=padded)
    assert [at for start, stop in runs for at in range(start, stop)] == list(range(len(lengths)))
    for start, stop in runs:
        part = lengths[start:stop]
        cost = max(part) * len(part) if padded else sum(part)
        assert cost <= budget or len(part) == 1


def test_token_batches_shrink_with_the_plan():
    plans = [Plan()]
    samples = ["x" * length for length in (4, 4, 4, 4, 4, 4, 4, 4)]
    batches = TokenBatches(samples, 16, plan=lambda: plans[0])
    found = []
    for batch in batches:
        found.append(len(batch))
        plans[0] = Plan().shrunk("OOM", micro_tokens=8)
    assert found == [4, 2, 2] and batches.position == 8
    assert [len(batch) for batch in TokenBatches(samples, 99, max_samples=3)] == [3, 3, 2]
    with pytest.raises(InputError):
        TokenBatches(samples, 0)


@given(st.integers(0, 100), st.integers(1, 20))
def test_ranges_cover_and_weights_sum_to_one(size, micro_batch):
    cut = ranges(size, micro_batch)
    assert [at for start, stop in cut for at in range(start, stop)] == list(range(size))
    if size:
        assert sum(weigh([stop - start for start, stop in cut])) == pytest.approx(1)


class Asked:
    windows, said = 1, ()

    def say(self, words):
        self.said = (*self.said, words)

    def ask_smaller(self, reason):
        self.smaller = reason


def test_a_skew_that_grows_is_met_before_the_peak():
    guard, acted = Asked(), []
    watch = ExpertWatch(guard, num_experts=4, num_ranks=2, bytes_per_token=10, limit_bytes=1300)
    for step in range(40):
        guard.windows = step
        moved = min(step, 35)
        counts = [50 + moved, 50, 50 - moved, 50]
        need = max(counts[0] + counts[1], counts[2] + counts[3]) * 10
        if watch.observe(counts):
            acted.append(step)
            assert need < 1300, "asked before the need is there"
            break
    assert acted and "fullest rank" in guard.smaller
    capacity = []
    watch = ExpertWatch(
        guard, num_experts=4, num_ranks=2, bytes_per_token=10, limit_bytes=1500, capacity=capacity.append
    )
    assert watch.observe([200, 0, 0, 0]) and capacity == [1.5]
    assert not watch.observe([200, 0, 0, 0]), "once a window"
    with pytest.raises(InputError):
        watch.observe([1, 2])
    with pytest.raises(InputError):
        ExpertWatch(guard, num_experts=5, num_ranks=2, bytes_per_token=1, limit_bytes=1)


def test_without_torch_the_guard_names_the_extra(monkeypatch):
    from ullage.errors import MissingExtraError
    from ullage.guard import Guard

    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"ullage\[torch\]"):
        Guard(None, None, micro_batch=1)


def test_balanced_experts_ask_for_nothing():
    skew = Skew()
    for _step in range(10):
        assert skew.feed([5, 5, 5, 5], 2) == 1
    assert skew.expected() == 1


def test_the_trend_of_peaks():
    grows, flat, jumps = Trend(), Trend(), Trend()
    for step in range(16):
        grows.feed(step * 20, 1000 + 10 * step)
        flat.feed(step * 20, 1000)
        jumps.feed(step * 20, 1000 + 500 * (step % 2) + step)
    assert grows.steps_to(2000) == 1700
    assert flat.steps_to(2000) is None and jumps.steps_to(2000) is None


def test_room_for_a_larger_micro_batch():
    assert has_room(peak_bytes=60, base_bytes=20, limit_bytes=100, current=1, larger=2)
    assert not has_room(peak_bytes=61, base_bytes=20, limit_bytes=100, current=1, larger=2)
