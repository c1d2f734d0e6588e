"""A small network under FSDP2."""

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

SIZE = 256


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(SIZE, 4 * SIZE, bias=False)
        self.down = nn.Linear(4 * SIZE, SIZE, bias=False)

    def forward(self, x):
        return x + self.down(torch.sin(self.up(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(SIZE, SIZE, bias=False)
        self.blocks = nn.ModuleList(Block() for _each in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return torch.cos(self.head(x)).float().sum()


def sharded(mesh=None):
    """Return the network, each block a unit, as a user wraps it."""
    net = Net()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in net.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(net, mesh=mesh, mp_policy=policy)


def inputs():
    return torch.ones(8, 96, SIZE, dtype=torch.bfloat16, device="cpu")


def program():
    return sharded(), inputs()
