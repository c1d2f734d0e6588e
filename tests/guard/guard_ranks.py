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

    #: The layer after which memory is needed.
    at = 2

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
            if number == self.at:
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
                if gradient is None:  # no part of this parameter is on this rank
                    continue
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
    if kind.startswith("fsdp1"):
        return _flat(net, kind)
    return net


def _flat(net, kind):
    """FSDP1 with a flat parameter per layer; that of the last layer is the root's."""
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy

    options = {
        "fsdp1": {},
        "fsdp1-orig": {"use_orig_params": True, "forward_prefetch": True},
        "fsdp1-grad-op": {"sharding_strategy": ShardingStrategy.SHARD_GRAD_OP, "use_orig_params": True},
        "fsdp1-no-shard": {"sharding_strategy": ShardingStrategy.NO_SHARD},
        "fsdp1-mixed": {"mixed_precision": MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
    }[kind] | {"device_id": torch.device("cpu")}
    for number in range(3):
        net.layers[number] = FullyShardedDataParallel(net.layers[number], **options)
    return FullyShardedDataParallel(net, **options)


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


def corners(rank, size, port, folder):
    """What else can go wrong on two ranks."""
    start(rank, size, port)
    found = {
        "uneven": uneven("fsdp2", rank, size),
        "both": both_fail(rank, size),
        "always": report_of(train("fsdp2", rank, size, failing={(4, 0): ("backward", 6)}, votes="always"))
        | {"equal": same(train("fsdp2", rank, size, votes="always")[0], plain("fsdp2", rank, size)[0])},
        "ddp options": ddp_options(rank, size),
        "optimizer": [optimizer_fails(kind, rank, size, folder) for kind in ("ddp", "fsdp2")],
        "checkpoint": [checkpointed(kind, rank, size, folder) for kind in ("ddp", "fsdp2")],
        "asked": asked(rank, size),
        "corrupt": corrupt(rank, size, folder),
        "apart": apart(rank, size),
        "released": released(rank, size),
        "own collectives": own_collectives(rank, size),
        "global mean": global_mean(rank, size),
    }
    finish(folder, rank, found)


def report_of(trained):
    return report(trained[2], None, None)


def uneven(kind, rank, size):
    """One rank has fewer samples: as many collectives on both; the pieces without weight add nothing."""
    from ullage.guard import Guard

    results = []
    for guarded in (True, False):
        model = wrapped(kind, Net(), size)
        optimizer = optimizer_of(model, True)
        guard = Guard(model, optimizer, micro_batch=2, loss_reduction="sum") if guarded else None
        for step in range(3):
            batch = data(step, rank, size=8 if rank == 0 else 3)
            if guard:
                guard.step(batch, lambda micro, model=model: model(micro).sum())
                continue
            model(batch).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append((weights(model), optimizer.seen))
    return same(results[0][0], results[1][0]) and same(results[0][1], results[1][1])


def both_fail(rank, size):
    """Both ranks run out of memory in the same window, at different places."""
    answers = []
    for kind in ("ddp", "fsdp2"):
        failing = {(3, 0): ("forward", 6), (3, 1): ("backward", 3), (5, 1): ("forward", 6), (5, 0): ("backward", 6)}
        got, seen, guard = train(kind, rank, size, failing=failing)
        reference, gradients = plain(kind, rank, size)
        answers.append((same(got, reference) and same(seen, gradients), guard.redone, guard.plan.to_json()))
    return answers


def ddp_options(rank, size):
    """Buffers that DDP broadcasts, unused parameters, and gradients that are views of the buckets."""
    from ullage.guard import Guard

    results = []
    for guarded in (True, False):
        torch.manual_seed(5)
        net = nn.ModuleDict(
            {"norm": nn.BatchNorm1d(FEATURES), "first": nn.Linear(FEATURES, FEATURES), "unused": nn.Linear(3, 3)}
        )
        net.forward = lambda inputs, net=net: _Work.apply(net["first"](net["norm"](inputs)), "both")
        model = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True, gradient_as_bucket_view=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        guard = (
            Guard(model, optimizer, micro_batch=8, recompute=lambda on: None, min_micro_batch=8) if guarded else None
        )
        for step in range(4):
            batch = data(step, rank)
            if guard:
                fails = step == 2 and rank == 1
                calls = []

                def loss_of(micro, model=model, fails=fails, calls=calls):
                    calls.append(1)
                    output = model(micro)
                    if fails and len(calls) == 1:
                        torch.empty(1 << 50, dtype=torch.uint8)
                    return output.mean()

                guard.step(batch, loss_of)
                continue
            model(batch).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([*weights(net), *(buffer.clone() for buffer in net.buffers())])
    return same(*results)


class Heavy(torch.optim.SGD):
    """Needs work space in its step, after it has changed the first weight."""

    need = 0

    def step(self, closure=None):
        if self.need:
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(1)
            torch.empty(self.need, dtype=torch.uint8)
        return super().step(closure)


def optimizer_fails(kind, rank, size, folder):
    """One rank fails in the optimizer: all ranks ask for a restart, and the plan is saved."""
    from ullage.guard import Guard, PlanStore

    store = PlanStore(Path(folder) / f"optimizer-{kind}.json")
    net = Net(False)
    model = wrapped(kind, net, size)
    optimizer = Heavy(model.parameters(), lr=0.1)
    guard = Guard(model, optimizer, micro_batch=8, store=store)
    guard.step(data(0, rank), lambda micro: model(micro).mean())
    optimizer.need = PER_SAMPLE if rank == 1 else 0
    try:
        with memory_limit(PER_SAMPLE // 2):
            guard.step(data(1, rank), lambda micro: model(micro).mean())
    except SystemExit as ended:
        torch.distributed.barrier()
        return ended.code, store.load().to_json()
    return 0, ""


def checkpointed(kind, rank, size, folder):
    """A failed optimizer step goes back to the checkpoint on every rank, shards and moments included."""
    from ullage.guard import Checkpoint, Guard

    net = Net(False)
    model = wrapped(kind, net, size)

    class Adam(torch.optim.AdamW):
        need = 0

        def step(self, closure=None):
            if self.need:
                torch.empty(self.need, dtype=torch.uint8)
            return super().step(closure)

    optimizer = Adam(model.parameters(), lr=0.1)
    position, back = [0], []
    checkpoint = Checkpoint(Path(folder) / f"ck-{kind}", every=2, position=lambda: position[0])

    def smaller(on):
        optimizer.need = 0

    guard = Guard(model, optimizer, micro_batch=8, checkpoint=checkpoint, rewind=back.append, offload=smaller)
    after = {}
    step, failed = 0, False
    while step < 6:
        position[0] = step + 1
        optimizer.need = 1 << 50 if step == 4 and rank == 1 and not failed else 0
        guard.step(data(step, rank), lambda micro: model(micro).mean())
        if back and not failed:
            failed, step = True, back[0]
            after["restored"] = same(weights(net), after["at 4"])
            continue
        if step == 3:
            after["at 4"] = weights(net)
        step += 1
    reference = Net(False)
    model = wrapped(kind, reference, size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(6):
        model(data(step, rank)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return back, after["restored"], same(weights(net), weights(reference))


def asked(rank, size):
    """One rank asks for a smaller micro-batch: all follow, and nothing is redone."""
    from ullage.guard import Guard

    net = Net(False)
    model = wrapped("ddp", net, size)
    guard = Guard(model, torch.optim.SGD(model.parameters(), lr=0.1), micro_batch=8)
    sizes = []
    for step in range(3):
        if step == 1 and rank == 1:
            guard.ask_smaller("experts")
        guard.step(data(step, rank), lambda micro: model(micro).mean())
        sizes.append(guard.micro_batch)
    return sizes, guard.redone


def corrupt(rank, size, folder):
    """A corrupt store is refused on every rank."""
    from ullage.errors import InputError
    from ullage.guard import Guard, PlanStore

    path = Path(folder) / "corrupt.json"
    if rank == 0:
        path.write_text("{")
    torch.distributed.barrier()
    net = Net(False)
    try:
        Guard(net, torch.optim.SGD(net.parameters()), micro_batch=1, store=PlanStore(path))
    except InputError as error:
        return str(error)
    return ""


def apart(rank, size):
    """A rank that calls the guard once more than the others is named, not waited for in silence."""
    from ullage.errors import InputError
    from ullage.guard.votes import Votes

    votes = Votes()
    votes.num_votes += rank
    try:
        votes.vote()
    except InputError as error:
        return str(error)
    return ""


def released(rank, size):
    """After a failure of one rank, nothing of the first attempt lives on any rank, unsharded weights included."""
    import gc
    import weakref

    from ullage.guard import Guard

    answers = []
    for kind in ("ddp", "fsdp2"):
        net = Net()
        net.where = "backward"
        model = wrapped(kind, net, size)
        Guard(model, optimizer_of(model, True), micro_batch=4)  # an earlier guard of the same model is replaced
        guard = Guard(model, optimizer_of(model, True), micro_batch=8, loss_reduction="sum")
        held, seen = [], []

        def loss_of(micro, model=model, net=net, held=held, seen=seen):
            if held:
                gc.collect()
                seen.append([each() is None for each in held])
                seen.append([parameter.grad is None for parameter in model.parameters()])
                net.where = "none"
                held.clear()
            elif not seen:
                output = model(micro)
                held.append(weakref.ref(output))
                return output.sum()
            return model(micro).sum()

        with memory_limit(6 * PER_SAMPLE) if rank == 0 else contextlib.nullcontext():
            guard.step(data(0, rank), loss_of)
        answers.append((seen, guard.redone))
    return answers


class _Reduced(torch.autograd.Function):
    """A sum over the ranks, as tensor parallelism has it, with a vote before it."""

    @staticmethod
    def forward(ctx, inputs, guard):
        found = inputs.clone()
        guard.vote_point()
        torch.distributed.all_reduce(found)
        return found

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def own_collectives(rank, size):
    """A loop with collectives of its own, each behind a vote point."""
    from ullage.guard import Guard

    results = []
    for failing in ((-1, -1), (1, 0), (2, 1)):
        net = Net()
        optimizer = optimizer_of(net, True)
        guard = Guard(net, optimizer, micro_batch=8, loss_reduction="sum")
        for step in range(4):
            net.where = "forward" if failing == (step, rank) else "none"
            with memory_limit(6 * PER_SAMPLE) if failing == (step, rank) else contextlib.nullcontext():
                guard.step(data(step, 0), lambda micro: _Reduced.apply(net(micro), guard).sum())  # noqa: B023
        results.append((guard.redone, optimizer.seen))
    return [redone for redone, _seen in results], same(results[0][1], results[1][1]) and same(
        results[0][1], results[2][1]
    )


def global_mean(rank, size):
    """The mean over the samples of all ranks, which have different numbers of them."""
    from ullage.guard import Guard

    batches = [data(0, each, size=8 - 3 * each) for each in range(size)]
    net = Net(False)
    net(torch.cat(batches)).square().mean().backward()
    expected = [parameter.grad.clone() for parameter in net.parameters()]
    net = Net(False)
    model = wrapped("ddp", net, size)
    guard = Guard(model, torch.optim.SGD(model.parameters(), lr=0.1), micro_batch=3, normalize="global")
    guard.gradients([batches[rank]], lambda micro: model(micro).square().mean())
    return largest_difference(expected, [parameter.grad for parameter in net.parameters()])


def trainer(rank, size, port, folder):
    """The Trainer under DDP, plain and guarded; rank 1 runs out of memory in its second window."""
    import test_guard_adapters as adapters
    from transformers import Trainer, TrainingArguments

    from ullage.guard import guard_trainer

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    found, guard = [], None
    for guarded in (False, True):
        model = adapters.hf_model()
        rows = [{"input_ids": row, "labels": row.clone()} for row in adapters.tokens(48)]
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=3, use_cpu=True,
            ddp_backend="gloo", report_to=[], save_strategy="no", disable_tqdm=True, learning_rate=1e-2, seed=3,
        )  # fmt: skip
        made = Trainer(model=model, args=arguments, train_dataset=rows)
        calls = []

        def hook(_module, _inputs, output, calls=calls):
            calls.append(1)
            return _Work.apply(output, "both") if len(calls) == 3 else output

        if guarded:
            guard = guard_trainer(made)
        if guarded and rank == 1:
            model.model.layers[0].mlp.register_forward_hook(hook)
        with memory_limit(3 * PER_SAMPLE) if guarded and rank == 1 else contextlib.nullcontext():
            made.train()
        found.append(weights(model))
    finish(folder, rank, {**report(guard.guard, None, None), "difference": largest_difference(*found)})
