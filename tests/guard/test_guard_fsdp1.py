"""FSDP1 on two real processes, one of which really runs out of memory."""

import json

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.reference


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    import fsdp1_ranks
    from test_guard_equal import spawn

    return spawn(fsdp1_ranks.flat, tmp_path_factory.mktemp("fsdp1"), 2)


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp1-orig", "fsdp1-grad-op", "fsdp1-no-shard"])
def test_weights_and_gradients_are_the_same_bit_by_bit(runs, kind):
    """Full shards, original parameters with prefetch, gradients and optimizer only, nothing sharded."""
    for rank in runs:
        found = rank[kind]["disturbed"]
        assert found["weights"] and found["gradients"] and found["redone"] == 3
        assert json.loads(found["plan"])["knobs"] == {"micro_batch@16": 1}
        assert found["plan"] == runs[0][kind]["disturbed"]["plan"], "all ranks shrink together"
        calm = rank[kind]["undisturbed"]
        assert calm["weights"] and calm["gradients"] and calm["redone"] == 0


def test_votes_before_collectives_only_until_their_list_is_known(runs):
    """Window 1: one vote to begin, one before each of 4 + 3 gathers and 4 reductions, two to end; then three."""
    assert runs[0]["fsdp1"]["undisturbed"]["votes"] == 1 + 3 * 6 + 11


def test_mixed_precision(runs):
    for rank in runs:
        assert rank["mixed"] == {"redone": 2, "finite": True, "same": True}


def test_voting_before_every_collective(runs):
    assert all(rank["always"]["redone"] == 1 for rank in runs)


def test_clipping_takes_the_norm_of_all_shards(runs):
    assert all(rank["clipped"] for rank in runs)


def test_ranks_with_unequal_batches(runs):
    assert all(rank["uneven"] for rank in runs)


def test_nothing_of_the_failed_attempt_is_held(runs):
    assert all(rank["released"] == {"outputs": True, "gradients": True, "sharded": True} for rank in runs)


def test_shards_go_back_to_the_checkpoint(runs):
    for rank in runs:
        for back, restored, equal in rank["checkpoint"]:
            assert back == [4] and restored and equal


def test_what_cannot_be_guarded_is_said(runs):
    offload, hook, part = runs[0]["refused"]
    assert "offloaded" in offload and "hook" in hook and "whole model" in part
