"""Two real processes: uneven batches, both failing, the optimizer, checkpoints of shards, corrupt stores."""

import json

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.reference


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    import guard_ranks
    from test_guard_equal import spawn

    return spawn(guard_ranks.corners, tmp_path_factory.mktemp("corners"), 2)


def test_ranks_with_unequal_batches_issue_equally_many_collectives(runs):
    assert all(rank["uneven"] for rank in runs)


def test_both_ranks_fail_in_one_window(runs):
    for rank in runs:
        for at, (equal, redone, plan) in enumerate(rank["both"]):
            assert equal and redone >= 2
            assert plan == runs[0]["both"][at][2]


def test_voting_before_every_collective(runs):
    for rank in runs:
        assert rank["always"]["equal"] and rank["always"]["redone"] == 1


def test_ddp_with_buffers_unused_parameters_and_bucket_views(runs):
    assert all(rank["ddp options"] for rank in runs)


def test_a_failed_optimizer_step_on_one_rank_restarts_all(runs):
    for rank in runs:
        for code, plan in rank["optimizer"]:
            assert code == 75
            assert "rank 1 in optimizer step" in json.loads(plan)["reason"]


def test_shards_go_back_to_the_checkpoint(runs):
    for rank in runs:
        for back, restored, equal in rank["checkpoint"]:
            assert back == [4] and restored and equal


def test_one_rank_asks_and_all_shrink(runs):
    assert [rank["asked"] for rank in runs] == [([8, 8, 4], 0)] * 2


def test_a_corrupt_store_is_refused_on_every_rank(runs):
    assert all("corrupt-1" in rank["corrupt"] for rank in runs)


def test_ranks_that_come_apart_are_told(runs):
    assert all("come apart" in rank["apart"] for rank in runs)


def test_nothing_of_the_failed_attempt_is_held_on_any_rank(runs):
    for rank in runs:
        for seen, redone in rank["released"]:
            assert redone == 1 and all(seen[0]) and all(seen[1])


def test_a_loop_with_collectives_of_its_own_votes_before_them(runs):
    assert [rank["own collectives"] for rank in runs] == [([0, 1, 1], True)] * 2


def test_a_mean_over_all_ranks(runs):
    assert all(rank["global mean"] < 1e-6 for rank in runs)
