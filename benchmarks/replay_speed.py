"""Events per second of the allocator simulator, on made-up training work and on recordings.

    python benchmarks/replay_speed.py [--steps 20] [SNAPSHOT ...]

One core, processor time, the best of several runs; reading the file, undoing it and preparing the work are timed
apart. Events are those of a recording: an allocation is one, a free is two (requested, completed).
"""

from __future__ import annotations

import argparse
import platform
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ullage.allocator.events import Workload, WorkloadBuilder
from ullage.allocator.replay import recover_beginning, to_workload
from ullage.allocator.run import run_workload
from ullage.allocator.session import _check
from ullage.allocator.settings import parse_settings
from ullage.observe.snapshot import read_snapshot

MIB = 2**20
CONFS = ("", "expandable_segments:True", "max_split_size_mb:128", "roundup_power2_divisions:8")


def training(num_steps: int, *, num_layers: int = 48, seed: int = 1) -> Workload:
    """Return work like a transformer's: parameters once, activations kept to the backward, many short temporaries."""
    draw = random.Random(seed)
    builder = WorkloadBuilder()
    num_events = 0
    for _ in range(num_layers * 9):
        builder.allocate(draw.choice([4096 * 4, 32 * MIB, 88 * MIB]))
        num_events += 1
    for _ in range(num_steps):
        length = draw.choice([1, 2, 3, 4])
        kept = []
        for _ in range(num_layers):
            for size in (16 * MIB, 48 * MIB, 16 * MIB, 43 * MIB, 512 * 1024, 4096):
                temporary = builder.allocate(size * length // 2 + 512 * draw.randrange(8))
                kept.append(builder.allocate(size * length))
                builder.free(temporary)
                num_events += 4
        while kept:
            gradient = builder.allocate(24 * MIB * length)
            builder.free(kept.pop())
            builder.free(gradient)
            num_events += 5
    builder.work.num_events = num_events
    return builder.work


def best(function: Callable[[], object], runs: int) -> float:
    times = []
    for _ in range(runs):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def row(name: str, conf: str, work: Workload, runs: int) -> None:
    settings = parse_settings(conf)
    seconds = best(lambda: run_workload(work, settings), runs)
    outcome = run_workload(work, settings)
    print(
        f"| {name} | {conf or 'defaults'} | {work.num_events:,} | {work.num_events / seconds / 1e6:.2f} M | "
        f"{outcome.peak_reserved_bytes / 2**30:.3f} GiB |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("snapshots", nargs="*", type=Path)
    arguments = parser.parse_args()
    print(f"CPython {platform.python_version()}, {platform.machine()}, one core\n")
    print("| work | settings | events | events per second | peak reserved |\n| --- | --- | --- | --- | --- |")
    work = training(arguments.steps)
    for conf in CONFS:
        row("training steps", conf, work, arguments.runs)
    for path in arguments.snapshots:
        snapshot = read_snapshot(path)
        reading = best(lambda path=path: read_snapshot(path), arguments.runs)
        for device, memory in snapshot.devices.items():
            if len(memory.recording):
                checked = _check(snapshot, memory)
                row(f"{path.name[:24]} ({device})", checked.settings.text, checked.work, arguments.runs)
                undo = best(
                    lambda memory=memory, checked=checked: to_workload(
                        memory.recording,
                        recover_beginning(memory.segments, memory.recording, checked.settings).segments,
                    ),
                    arguments.runs,
                )
                print(f"|  | (read {reading:.3f} s, undo and prepare {undo:.3f} s) | | | |")
    print(f"\npeak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
