"""A hand-written pipeline of two stages under the guard: what its processes run."""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
from guard_ranks import FEATURES, PER_SAMPLE, Net, Sign, data, finish, memory_limit, report, same, start

STEPS = 5


class Stage(torch.nn.Module):
    """Half of the net: its first two layers or its last two."""

    def __init__(self, net, rank):
        super().__init__()
        self.layers = torch.nn.ModuleList(net.layers[2 * rank : 2 * rank + 2])
        self.where = "none"

    def forward(self, inputs):
        from guard_ranks import _Work

        inputs = self.layers[0](inputs)
        return self.layers[1](_Work.apply(inputs, self.where))


def schedule(stage, rank, guard):
    """All forwards, then all backwards (GPipe); both ranks vote before each transfer, buffers are there before it."""

    def run(window):
        kept, total = [], torch.zeros((), dtype=torch.float64)
        for micro, weight in window:
            if rank == 0:
                output = stage(micro.double())
                guard.vote_point()
                dist.send(output.detach(), 1)
                kept.append((None, output))
                continue
            received = torch.empty(micro.shape[0], FEATURES, dtype=torch.float64)
            guard.vote_point()
            dist.recv(received, 0)
            loss = stage(received.requires_grad_()).sum() * weight
            total += loss.detach()
            kept.append((received, loss))
        for received, output in reversed(kept):
            if rank == 1:
                output.backward()
                guard.vote_point()
                dist.send(received.grad, 0)
                continue
            gradient = torch.empty_like(output)
            guard.vote_point()
            dist.recv(gradient, 1)
            output.backward(gradient)
        return total

    return run


def train(rank, failing):
    from ullage.guard import Guard

    stage = Stage(Net(), rank)
    optimizer = Sign(stage.parameters())
    guard = Guard(stage, optimizer, micro_batch=8, loss_reduction="sum", schedule=True)
    losses = []
    for step in range(STEPS):
        where, samples = failing.get((step, rank), ("none", 0))
        stage.where = where
        with memory_limit(samples * PER_SAMPLE) if samples else contextlib.nullcontext():
            losses.append(float(guard.step(data(step, 0), schedule(stage, rank, guard))))
    return guard, optimizer.seen, [each.detach().clone() for each in stage.parameters()], losses


def pipeline(rank, size, port, folder):
    """Memory runs out on each stage, forward and backward, against the whole net in one process."""
    start(rank, size, port)
    net, losses = Net(), []
    optimizer = Sign(net.parameters())
    for step in range(STEPS):
        loss = net(data(step, 0)).sum()
        losses.append(float(loss))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = [each.detach() for each in net.layers[2 * rank : 2 * rank + 2].parameters()]
    found = {}
    for name, failing in (
        ("undisturbed", {}),
        ("first stage", {(1, 0): ("forward", 6), (3, 0): ("backward", 3)}),
        ("last stage", {(1, 1): ("backward", 6), (3, 1): ("forward", 3)}),
        ("both", {(2, 0): ("backward", 6), (2, 1): ("forward", 6)}),
    ):
        guard, _seen, got, seen_losses = train(rank, failing)
        found[name] = report(guard, same(got, expected), rank == 0 or seen_losses == losses)
    finish(folder, rank, found)
