"""Four real processes, one of which really runs out of memory: all shrink together, and the weights are the same."""

import json

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.reference

SIZE = 4
SECONDS = 300


def spawn(target, folder, size=SIZE, *more):
    import guard_ranks

    context = torch.multiprocessing.spawn(
        target, args=(size, guard_ranks.free_port(), str(folder), *more), nprocs=size, join=False
    )
    try:
        for _ in range(SECONDS):
            if context.join(timeout=1):
                break
        else:
            pytest.fail(f"the ranks hang: no end after {SECONDS} seconds")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(size)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    import guard_ranks

    return spawn(guard_ranks.equality, tmp_path_factory.mktemp("equality"))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", ["forward", "backward", "mixed"])
def test_weights_and_gradients_are_the_same_bit_by_bit(runs, kind, name):
    """Exact arithmetic: whole numbers in float64, so that no order of summation can differ."""
    for rank in runs:
        assert rank[kind, name]["weights"] and rank[kind, name]["gradients"]
        assert rank[kind, name]["redone"] == 3
        plan = json.loads(rank[kind, name]["plan"])
        assert plan == json.loads(runs[0][kind, name]["plan"]), "all ranks shrink together"
        assert plan["knobs"] == {"micro_batch@16": 1} and plan["generation"] == 3


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_an_undisturbed_run_is_that_of_torch_bit_by_bit(runs, kind):
    for rank in runs:
        assert rank[kind, "undisturbed"]["weights"] and rank[kind, "undisturbed"]["gradients"]
        assert rank[kind, "undisturbed floats"]["weights"]
        assert rank[kind, "undisturbed"]["redone"] == 0


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_ordinary_floats_differ_by_rounding_only(runs, kind):
    """AdamW in float32: another split sums in another order; 8 steps of 1e-2 stay within 1e-5."""
    for rank in runs:
        assert rank[kind, "floats"]["redone"] == 2
        assert rank[kind, "floats"]["difference"] < 1e-5


def test_an_undisturbed_step_of_ddp_costs_two_votes(runs):
    assert runs[0]["ddp", "undisturbed"]["votes"] == 2 * 8 + 1


def test_fsdp2_votes_before_collectives_only_until_their_order_is_known(runs):
    """Window 1: one vote to begin, one before each of 4+3 gathers and 4 scatters, two to end; then three a window."""
    assert runs[0]["fsdp2", "undisturbed"]["votes"] <= 1 + 3 * 8 + 12
