"""What is traced against what PyTorch really does."""

import pytest

pytest.importorskip("torch")

import torch
from step_sizes import real_sizes, traced_sizes
from torch import nn

from ullage.trace.api import trace

pytestmark = pytest.mark.reference


class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.up, self.gate, self.down = (nn.Linear(size, size, bias=False) for _each in range(3))

    def forward(self, x):
        y = torch.sin(x)
        return x + self.down(torch.sigmoid(self.gate(y)) * torch.tanh(self.up(y)))


class Net(nn.Module):
    def __init__(self, size=96, layers=3):
        super().__init__()
        self.blocks = nn.ModuleList(Block(size) for _each in range(layers))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return torch.cos(x).sum()


def test_a_step_allocates_and_frees_as_on_the_cpu():
    """Every allocation and every free, in order: gradients that are stolen or added in place included."""
    net, x = Net(), torch.ones(2, 8, 96)
    net(x).backward()
    net.zero_grad(set_to_none=True)
    real = [size for size in real_sizes(lambda: net(x).backward()) if abs(size) >= 1024]
    result = trace(lambda: (Net(), torch.ones(2, 8, 96, device="cpu")), steps=1, engine="plain", optimizer="none")
    assert [size for size in traced_sizes(result, step=0) if abs(size) >= 1024] == real


def test_peak_of_a_chain_by_hand():
    """Two linear layers without bias: at the peak both weights, a gradient, and what the backward of one needs."""
    size, rows = 256, 128

    def make():
        net = nn.Sequential(nn.Linear(size, size, bias=False), nn.Linear(size, size, bias=False))
        return {"module": net, "inputs": torch.ones(rows, size, device="cpu"), "loss": lambda out: out.sum()}

    result = trace(make, steps=1, engine="plain", optimizer="none", compute_capability=(8, 0))
    weight, activation, workspace = 4 * size * size, 4 * rows * size, 2 * 4096 * 1024 + 8 * 16 * 1024
    peak = result.categories()
    assert peak["parameter"] == 2 * weight
    assert peak["workspace"] == 2 * workspace
    # the first layer's backward: both gradients of weights; the input, and the gradient of the activation between
    assert peak["gradient"] == 2 * weight
    assert peak["input"] == activation
    assert result.trace.peak()[1] >= 4 * weight + 2 * workspace + 2 * activation


def test_gradients_states_and_categories():
    def make():
        return {"module": nn.Linear(64, 64), "inputs": torch.ones(8, 64), "loss": lambda out: out.sum()}

    result = trace(make, engine="plain", optimizer="adamw")
    size = 4 * (64 * 64 + 64)
    trace_ = result.trace
    states = [one.size_bytes for one in trace_.allocations if one.category == "optimizer_state"]
    assert sum(states) == 2 * size
    first = [
        one.size_bytes
        for one in trace_.allocations
        if one.category == "gradient" and trace_.places[one.place].step == 0
    ]
    assert sum(first) == size
    temporaries = [
        one.size_bytes for one in trace_.allocations if one.op == "_foreach_sqrt" and one.category == "temporary"
    ]
    assert sum(temporaries) == 2 * size  # of two steps


def test_autocast_keeps_casts_until_it_is_left():
    def make():
        net = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
        return {"module": net, "inputs": torch.ones(8, 64), "loss": lambda out: out.float().sum()}

    result = trace(make, autocast="bf16", engine="plain", steps=1)
    casts = [
        number
        for number, one in enumerate(result.trace.allocations)
        if one.op == "_to_copy" and one.shape == (64, 64) and one.dtype == "bfloat16"
        and result.trace.places[one.place].phase == "forward"
    ]  # fmt: skip
    assert len(casts) == 2
    ends = {~event: index for index, event in enumerate(result.trace.events) if event < 0}
    begins = {event: index for index, event in enumerate(result.trace.events) if event >= 0}
    assert ends[casts[0]] > begins[casts[1]]  # both live together


def test_attention_keeps_what_flash_keeps():
    from torch.nn import functional

    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(64, 192, bias=False, dtype=torch.bfloat16)

        def forward(self, x):
            q, k, v = self.qkv(x).view(2, 128, 3, 4, 16).permute(2, 0, 3, 1, 4)
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True).float().sum()

    result = trace(lambda: (Attend(), torch.ones(2, 128, 64, dtype=torch.bfloat16)), steps=1, optimizer="none")
    kept = [one for one in result.trace.allocations if one.op == "_scaled_dot_product_flash_attention"]
    assert [one.size_bytes for one in kept] == [2 * 4 * 128 * 16 * 2, 2 * 4 * 128 * 4, 16, 8]
    assert {one.category for one in kept} == {"activation"}
