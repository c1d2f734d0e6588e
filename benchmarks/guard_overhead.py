"""What the guard costs an undisturbed step: guarded and plain steps in turn, the median of the ratios of pairs.

python benchmarks/guard_overhead.py                   one process on the CPU
python benchmarks/guard_overhead.py --ranks 2         DDP over gloo (two votes a step)
python benchmarks/guard_overhead.py --device cuda     one GPU

The model is the same for both, a decoder of a few layers; the plain step is forward, backward, clip, AdamW, clear.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import time
from typing import Any

import torch
from torch import nn


class Decoder(nn.Module):
    """Embedding, pre-norm transformer layers, and a head: about 5 million parameters at width 256."""

    def __init__(self, width: int, layers: int, vocabulary: int = 4096) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Any) -> Any:
        logits = self.head(self.layers(self.embedding(tokens)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def measure(device: str, pairs: int, width: int, layers: int, batch: int, length: int, wrap: Any) -> dict[str, float]:
    """Return the medians of a plain step, of the pairs' ratio, and of the guard's own time."""
    from ullage.guard import Guard

    torch.manual_seed(0)
    model = wrap(Decoder(width, layers).to(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    guard = Guard(model, optimizer, micro_batch=batch, max_grad_norm=1.0)
    tokens = torch.randint(0, 4096, (batch, length), device=device)

    def plain() -> None:
        loss = model(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def guarded() -> None:
        guard.step(tokens, model)

    def seconds(step: Any) -> tuple[float, float]:
        """Return wall and processor seconds: the latter do not count what else runs on the machine."""
        if device == "cuda":
            torch.cuda.synchronize()
        start, busy = time.perf_counter(), time.process_time()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, time.process_time() - busy

    for step in (plain, guarded, plain, guarded):
        step()
    found = []
    for pair in range(pairs):  # in turn, the first one alternating, so that a drift of the machine falls on both
        both = {step: seconds(step) for step in ((plain, guarded) if pair % 2 else (guarded, plain))}
        found.append((both[plain], both[guarded]))
    step_seconds = statistics.median(one[0] for one, _two in found)
    return {
        "pairs": pairs,
        "plain_step_seconds": step_seconds,
        "median_overhead": statistics.median(two[0] / one[0] for one, two in found) - 1,
        "median_processor_overhead": statistics.median(two[1] / one[1] for one, two in found) - 1,
        "own_seconds": (own := own_seconds(guard, tokens)),
        "own_share": own / step_seconds,
    }


def own_seconds(guard: Any, tokens: Any, repeats: int = 200) -> float:
    """Return the guard's own time per window: everything but the model's and the optimizer's work.

    The loss is a constant that needs no model, so what is left is the guard: far below the noise of a whole step.
    """
    loss = torch.zeros((), requires_grad=True)
    kept = guard.parallel
    from ullage.guard.parallel import Parallel

    guard.parallel = Parallel(guard.votes)  # the votes stay; DDP's own collectives are DDP's
    times = []
    for _repeat in range(repeats):
        start = time.perf_counter()
        guard.gradients([tokens], lambda _micro: loss + 0.0)
        guard.update(lambda: None)
        times.append(time.perf_counter() - start)
    guard.parallel = kept
    return statistics.median(times)


def on_ranks(rank: int, arguments: argparse.Namespace, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=arguments.ranks)
    result = run(arguments, nn.parallel.DistributedDataParallel)
    if rank == 0:
        print(json.dumps(result), flush=True)
    torch.distributed.barrier()
    os._exit(0)


def run(arguments: argparse.Namespace, wrap: Any) -> dict[str, float]:
    return measure(
        arguments.device, arguments.pairs, arguments.width, arguments.layers, arguments.batch, arguments.length, wrap
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=31)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    arguments = parser.parse_args()
    if arguments.ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        torch.multiprocessing.spawn(on_ranks, args=(arguments, port), nprocs=arguments.ranks)
        return 0
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    print(json.dumps(run(arguments, lambda model: model)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
