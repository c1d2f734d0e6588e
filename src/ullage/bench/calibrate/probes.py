"""Probes that run on a GPU, each in a process of its own: ``python -m ullage.bench.calibrate.probes NAME ...``.

Each prints one JSON object on its last line. Nothing here is computed from a model of ours: only counters of the
driver and of torch are read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

MIB = 2**20
#: Sizes that show how the caching allocator rounds: the least block, segments of small and large ones, large requests.
ALLOCATOR_SIZES = {"block": 1, "small_segment": 1, "large_segment": 2 * MIB, "large_request": 21 * MIB + 1}
NUM_COMMUNICATORS = 4
REPEATS = 7


def facts() -> dict[str, Any]:
    """Return the device and the software."""
    import torch

    about = torch.cuda.get_device_properties(0)
    uuid = str(getattr(about, "uuid", ""))
    return {
        "reported": about.name,
        "total_bytes": int(torch.cuda.mem_get_info(0)[1]),
        "compute_capability": [about.major, about.minor],
        "multiprocessors": about.multi_processor_count,
        "num_devices": torch.cuda.device_count(),
        "uuid": uuid,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None,
        "driver": _driver(),
        "python": sys.version.split()[0],
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def context() -> dict[str, float]:
    """Hold a context of our own and watch what another process takes of the device, stage by stage."""
    import torch

    torch.cuda.init()
    torch.zeros(1, device="cuda")
    before = _free()
    child = subprocess.Popen(
        [sys.executable, "-m", "ullage.bench.calibrate.probes", "context-child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None and child.stdout is not None
    found: dict[str, float] = {}
    for stage in ("bare", "loaded"):
        found[f"{stage}_reserved"] = json.loads(child.stdout.readline())["reserved"]
        found[f"{stage}_used"] = before - _free()
        child.stdin.write("\n")
        child.stdin.flush()
    child.wait(timeout=60)
    return found


def _free() -> int:
    import torch

    torch.cuda.synchronize()
    return int(torch.cuda.mem_get_info(0)[0])


def context_child() -> None:
    """Make a context and wait; run a small step with the kernels of training and wait again."""
    import torch

    torch.cuda.init()
    torch.zeros(1, device="cuda")
    _stage()
    for dtype in (torch.float32, torch.bfloat16):
        small_step(dtype)
    torch.cuda.synchronize()
    _stage()


def _stage() -> None:
    import torch

    print(json.dumps({"reserved": torch.cuda.memory_reserved(0)}), flush=True)
    sys.stdin.readline()


def small_step(dtype: Any, device: str = "cuda") -> None:
    """Run attention, products, a norm, a loss and AdamW forward and backward once."""
    import torch
    from torch.nn import functional

    weight = torch.randn(256, 1024, device=device, dtype=dtype, requires_grad=True)
    optimizer = torch.optim.AdamW([weight])
    hidden = functional.layer_norm(torch.randn(2, 128, 256, device=device, dtype=dtype) @ weight, (1024,))
    heads = hidden.view(2, 128, 16, 64).transpose(1, 2)
    mixed = functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    logits = functional.silu(mixed.transpose(1, 2).reshape(256, 1024))
    functional.cross_entropy(logits.float(), torch.zeros(256, dtype=torch.long, device=device)).backward()
    optimizer.step()


def workspaces() -> dict[str, int]:
    """Count what cuBLAS keeps after a product, and after a step whose backward pass runs in a thread of its own."""
    import torch

    def product() -> None:
        torch.randn(512, 512, device="cuda", dtype=torch.bfloat16) @ torch.randn(
            512, 512, device="cuda", dtype=torch.bfloat16
        )

    product()
    forward = torch.cuda.memory_allocated(0)  # the product's own tensors are gone
    for dtype in (torch.bfloat16, torch.float32):
        small_step(dtype)
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated(0)
    torch._C._cuda_clearCublasWorkspaces()
    return {"forward": forward, "step": kept - torch.cuda.memory_allocated(0)}


def allocator() -> dict[str, dict[str, int]]:
    """Return how requests of telling sizes grow allocated and reserved bytes, each from an empty cache."""
    import torch

    found = {}
    torch.cuda.init()
    for name, size in ALLOCATOR_SIZES.items():
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(0), torch.cuda.memory_reserved(0)
        held = torch.empty(size, dtype=torch.uint8, device="cuda")
        found[name] = {
            "requested": size,
            "allocated": torch.cuda.memory_allocated(0) - before[0],
            "reserved": torch.cuda.memory_reserved(0) - before[1],
        }
        del held
    return found


def nccl(rank: int, world_size: int, port: int) -> dict[str, Any]:
    """Make communicators one after another and read what each takes of this rank's device."""
    import torch
    import torch.distributed as dist

    torch.cuda.set_device(rank)
    value = torch.ones(MIB, device="cuda")
    torch.cuda.synchronize()
    before = _outside(rank)
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    totals = []
    for number in range(NUM_COMMUNICATORS):
        group = dist.group.WORLD if number == 0 else dist.new_group(list(range(world_size)), backend="nccl")
        dist.all_reduce(value, group=group)
        torch.cuda.synchronize()
        dist.barrier(group=group)
        totals.append(_outside(rank) - before)
    return {"rank": rank, "totals": totals}


def _outside(device: int) -> int:
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return int(total - free - torch.cuda.memory_reserved(device))


def rates() -> dict[str, list[float]]:
    """Return bytes a second of a copy within the device, and FLOP/s of square products by number format."""
    import torch

    free, _total = torch.cuda.mem_get_info(0)
    size = min(2**30, free // 4) // MIB * MIB
    found = {"bandwidth": [2 * size / seconds for seconds in _copies(size)]}
    edge = 8192 if free > 8 * 2**30 else 4096
    for name in ("bfloat16", "float16", "float32"):
        found[name] = [2 * edge**3 / seconds for seconds in _products(edge, name)]
    return found


def _copies(size: int) -> list[float]:
    import torch

    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return _timed(lambda: target.copy_(source))


def _products(edge: int, dtype: str) -> list[float]:
    import torch

    left = torch.randn(edge, edge, device="cuda", dtype=getattr(torch, dtype))
    return _timed(lambda: left @ left)


def _timed(work: Callable[[], Any]) -> list[float]:
    import torch

    for _warm in range(3):
        work()
    torch.cuda.synchronize()
    seconds = []
    for _repeat in range(REPEATS):
        begun = time.perf_counter()
        for _number in range(5):
            work()
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - begun) / 5)
    return seconds


def main(argv: list[str]) -> int:
    """Run one probe by name and print what it found."""
    name, rest = argv[0], [int(word) for word in argv[1:]]
    if name == "context-child":
        context_child()
        return 0
    probes: dict[str, Callable[..., Any]] = {
        "facts": facts,
        "context": context,
        "workspaces": workspaces,
        "allocator": allocator,
        "nccl": nccl,
        "rates": rates,
    }
    print(json.dumps(probes[name](*rest)), flush=True)
    os._exit(0)  # communicators are not torn down: that can wait for other ranks for minutes


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
