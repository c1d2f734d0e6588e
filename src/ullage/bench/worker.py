"""One try in a process of its own: build the target, run a script of steps, write what was measured.

``python -m ullage.bench.worker`` reads its order from a file named on the command line and writes its answer beside
it. A failed allocation is an answer too; a process that is killed leaves none, and the parent says so.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ullage.bench.curves import Sample, StepRow, plain, thinned
from ullage.bench.loads import ScriptStep
from ullage.bench.meters import CudaMeter, Meter, ProcessMeter, Sampler
from ullage.bench.target import Target, build, from_json, to_json
from ullage.errors import UllageError

#: Words of a failed allocation in errors that are not ``torch.OutOfMemoryError``.
MEMORY_WORDS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "Cannot allocate memory")


@dataclass(frozen=True, kw_only=True)
class Order:
    """What one process is asked to run."""

    target: Target
    device: str
    script: tuple[ScriptStep, ...]
    memory_limit_bytes: int | None = None
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    master_port: int = 0
    seed: int = 0

    def to_json(self) -> str:
        """Return the order as text."""
        return json.dumps({**vars(self), "target": to_json(self.target), "script": plain(self.script)})

    @staticmethod
    def from_json(text: str) -> Order:
        """Read what :meth:`to_json` wrote."""
        values = json.loads(text)
        script = tuple(ScriptStep(**one) for one in values.pop("script"))
        return Order(**{**values, "target": from_json(values["target"]), "script": script})


def main(argv: list[str]) -> int:
    """Run the order in the file ``argv[0]``, write the answer to ``argv[1]``."""
    order = Order.from_json(Path(argv[0]).read_text(encoding="utf-8"))
    answer = run(order)
    temporary = Path(argv[1] + ".part")
    temporary.write_text(json.dumps(answer), encoding="utf-8")
    temporary.rename(argv[1])
    # A rank that died leaves the others in a collective: leave at once, without waiting for them.
    sys.stdout.flush()
    os._exit(0)


def run(order: Order) -> dict[str, Any]:
    """Run an order in this process and return its answer as plain values."""
    import torch

    torch.manual_seed(order.seed + order.rank)
    device = torch.device(f"cuda:{order.local_rank}" if order.device == "cuda" else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    meter: Meter = CudaMeter(device) if device.type == "cuda" else ProcessMeter()
    rows: list[StepRow] = []
    marks: dict[str, Sample] = {}
    died: dict[str, str] | None = None
    with Sampler(meter) as sampler:
        marks["start"] = sampler.sample()
        try:
            _limit(order, device)
            step = build(order.target, device, wrap=_wrap(order, device))
            meter.end_step()
            marks["built"] = sampler.sample()
            for one in order.script:
                rows += _run_step(one, step, sampler)
        except Exception as error:  # the answer says what happened: memory is a result, anything else the caller's
            died = {"cause": cause_of(error), "detail": _sentence(error)}
        counters = meter.counters()
    return {
        "rank": order.rank,
        "died": died,
        "rows": plain(rows),
        "curve": plain(thinned(sampler.samples)),
        "marks": {name: plain(sample) for name, sample in marks.items()},
        "peaks": _peaks(sampler.samples, rows),
        "counters": counters,
        "device": _device_facts(device),
    }


def _run_step(one: ScriptStep, step: Any, sampler: Sampler) -> list[StepRow]:
    if one.label == "idle":
        time.sleep(one.seconds)
        return []
    meter = sampler.meter
    meter.begin_step()
    sampler.take_peak()
    begun = sampler.now()
    step(one.micro_batch, one.seq)
    allocated, reserved = meter.end_step()
    seconds = sampler.now() - begun
    after = sampler.sample()
    return [
        StepRow(
            t=round(begun, 4),
            label=one.label,
            micro_batch=one.micro_batch,
            seq=one.seq,
            seconds=round(seconds, 6),
            peak_allocated_bytes=allocated,
            peak_reserved_bytes=reserved,
            peak_used_bytes=sampler.take_peak(),
            after=after,
        )
    ]


def cause_of(error: BaseException) -> str:
    """Return ``memory`` for a failed allocation, ``input`` for what ullage itself refuses, else ``error``."""
    import torch

    if isinstance(error, UllageError):
        return "input"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "memory"
    return "memory" if any(words.lower() in str(error).lower() for words in MEMORY_WORDS) else "error"


def _sentence(error: BaseException) -> str:
    if isinstance(error, UllageError):
        return str(error)
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def _limit(order: Order, device: Any) -> None:
    """Cap what this process may take: torch's own cap on CUDA, the kernel's limit on data pages on Linux."""
    if order.memory_limit_bytes is None:
        return
    import torch

    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, order.memory_limit_bytes / total), device)
        return
    import resource

    status = Path("/proc/self/status").read_text()
    sizes = {
        line.split(":")[0]: line.split()[1] for line in status.splitlines() if line.startswith(("VmData", "VmRSS"))
    }
    room = order.memory_limit_bytes - int(sizes["VmRSS"]) * 1024
    limit = int(sizes["VmData"]) * 1024 + max(0, room)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _wrap(order: Order, device: Any) -> Any:
    """Join the other ranks, if there are any, and return what lays data parallelism around a model."""
    if order.world_size == 1:
        return None
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"tcp://{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{order.master_port}",
        rank=order.rank,
        world_size=order.world_size,
    )
    return lambda model: DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def _peaks(samples: list[Sample], rows: list[StepRow]) -> dict[str, int | None]:
    allocated = [row.peak_allocated_bytes for row in rows if row.peak_allocated_bytes is not None]
    reserved = [row.peak_reserved_bytes for row in rows if row.peak_reserved_bytes is not None]
    return {
        "allocated_bytes": max(allocated, default=None),
        "reserved_bytes": max(reserved, default=None),
        "used_bytes": max(sample.used_bytes for sample in samples),
    }


def _device_facts(device: Any) -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {"kind": device.type, "torch": torch.__version__, "threads": torch.get_num_threads()}
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        facts |= {
            "name": about.name,
            "total_bytes": int(torch.cuda.mem_get_info(device)[1]),
            "cuda": torch.version.cuda,
            "compute_capability": [about.major, about.minor],
        }
    else:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        facts |= {"name": "CPU", "total_bytes": pages}
    return facts


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
