"""Write a made-up memory snapshot of any size, as a real one would look.

    python benchmarks/make_snapshot.py OUT.pickle [--events 5000000]

A transformer is trained: parameters and optimizer states once, then steps of forward (activations kept, temporaries
freed), backward (gradients, buckets that a second stream uses) and optimizer, with sequences of different lengths; each
event has the stack of the module and phase it comes from. The allocator is the simulator itself, so that a replay has
to come out exactly. Stacks are written one list per event, as PyTorch does; 5 million events are about 1 GB.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

from ullage.allocator.events import Workload, WorkloadBuilder
from ullage.allocator.export import record_workload
from ullage.allocator.settings import parse_settings
from ullage.allocator.stacks import Frame
from ullage.observe.write_snapshot import write_snapshot

MIB = 2**20
NUM_LAYERS, NUM_FRAMES = 32, 48
OPERATORS = ("q_proj", "k_proj", "v_proj", "attention", "o_proj", "gate", "up", "down", "norm", "residual")
SIZES = (16, 4, 4, 16, 16, 43, 43, 16, 16, 16)
COMMUNICATION_STREAM = 94_532_000_432


def frames_of(phase: str, layer: int, operator: str) -> list[Frame]:
    """Return a stack as deep as real ones: C++ at both ends, the model's Python in between."""
    found = [(f"torch::unwind::frame{at}()", "??", 0) for at in range(8)]
    found += [(f"at::{operator}", "??", 0), ("forward", f"model/{operator}.py", 20 + layer % 3)]
    found += [("_call_impl", "torch/nn/modules/module.py", 1762 - at) for at in range(4)]
    found += [
        ("forward", "model/layer.py", 100 + layer),
        (phase, "train.py", 60 + len(phase)),
        ("main", "train.py", 99),
    ]
    found += [(f"_PyEval{at}", "??", 0) for at in range(NUM_FRAMES - len(found))]
    return found


class Training:
    """Steps of training, written down as work until there are enough events."""

    def __init__(self, num_events: int, seed: int = 1) -> None:
        self.builder, self.draw, self.wanted = WorkloadBuilder(annotated=True), random.Random(seed), num_events
        self._known: dict[tuple[str, int, str], int] = {}
        self._live: list[int] = []
        self._num_events = 0

    def build(self) -> Workload:
        """Return the work."""
        for layer in range(NUM_LAYERS):
            for operator, size in zip(OPERATORS, SIZES, strict=True):
                self.at("init", layer, operator)
                for _copy in range(3):
                    self.allocate(size * MIB)
        while self._num_events < self.wanted:
            self.step(self.draw.choice([1, 2, 3, 4]))
        return self.builder.work

    def at(self, phase: str, layer: int, operator: str) -> None:
        key = (phase, layer, operator)
        if key not in self._known:
            self._known[key] = self.builder.known_stacks.number(frames_of(phase, layer, operator))
        self.builder.stack = self._known[key]
        self.builder.time_us = 1_748_730_219_000_000 + 3 * self._num_events

    def allocate(self, size: int, stream: int = 0) -> int:
        self._num_events += 1
        return self.builder.allocate(size, stream=stream)

    def free(self, owner: int) -> None:
        self._num_events += 2
        self.builder.free(owner)

    def step(self, length: int) -> None:
        """One step: forward, backward, optimizer."""
        kept: list[tuple[int, int, str]] = []
        for layer in range(NUM_LAYERS):
            for operator, size in zip(OPERATORS, SIZES, strict=True):
                self.at("forward", layer, operator)
                temporary = self.allocate(size * length * MIB // 2 + 512 * self.draw.randrange(64))
                kept.append((self.allocate(size * length * MIB // 4), layer, operator))
                small = self.allocate(4096 * length + 512 * self.draw.randrange(4))
                self.free(temporary)
                self.free(small)
        waiting: list[int] = []
        while kept:
            owner, layer, operator = kept.pop()
            self.at("backward", layer, operator)
            gradient = self.allocate(24 * length * MIB // 4)
            self.free(owner)
            bucket = self.allocate(MIB * 25 // 10, COMMUNICATION_STREAM)
            self.builder.request_free(bucket)
            waiting.append(bucket)
            self._num_events += 1
            self.free(gradient)
            if len(waiting) > 4:
                self.builder.complete_free(waiting.pop(0))
                self._num_events += 1
        for bucket in waiting:
            self.builder.complete_free(bucket)
            self._num_events += 1
        for layer in range(NUM_LAYERS):
            self.at("optimizer", layer, "norm")
            self.free(self.allocate(43 * MIB))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--events", type=int, default=5_000_000)
    parser.add_argument("--settings", default="")
    arguments = parser.parse_args()
    recorded = record_workload(Training(arguments.events).build(), parse_settings(arguments.settings))
    write_snapshot(arguments.out, {0: recorded}, share_stacks=False)
    size = arguments.out.stat().st_size
    print(f"{len(recorded.recording):,} events, {size:,} bytes, peak {recorded.outcome.peak_reserved_bytes:,} reserved")
    return 0


if __name__ == "__main__":
    sys.exit(main())
