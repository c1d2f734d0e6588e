"""Training runs that never were, written down as snapshots whose every block has a known purpose."""

from __future__ import annotations

from pathlib import Path

from ullage.allocator.events import WorkloadBuilder
from ullage.allocator.export import export_snapshot
from ullage.allocator.settings import AllocatorSettings, parse_settings

MIB = 2**20
MAIN = ("main", "/job/train.py", 99)
MODULE = ("_call_impl", "/lib/python3.11/site-packages/torch/nn/modules/module.py", 1762)
ENGINE = ("torch::autograd::Engine::evaluate_function(...)", "??", 0)
STACKS = {
    "load": [("convert", "/x/torch/nn/modules/module.py", 1300), ("to", "/x/torch/nn/modules/module.py", 9), MAIN],
    "forward": [("forward", "/job/model.py", 20), MODULE, ("forward", "/job/model.py", 50), MODULE, MAIN],
    "attention": [("forward", "/job/model.py", 31), MODULE, ("forward", "/job/model.py", 50), MODULE, MAIN],
    "backward": [("torch::autograd::generated::MmBackward0::apply(...)", "??", 0), ENGINE],
    "optimizer": [("_init_group", "/x/torch/optim/adamw.py", 150), ("step", "/x/torch/optim/adamw.py", 9), MAIN],
    "leak": [("log", "/job/metrics.py", 12), MAIN],
    "silent": [],
    "kv": [("_allocate_kv_cache_tensors", "/x/vllm/v1/worker/gpu_model_runner.py", 5), MAIN],
}  # fmt: skip


class Writer:
    """Writes allocations with stacks by their names."""

    def __init__(self) -> None:
        self.builder = WorkloadBuilder(annotated=True)

    def allocate(self, stack: str, size: int) -> int:
        self.builder.stack = self.builder.known_stacks.number(STACKS[stack])
        self.builder.time_us += 1000
        return self.builder.allocate(size)

    def free(self, *owners: int) -> None:
        for owner in owners:
            self.builder.stack = self.builder.known_stacks.number([])
            self.builder.time_us += 10
            self.builder.free(owner)

    def save(self, path: Path, *, settings: str = "", capacity_bytes: int | None = None) -> Path:
        chosen = parse_settings(settings) if settings else AllocatorSettings()
        export_snapshot(path, self.builder.work, chosen, capacity_bytes=capacity_bytes)
        return path


def training(steps: int = 6, *, leak: int = 0, python_only: bool = False, in_pieces: bool = False) -> Writer:
    """Return a run with 4 weights of 8 MiB, states of twice that, and activations of 10 MiB for each of 4 layers."""
    writer = Writer()
    back = "silent" if python_only else "backward"
    for _layer in range(4):
        writer.allocate("load", 8 * MIB)
    for step in range(steps):
        activations = []
        for layer in range(4):
            temporary = writer.allocate("forward", 3 * MIB)
            activations.append(writer.allocate("attention" if layer == 2 else "forward", 10 * MIB))
            writer.free(temporary)
        if leak:
            writer.allocate("leak", leak)
        gradients = []
        for activation in reversed(activations):
            temporary = writer.allocate(back, 10 * MIB)
            gradients.append(writer.allocate(back, 8 * MIB))
            writer.free(temporary, activation)
        for _gradient in gradients:
            if step == 0:
                writer.allocate("optimizer", 8 * MIB)
                writer.allocate("optimizer", 8 * MIB)
            writer.free(writer.allocate("optimizer", 5 * MIB))
        writer.free(*gradients)
    return writer
