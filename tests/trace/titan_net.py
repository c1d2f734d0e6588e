"""A Llama as torchtitan has it, split, checkpointed and sharded as torchtitan does: what its closed form is held to.

Source: torchtitan@9dec370:torchtitan/models/llama/model.py; torchtitan/parallelisms/parallelize_llama.py (apply_tp,
apply_ac, apply_fsdp); train.py. Written anew, with the operators in their order.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
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
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

aten = torch.ops.aten
KEPT = {
    aten.mm.default,
    aten._scaled_dot_product_flash_attention.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
}


class Norm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        wide = x.float()
        return (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-5)).type_as(x) * self.weight


def rotated(x, table):
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table).flatten(3).type_as(x)


class Attention(nn.Module):
    def __init__(self, size, heads, groups):
        super().__init__()
        self.width, self.repeats = size // heads, heads // groups
        self.wq, self.wo = (nn.Linear(size, size, bias=False) for _each in range(2))
        self.wk, self.wv = (nn.Linear(size, groups * self.width, bias=False) for _each in range(2))

    def forward(self, x, table):
        batch, tokens = x.shape[:2]
        q, k, v = (each(x).view(batch, tokens, -1, self.width) for each in (self.wq, self.wk, self.wv))
        table = table[None, :, None, :]
        q, k = rotated(q, table), rotated(k, table)
        q, k, v = (each.transpose(1, 2) for each in (q, self.repeated(k), self.repeated(v)))
        found = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(found.transpose(1, 2).contiguous().view(batch, tokens, -1))

    def repeated(self, x):
        if self.repeats == 1:
            return x
        batch, tokens, groups, width = x.shape
        wide = x[:, :, :, None, :].expand(batch, tokens, groups, self.repeats, width)
        return wide.reshape(batch, tokens, groups * self.repeats, width)


class FeedForward(nn.Module):
    def __init__(self, size, inner):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(size, inner, bias=False) for _each in range(2))
        self.w2 = nn.Linear(inner, size, bias=False)

    def forward(self, x):
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config, norm):
        super().__init__()
        size = config["hidden_size"]
        self.attention = Attention(size, config["num_attention_heads"], config["num_key_value_heads"])
        self.feed_forward = FeedForward(size, config["intermediate_size"])
        self.attention_norm, self.ffn_norm = norm(size), norm(size)

    def forward(self, x, table):
        h = x + self.attention(self.attention_norm(x), table)
        return h + self.feed_forward(self.ffn_norm(h))


class Net(nn.Module):
    def __init__(self, config, tokens, norm):
        super().__init__()
        size, rows = config["hidden_size"], config["vocab_size"]
        self.tok_embeddings = nn.Embedding(rows, size)
        width = size // config["num_attention_heads"]
        self.register_buffer("table", torch.empty(tokens, width // 2, dtype=torch.complex64))
        self.layers = nn.ModuleList(Block(config, norm) for _each in range(config["num_hidden_layers"]))
        self.norm = norm(size)
        self.output = nn.Linear(size, rows, bias=False)

    def forward(self, tokens):
        h = self.tok_embeddings(tokens)
        for layer in self.layers:
            h = layer(h, self.table)
        return self.output(self.norm(h))


def split(net, mesh):
    part, whole = Shard(1), Replicate()
    parallelize_module(
        net,
        mesh,
        {
            "tok_embeddings": RowwiseParallel(input_layouts=whole, output_layouts=part),
            "norm": SequenceParallel(),
            "output": ColwiseParallel(input_layouts=part, output_layouts=Shard(-1), use_local_output=False),
        },
    )
    for layer in net.layers:
        plan = {name: ColwiseParallel() for name in ("attention.wq", "attention.wk", "attention.wv")}
        plan |= {name: ColwiseParallel() for name in ("feed_forward.w1", "feed_forward.w3")}
        plan |= {name: RowwiseParallel(output_layouts=part) for name in ("attention.wo", "feed_forward.w2")}
        plan |= {name: SequenceParallel() for name in ("attention_norm", "ffn_norm")}
        plan["attention"] = PrepareModuleInput(input_layouts=(part, None), desired_input_layouts=(whole, None))
        plan["feed_forward"] = PrepareModuleInput(input_layouts=(part,), desired_input_layouts=(whole,))
        parallelize_module(layer, mesh, plan)


def kept_by(count):
    """Every second product is made again."""

    def policy(context, func, *_args, **_kwargs):
        mode = "again" if context.is_recompute else "first"
        if func is aten.mm.default:
            count[mode] = count.get(mode, 0) + 1
        keeps = func in KEPT and not (func is aten.mm.default and count[mode] % 2 == 0)
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def checkpointed(net, kind):
    for name, layer in net.layers.named_children():
        if kind == "full":
            wrapped = checkpoint_wrapper(layer, preserve_rng_state=False)
        else:
            wrapped = checkpoint_wrapper(layer, context_fn=partial(lambda: kept_by({})), preserve_rng_state=False)
        net.layers.register_module(name, wrapped)


def shard(net, mesh, split_root):
    """Shard as of 2024-12, or with the root's parts as units of their own (from 2025-07)."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options = {"mesh": mesh, "mp_policy": policy}
    if split_root:
        fully_shard(net.tok_embeddings, reshard_after_forward=True, **options)
    for index, layer in enumerate(net.layers):
        fully_shard(layer, reshard_after_forward=split_root or index < len(net.layers) - 1, **options)
    if split_root:
        fully_shard([net.norm, net.output], reshard_after_forward=False, **options)
    fully_shard(net, reshard_after_forward=False, **options)  # so the root was held then, whatever was asked for


def program(config, *, data, tensor, micro_batch, tokens, recompute, split_root=False):
    """Return a function to be traced; ``split_root``: as of 2025-12, with PyTorch's own norm."""

    def made():
        mesh = dist.init_device_mesh("cuda", (data, tensor), mesh_dim_names=("dp", "tp"))
        net = Net(config, tokens, nn.RMSNorm if split_root else Norm)
        if tensor > 1:
            split(net, mesh["tp"])
        if recompute != "none":
            checkpointed(net, recompute)
        shard(net, mesh["dp"], split_root)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
        ids = torch.zeros(micro_batch, tokens, dtype=torch.int64)

        def step():
            optimizer.zero_grad()
            with loss_parallel():
                logits = net(ids)
                loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten(0, 1))
                del logits
                loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0, foreach=True)
            optimizer.step()

        return net, step

    return made
