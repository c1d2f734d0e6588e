"""A small network under tensor parallelism, alone and over FSDP2; run as a program, ranks of gloo on the CPU.

``python parallel_net.py STORE OUT CONFIG`` writes the sizes that each kind of wrapping takes and frees, in order, to
OUT.RANK: of the network here, and of the model of transformers that a config.json describes.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from step_sizes import real_sizes
from torch import nn
from torch.distributed import _functional_collectives as functional
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

SIZE, TOKENS, WORLD, STEPS = 256, 64, 4, 3
#: name: (size of the data-parallel mesh, of the tensor-parallel one, sequence parallel, rows of the vocabulary)
KINDS = {
    "uneven": (1, 4, False, 1022),
    "sequence": (1, 4, True, 1024),
    "two meshes": (2, 2, True, 1024),
}
#: Other kernels of a GPU keep what the CPU's do not.
LLAMA_JOB = {"dtype": "float32", "attention": "math", "seq_len": TOKENS}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(SIZE, SIZE, bias=False) for _each in range(4))

    def forward(self, x):
        q, k, v = (each(x).unflatten(-1, (-1, 32)).transpose(1, 2).sin() for each in (self.q, self.k, self.v))
        return self.o((q * k * v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(SIZE), nn.LayerNorm(SIZE)
        self.attention = Attention()
        self.up = nn.Linear(SIZE, 4 * SIZE, bias=False)
        self.down = nn.Linear(4 * SIZE, SIZE, bias=False)

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(torch.sin(self.up(self.norm2(x))))


class Net(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.embed = nn.Embedding(rows, SIZE)
        self.blocks = nn.ModuleList(Block() for _each in range(2))
        self.norm = nn.LayerNorm(SIZE)
        self.head = nn.Linear(SIZE, rows, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def spread(net, mesh, *, sequence):
    """Wrap the network as torchtitan wraps its own; without the sequence split, as transformers' plans have it."""
    within, split = Shard(1) if sequence else Replicate(), {"norm": SequenceParallel()} if sequence else {}
    attention = {"q": ColwiseParallel(), "k": ColwiseParallel(), "v": ColwiseParallel(),
                 "o": RowwiseParallel(output_layouts=within)}  # fmt: skip
    parallelize_module(
        net,
        mesh,
        {
            "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=within),
            "head": ColwiseParallel(input_layouts=within, output_layouts=Shard(-1), use_local_output=False),
            **split,
        },
    )
    for block in net.blocks:
        plan = {"up": ColwiseParallel(input_layouts=within), "down": RowwiseParallel(output_layouts=within), **split}
        if sequence:
            plan["norm2"] = SequenceParallel()
            plan["attention"] = PrepareModuleInput(input_layouts=(within,), desired_input_layouts=(Replicate(),))
        parallelize_module(block, mesh, plan)
        parallelize_module(block.attention, mesh, attention)


def wrapped(kind, device):
    """Return (network, one step)."""
    data, tensor, sequence, rows = KINDS[kind]
    mesh = dist.device_mesh.init_device_mesh(device, (data, tensor), mesh_dim_names=("dp", "tp"))
    net = Net(rows)
    spread(net, mesh["tp"], sequence=sequence)
    if data > 1:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for each in (*net.blocks, net):
            fully_shard(each, mesh=mesh["dp"], mp_policy=policy)
    tokens = torch.arange(2 * TOKENS, device="cpu").reshape(2, TOKENS).to(device if device == "cpu" else "meta")

    def step():
        with loss_parallel():
            logits = net(tokens)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
            del logits
            loss.backward()
        del loss
        net.zero_grad(set_to_none=True)

    return net, step


def program(kind):
    """Return a function to be traced."""
    return lambda: wrapped(kind, "cuda")


def split_llama(config, *, sequence):
    """Return (model, one step) of transformers, split over all ranks."""
    from ullage.trace.job import TraceJob
    from ullage.trace.models.hf import build_model
    from ullage.trace.ranks.tensor_parallel import loss_context, split

    job = TraceJob(tp=dist.get_world_size(), sp=sequence, **LLAMA_JOB)
    model = build_model(config, job).model.to_empty(device="cpu")
    split(model, dist.device_mesh.init_device_mesh("cpu", (job.tp,)), job)
    ids = torch.arange(TOKENS).unsqueeze(0)
    batch = {"input_ids": ids, "labels": ids.clone()} | ({"position_ids": ids.clone()} if sequence else {})

    def step():
        model.zero_grad(set_to_none=True)
        with loss_context(job), sdpa_kernel(SDPBackend.MATH):
            model(**batch).loss.backward()

    return model, step


def sizes(_net, step):
    """Return the bytes of allocations (and, negative, of frees) of each step but the first."""
    step()
    return [real_sizes(step) for _each in range(STEPS)]


def let_go(wait):
    """Give a worker of gloo, which holds what it sent for a moment after the wait, the time to let go."""

    def waited(tensor):
        found = wait(tensor)
        time.sleep(0.002)
        return found

    return waited


def rank(number, store, out, config):
    """Be one rank."""
    torch.set_num_threads(1)
    functional.wait_tensor = let_go(functional.wait_tensor)
    dist.init_process_group("gloo", store=dist.FileStore(store, WORLD), rank=number, world_size=WORLD)
    found = {kind: sizes(*wrapped(kind, "cpu")) for kind in KINDS}
    for name in ("plan", "sequence plan"):
        found[name] = sizes(*split_llama(config, sequence=name != "plan"))
    dist.barrier()
    dist.destroy_process_group()
    Path(f"{out}.{number}").write_text(json.dumps(found))


def main(store, out, config):
    """Fork the ranks: what they import is imported once."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    children = []
    for number in range(WORLD):
        child = os.fork()
        if not child:
            rank(number, store, out, config)
            os._exit(0)
        children.append(child)
    sys.exit(max(os.waitpid(child, 0)[1] for child in children) and 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
