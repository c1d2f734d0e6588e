"""A pipeline written by hand, on two real processes: a stage out of memory does not leave the other in a transfer."""

import json

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.reference


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    import pipeline_ranks
    from test_guard_equal import spawn

    return spawn(pipeline_ranks.pipeline, tmp_path_factory.mktemp("pipeline"), 2)


@pytest.mark.parametrize(
    ("name", "redone", "size"), [("undisturbed", 0, None), ("first stage", 2, 2), ("last stage", 2, 2), ("both", 1, 4)]
)
def test_every_stage_ends_with_the_weights_of_the_whole_net(runs, name, redone, size):
    for rank in runs:
        found = rank[name]
        assert found["weights"] and found["gradients"] and found["redone"] == redone
        assert json.loads(found["plan"])["knobs"].get("micro_batch@16") == size


def test_a_transfer_costs_one_vote(runs):
    """One at the start; in each of five windows two transfers and the two votes of every window."""
    assert [rank["undisturbed"]["votes"] for rank in runs] == [1 + 5 * 4] * 2


def test_a_schedule_of_its_own_is_refused_inside_ddp():
    from ullage.errors import InputError
    from ullage.guard.checks import check_schedule
    from ullage.guard.parallel import Parallel
    from ullage.guard.settings import Settings

    class Reducing(Parallel):
        def __init__(self):
            pass

    with pytest.raises(InputError, match="schedule"):
        check_schedule(Reducing(), Settings(micro_batch=1, schedule=True))
