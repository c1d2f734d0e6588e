"""Snapshots of a real GPU, where what every tensor is for is known: the categories, and the marker for tests."""

import pytest

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
MIB = 2**20


def train(model, optimizer, steps=4):
    for _step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        model(torch.randn(4096, 1024, device="cuda")).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("stacks", ["python", "all"])
def test_weights_gradients_and_states_are_told_apart(stacks, tmp_path):
    from ullage.observe.snapshot_view import inspect_snapshot

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.memory._record_memory_history(max_entries=100_000, stacks=stacks)
    try:
        model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _layer in range(8))).to("cuda")
        optimizer = torch.optim.AdamW(model.parameters())
        train(model, optimizer)
        path = tmp_path / "a.pickle"
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    found = inspect_snapshot(path)
    at_end = found.detail.found.sums_at(found.detail.lives.num_events - 1)
    weights = sum(each.numel() * 4 for each in model.parameters())
    assert sum(at_end["weights"]) == pytest.approx(weights, rel=0.02, abs=before + MIB)
    assert sum(at_end["optimizer_states"]) == pytest.approx(2 * weights, rel=0.02)
    assert sum(at_end["gradients"]) == pytest.approx(weights, rel=0.02)
    assert found.detail.lives.peak_bytes == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.01)


@pytest.mark.gpu_memory_limit("512MiB")
def test_the_limit_holds_here():
    assert torch.ones(64 * MIB, dtype=torch.uint8, device="cuda").sum().item() == 64 * MIB
