"""The job of the fault tests: two ranks train under torchrun and the guard, and real faults hit them at random moments.

The weights count the samples: each use of a sample adds exactly one to its weight, so that a sample that is lost, or
used twice, shows in the result. A fault fires once in the life of a run; a marker file remembers it.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import threading
import time
from pathlib import Path

NUM_STEPS, BATCH, NUM_RANKS, EVERY = 12, 8, 2, 3
NUM_SAMPLES = NUM_STEPS * BATCH * NUM_RANKS
PER_SAMPLE = 256 << 20
#: What each fault is expected to end in: the run goes on, or it stops for a clear reason.
KINDS = (
    "oom_forward", "oom_backward", "oom_optimizer", "oom_loader", "kill_rank", "kill_all", "kill_launcher", "kill_late",
    "disk_full", "corrupt_plan", "stuck",
)  # fmt: skip
STOPS = {"oom_hopeless": 3, "crash": 1}


def samples(step, rank):
    """Return the samples of a rank's step: a fixed order over all of them, each used once."""
    order = random.Random(20).sample(range(NUM_SAMPLES), NUM_SAMPLES)
    start = (step * NUM_RANKS + rank) * BATCH
    return order[start : start + BATCH]


def allow(more_bytes):
    """Let this process's memory grow by so much and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + more_bytes, resource.RLIM_INFINITY))


def unlimited():
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


class Faults:
    """The faults of this run that have not fired yet."""

    def __init__(self, folder, rank):
        self.folder, self.rank = folder, rank
        self.planned = json.loads((folder / "faults.json").read_text())
        self.where = "none"

    def due(self, step, *kinds):
        """Yield the faults of this step and rank, once each."""
        for number, fault in enumerate(self.planned):
            marker = self.folder / f"fired-{number}-{self.rank}"
            everybody = fault["kind"] == "kill_all"
            if fault["kind"] not in kinds or fault["step"] != step or marker.exists():
                continue
            if everybody or fault["rank"] == self.rank:
                marker.touch()
                print(f"fault {number}: {fault['kind']} on rank {self.rank} at step {step}", flush=True)
                yield fault

    def before(self, step, micro_batch):
        for _fault in self.due(step, "kill_rank", "kill_all"):
            os.kill(os.getpid(), signal.SIGKILL)
        for _fault in self.due(step, "kill_launcher"):
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)
        for fault in self.due(step, "kill_late"):
            threading.Timer(fault["delay"], os.kill, (os.getpid(), signal.SIGKILL)).start()
        for _fault in self.due(step, "stuck"):
            time.sleep(3600)
        for _fault in self.due(step, "crash"):
            raise ValueError("a layer that does not exist")
        for _fault in self.due(step, "corrupt_plan"):
            Path(os.environ["ULLAGE_PLAN_STORE"]).write_text('{"ullage_plan": 1, "knobs": {"micro_')
            os.kill(os.getpid(), signal.SIGKILL)
        if micro_batch > 1:
            for fault in self.due(step, "oom_forward", "oom_backward"):
                self.where = fault["kind"].removeprefix("oom_")
                allow(micro_batch // 2 * PER_SAMPLE + PER_SAMPLE // 2)
        for fault in self.planned:
            if fault["kind"] == "oom_hopeless" and step >= fault["step"]:  # in every attempt
                (self.folder / f"fired-{self.planned.index(fault)}-{self.rank}").touch()
                self.where = "forward"
                allow(PER_SAMPLE // 2)


class Beating:
    """Touches the heartbeat while torch is loaded and the ranks meet: on a busy machine that takes long, silently."""

    def __init__(self):
        self.path = Path(os.environ.get("ULLAGE_HEARTBEAT", "."), f"rank{os.environ['RANK']}")
        self.done = threading.Event()
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        while not self.done.wait(1.0):
            self.path.touch()


def main(folder):
    start = Beating()
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from ullage.guard import Checkpoint, Guard

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    faults = Faults(folder, rank)

    class Work(torch.autograd.Function):
        @staticmethod
        def forward(ctx, inputs):
            if faults.where == "forward":
                torch.empty(inputs.shape[0], PER_SAMPLE, dtype=torch.uint8)
            return inputs.clone()

        @staticmethod
        def backward(ctx, gradient):
            if faults.where == "backward":
                torch.empty(gradient.shape[0], PER_SAMPLE, dtype=torch.uint8)
            return gradient

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.uses = nn.Parameter(torch.zeros(NUM_SAMPLES, dtype=torch.float64))

        def forward(self, numbers):
            return -Work.apply(self.uses[numbers]).mean()

    class Sgd(torch.optim.SGD):
        def step(self, closure=None):
            for _fault in faults.due(guard.steps, "oom_optimizer"):
                allow(PER_SAMPLE)
                try:
                    torch.empty(4 * PER_SAMPLE, dtype=torch.uint8)
                finally:
                    unlimited()
            super().step(closure)

    class Watched(Checkpoint):
        def save(self, votes, step, parts):
            full = list(faults.due(step - 1 - (step - 1) % EVERY, "disk_full"))
            if full:
                resource.setrlimit(resource.RLIMIT_FSIZE, (512, resource.RLIM_INFINITY))
            try:
                return super().save(votes, step, parts)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    ledger, pending = [], []
    model = DistributedDataParallel(Counting())
    optimizer = Sgd(model.parameters(), lr=float(BATCH * NUM_RANKS))
    checkpoint = Watched(folder / "checkpoint", every=EVERY, position=lambda: {"ledger": [*ledger, *pending]})

    def rewind(position):
        ledger[:] = position["ledger"]

    in_place = json.loads((folder / "job.json").read_text())["rewind"]
    guard = Guard(
        model,
        optimizer,
        micro_batch=BATCH,
        raise_after=0,
        checkpoint=checkpoint,
        rewind=rewind if in_place else None,
    )
    position = guard.load_checkpoint()
    if position is not None:
        rewind(position)
    start.done.set()
    while guard.steps < NUM_STEPS:
        step = guard.steps
        pending[:] = samples(step, rank)
        faults.before(step, guard.micro_batch)
        for _fault in faults.due(step, "oom_loader"):
            allow(PER_SAMPLE)
            bytearray(4 * PER_SAMPLE)
        guard.step(torch.tensor(pending), model)
        unlimited()
        if guard.steps == step + 1:
            ledger += pending
        pending.clear()
        print(f"rank {rank}: step {guard.steps}", flush=True)
    result = {"uses": model.module.uses.tolist(), "ledger": ledger}
    temporary = folder / f"result-{rank}.tmp"
    temporary.write_text(json.dumps(result))
    temporary.replace(folder / f"result-{rank}.json")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
