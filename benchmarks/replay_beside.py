"""Events per second of this allocator simulator beside a public Python simulator of the same rules, in one run.

    python benchmarks/replay_beside.py --other PATH/TO/allocation_simulator.py [--steps 30]

The other one is ``dynapipe/memory_opt/allocation_simulator.py`` of
awslabs/optimizing-multitask-training-through-dynamic-pipelines at 705cf38 (needs ``pip install sortedcontainers``);
fetch it yourself, nothing of it is kept here. It knows the default rules, no expandable segments, no rounding and no
delayed frees, so that both run the same training steps under the default settings and ``max_split_size_mb``; its small
pool is switched on (``kSmallSize``). Both must reserve the same bytes, else the comparison means nothing (exit 1).
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from replay_speed import training

from ullage.allocator.events import WORK_ALLOC, Workload
from ullage.allocator.run import run_workload
from ullage.allocator.settings import parse_settings

MIB = 2**20


def load(path: Path) -> ModuleType:
    if not path.is_file():
        raise SystemExit(f"missing: {path}; fetch the public simulator first (see --help)")
    spec = importlib.util.spec_from_file_location("other_simulator", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["other_simulator"] = module
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise SystemExit(f"missing: the package {error.name}, which the other simulator needs") from None
    return module


def run_other(other: ModuleType, work: Workload, max_split_mb: int | None) -> int:
    limit = float("inf") if max_split_mb is None else max_split_mb * MIB
    config = other.TorchCachingAllocatorConfig(max_split_size=limit, kSmallSize=MIB)
    simulator = other.TorchCachingAllocatorSimulator(10**9, config)
    live: list[Any] = []
    for code, value in zip(work.codes, work.values, strict=True):
        if code == WORK_ALLOC:
            live.append(simulator.malloc(work.requests[value][0]))
        else:
            simulator.free(live[value])
    return int(simulator.peak_backend_allocated_bytes)


def timed(function: Any, runs: int) -> tuple[float, int]:
    times = []
    for _ in range(runs):
        start = time.process_time()
        found = function()
        times.append(time.process_time() - start)
    return min(times), found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    other, work = load(arguments.other), training(arguments.steps)
    print(f"CPython {platform.python_version()}, {platform.machine()}, one core, {work.num_events:,} events\n")
    print("| settings | ullage, events/s | other, events/s | ratio | peak reserved, ullage | other |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    equal = True
    for conf, split in (("", None), ("max_split_size_mb:128", 128)):
        settings = parse_settings(conf)
        ours, peak = timed(lambda settings=settings: run_workload(work, settings).peak_reserved_bytes, arguments.runs)
        theirs, their_peak = timed(lambda split=split: run_other(other, work, split), 2)
        equal = equal and peak == their_peak
        print(
            f"| {conf or 'defaults'} | {work.num_events / ours / 1e6:.2f} M | {work.num_events / theirs / 1e6:.3f} M | "
            f"{theirs / ours:.1f} | {peak:,} | {their_peak:,} |"
        )
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
