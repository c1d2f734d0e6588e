"""What the processes of the guard's tests run: real processes, real limits of memory, real collectives."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import sys
from pathlib import Path

import torch
from torch import nn

#: Bytes of work space per sample, so that a limit between 4 and 8 samples is easy to hit.
PER_SAMPLE = 256 << 20
FEATURES = 16


class _Work(torch.autograd.Function):
    """The identity, with work space per sample in forward and backward."""

    @staticmethod
    def forward(ctx, inputs, where):
        ctx.where = where
        if where in ("forward", "both"):
            torch.empty(inputs.shape[0], PER_SAMPLE, dtype=torch.uint8)
        return inputs.clone()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.where in ("backward", "both"):
            torch.empty(gradient.shape[0], PER_SAMPLE, dtype=torch.uint8)
        return gradient, None


class Net(nn.Module):
    """Four layers; in exact arithmetic every weight and datum is a small whole number in float64."""

    def __init__(self, exact=True):
        super().__init__()
        torch.manual_seed(7)
        self.layers = nn.ModuleList(nn.Linear(FEATURES, FEATURES, bias=False) for _ in range(4))
        self.where, self.exact = "none", exact
        if exact:
            self.double()
            with torch.no_grad():
                for layer in self.layers:
                    layer.weight.copy_(torch.randint(-1, 2, layer.weight.shape))

    def forward(self, inputs):
        inputs = inputs.double() if self.exact else inputs
        for number, layer in enumerate(self.layers):
            inputs = layer(inputs) if self.exact else torch.tanh(layer(inputs))
            if number == 2:
                inputs = _Work.apply(inputs, self.where)
        return inputs


class Sign(torch.optim.Optimizer):
    """Moves each weight by one against its gradient, so that it stays whole; keeps every gradient it saw."""

    def __init__(self, parameters):
        super().__init__(list(parameters), {})
        self.seen = []

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                self.seen.append((gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).clone())
                with torch.no_grad():
                    parameter.sub_(gradient.sign())


def optimizer_of(model, exact):
    return Sign(model.parameters()) if exact else torch.optim.AdamW(model.parameters(), lr=1e-2)


def data(step, rank, size=8):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(-2, 3, (size, FEATURES), generator=generator).float()


@contextlib.contextmanager
def memory_limit(extra_bytes):
    """Let this process have ``extra_bytes`` more of address space than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (int(pages * resource.getpagesize() + extra_bytes), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(rank, size, port):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)


def finish(folder, rank, results):
    torch.save(results, Path(folder) / f"rank-{rank}.pt")
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may outlive the interpreter's end


def wrapped(kind, net, size):
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(net, bucket_cap_mb=0.001)
    if kind == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (size,))
        for layer in net.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
    return net


def weights(net):
    return [
        (each.full_tensor() if hasattr(each, "full_tensor") else each).detach().clone() for each in net.parameters()
    ]


def train(kind, rank, size, *, steps=8, failing=None, exact=True, **settings):
    """Train with the guard. ``failing``: (step, rank) -> (where memory is short, samples there is room for)."""
    from ullage.guard import Guard

    net = Net(exact)
    model = wrapped(kind, net, size)
    optimizer = optimizer_of(model, exact)
    settings = {"loss_reduction": "sum", "raise_after": 0, "micro_batch": 8, **settings}
    guard = Guard(model, optimizer, **settings)
    for step in range(steps):
        where, samples = (failing or {}).get((step, rank), ("none", 0))
        net.where = where
        batch = data(step, rank)
        with memory_limit(samples * PER_SAMPLE) if samples else contextlib.nullcontext():
            guard.step(batch, lambda micro: model(micro).sum())
    return weights(net), getattr(optimizer, "seen", []), guard


def plain(kind, rank, size, *, steps=8, exact=True):
    """The undisturbed run, with nothing of the guard."""
    net = Net(exact)
    model = wrapped(kind, net, size)
    optimizer = optimizer_of(model, exact)
    for step in range(steps):
        model(data(step, rank)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(net), getattr(optimizer, "seen", [])


def same(one, other):
    return all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


def largest_difference(one, other):
    return max(float((left - right).abs().max()) for left, right in zip(one, other, strict=True))


def equality(rank, size, port, folder):
    """Undisturbed and disturbed runs of both kinds; memory runs out on one rank at random steps."""
    start(rank, size, port)
    generator = torch.Generator().manual_seed(int(os.environ.get("ULLAGE_GUARD_SEED", "11")))
    found = {}
    for kind in ("ddp", "fsdp2"):
        reference, gradients = plain(kind, rank, size)
        for name, places in (("forward", ["forward"]), ("backward", ["backward"]), ("mixed", ["forward", "backward"])):
            failing = {}
            for number, step in enumerate(torch.randperm(8, generator=generator)[:3].tolist()):
                who = int(torch.randint(0, size, (1,), generator=generator))
                failing[step, who] = (places[number % len(places)], 6)
            for number, pair in enumerate(sorted(failing)):  # each time there is room for half as many
                failing[pair] = (failing[pair][0], (6, 3, 1.5)[number])
            got, seen, guard = train(kind, rank, size, failing=failing)
            found[kind, name] = report(guard, same(got, reference), same(seen, gradients))
        got, seen, guard = train(kind, rank, size)
        found[kind, "undisturbed"] = report(guard, same(got, reference), same(seen, gradients))
        reference, _seen = plain(kind, rank, size, exact=False)
        got, _seen, guard = train(kind, rank, size, exact=False)
        found[kind, "undisturbed floats"] = report(guard, same(got, reference), True)
        got, _seen, guard = train(
            kind, rank, size, exact=False, failing={(0, 2): ("backward", 6), (5, 1): ("forward", 3)}
        )
        found[kind, "floats"] = {**report(guard, None, None), "difference": largest_difference(got, reference)}
    finish(folder, rank, found)


def report(guard, weights_equal, gradients_equal):
    return {
        "weights": weights_equal,
        "gradients": gradients_equal,
        "plan": guard.plan.to_json(),
        "redone": guard.redone,
        "votes": guard.votes.num_votes,
    }
