"""What the processes of the tests of FSDP1 run."""

from __future__ import annotations

import contextlib
import gc
import weakref

import torch
from guard_ranks import (
    PER_SAMPLE,
    Net,
    checkpointed,
    data,
    finish,
    memory_limit,
    optimizer_of,
    plain,
    report,
    same,
    start,
    train,
    uneven,
    weights,
    wrapped,
)

EXACT = ("fsdp1", "fsdp1-orig", "fsdp1-grad-op", "fsdp1-no-shard")


def flat(rank, size, port, folder):
    """Memory runs out in the first window, which is voted on, and later, when the list is known."""
    start(rank, size, port)
    Net.at = 0  # the later layers have reduced their gradients when memory runs out in backward
    found = {kind: disturbed(kind, rank, size) for kind in EXACT}
    found["mixed"] = mixed(rank, size)
    found["always"] = report(
        train("fsdp1", rank, size, steps=4, failing={(2, 0): ("backward", 6)}, votes="always")[2], None, None
    )
    found["clipped"] = clipped(rank, size)
    found["uneven"] = uneven("fsdp1", rank, size)
    found["released"] = released(rank, size)
    found["checkpoint"] = [checkpointed(kind, rank, size, folder) for kind in ("fsdp1", "fsdp1-orig")]
    found["refused"] = refused()
    finish(folder, rank, found)


def disturbed(kind, rank, size):
    """One run with a failure of each kind, and one without any, against plain torch."""
    reference, gradients = plain(kind, rank, size, steps=6)
    failing = {(0, 1): ("forward", 6), (3, 0): ("backward", 3), (5, 1): ("backward", 1.5)}
    got, seen, guard = train(kind, rank, size, steps=6, failing=failing)
    calm, calm_seen, calm_guard = train(kind, rank, size, steps=6)
    return {
        "disturbed": report(guard, same(got, reference), same(seen, gradients)),
        "undisturbed": report(calm_guard, same(calm, reference), same(calm_seen, gradients)),
    }


def mixed(rank, size):
    """Parameters in bfloat16: what fails in the first window ends as what began with half the micro-batch."""
    got, _seen, guard = train(
        "fsdp1-mixed", rank, size, steps=4, exact=False, failing={(0, 1): ("backward", 6), (2, 0): ("forward", 3)}
    )
    calm, _seen, _guard = train("fsdp1-mixed", rank, size, steps=2, exact=False, micro_batch=4)
    first, _seen, _guard = train("fsdp1-mixed", rank, size, steps=2, exact=False, failing={(0, 1): ("backward", 6)})
    return {"redone": guard.redone, "finite": all(each.isfinite().all() for each in got), "same": same(calm, first)}


def clipped(rank, size):
    """The norm is that of all shards."""
    from ullage.guard import Guard

    results = []
    for guarded in (True, False):
        model = wrapped("fsdp1", Net(False), size)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        guard = Guard(model, optimizer, micro_batch=8, max_grad_norm=0.01) if guarded else None
        for step in range(2):
            if guard:
                guard.step(data(step, rank), lambda micro, model=model: model(micro).sum())
                continue
            model(data(step, rank)).sum().backward()
            model.clip_grad_norm_(0.01)
            optimizer.step()
            optimizer.zero_grad()
        results.append(weights(model))
    return same(*results)


def released(rank, size):
    """When the window runs again, every rank holds its shards and nothing more."""
    from ullage.guard import Guard

    net = Net()
    net.where = "backward"
    model = wrapped("fsdp1", net, size)
    guard = Guard(model, optimizer_of(model, True), micro_batch=8, loss_reduction="sum")
    held, seen = [], {}

    def loss_of(micro):
        if held and not seen:
            gc.collect()
            handles = [state._handle for state in guard.parallel.states]
            seen["outputs"] = all(each() is None for each in held)
            seen["gradients"] = all(handle.flat_param.grad is None for handle in handles)
            seen["sharded"] = all(handle.needs_unshard() for handle in handles)
            net.where = "none"
        output = model(micro)
        held.append(weakref.ref(output))
        return output.sum()

    with memory_limit(6 * PER_SAMPLE) if rank == 0 else contextlib.nullcontext():
        guard.step(data(0, rank), loss_of)
    return seen


def refused():
    """What cannot be guarded is said before the first step."""
    from torch.distributed.fsdp import CPUOffload, FullyShardedDataParallel

    from ullage.errors import InputError
    from ullage.guard import Guard

    cpu = torch.device("cpu")
    said = []

    def hooked():
        model = FullyShardedDataParallel(Net(), device_id=cpu)
        model.register_comm_hook(None, lambda _state, gradient, shard: None)
        return model

    for build in (
        lambda: FullyShardedDataParallel(Net(), device_id=cpu, cpu_offload=CPUOffload(offload_params=True)),
        hooked,
        lambda: torch.nn.Sequential(FullyShardedDataParallel(Net(), device_id=cpu)),
    ):
        model = build()
        try:
            Guard(model, optimizer_of(model, True), micro_batch=8)
            said.append("")
        except InputError as error:
            said.append(str(error))
    return said
