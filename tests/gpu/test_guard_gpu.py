"""The guard on a real GPU: a real out-of-memory of CUDA is survived, all is released, and a step costs little."""

import gc
import sys
import weakref
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
GIB = 1 << 30


@pytest.fixture
def capped():
    """Let PyTorch have 4 GiB, so that a real out-of-memory is quick."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(4 * GIB / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def net():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 64, bias=False))
    model = model.double().cuda()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-1, 2, parameter.shape))
    return model


def test_a_real_out_of_memory_is_redone_with_the_same_gradients(capped):
    from ullage.guard import Guard

    held, model = [], net()
    batch = torch.randint(-2, 3, (8, 64), device="cuda").double()
    model(batch).sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)

    def loss_of(micro):
        if held:
            gc.collect()
            assert held[0]() is None, "the failed attempt's tensors are gone"
        activation = model(micro)
        held.append(weakref.ref(activation))
        work = torch.empty(len(micro), GIB, dtype=torch.uint8, device="cuda")
        return activation.sum() + 0 * work[0, 0]

    guard = Guard(model, torch.optim.SGD(model.parameters(), lr=0.1), micro_batch=8, loss_reduction="sum")
    guard.gradients([batch], loss_of)
    assert guard.micro_batch == 2 and guard.redone == 2
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_dropout_of_the_device_is_restored():
    from ullage.guard import Guard

    model, seen = torch.nn.Linear(4, 4).cuda(), []

    def loss_of(micro):
        seen.append(torch.rand(3, device="cuda"))
        if len(seen) == 1:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        return model(micro).sum()

    guard = Guard(model, torch.optim.SGD(model.parameters(), lr=0.1), micro_batch=2)
    guard.step(torch.zeros(2, 4, device="cuda"), loss_of)
    assert torch.equal(seen[0], seen[1])


def test_a_step_costs_less_than_two_in_a_thousand():
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from guard_overhead import measure

    found = measure("cuda", 101, 1024, 12, 16, 1024, lambda model: model)
    assert found["median_overhead"] < 0.002, found
