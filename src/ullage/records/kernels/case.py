"""A kernel record as its script sees it: sizes, provider, version, device."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ullage.account.kernels.device import Device
from ullage.account.kernels.tape import Tape, Tensor
from ullage.i18n import _
from ullage.records import words
from ullage.records.compare import NotComparableError
from ullage.records.schema import Record
from ullage.units import MiB, canonical_dtype, dtype_bytes

#: Streaming multiprocessors. Source: NVIDIA A100, H100, B200 and GeForce RTX data sheets.
MULTIPROCESSORS = {"A100": 108, "H100": 132, "H200": 132, "B200": 148, "RTX3090": 82, "RTX4090": 128}
#: Threads that a multiprocessor holds. Source: CUDA C++ Programming Guide 12.8, technical specifications per compute
#: capability (8.6 and 8.9: 1536; 8.0, 9.0 and 10.0: 2048).
THREADS = {"RTX3090": 1536, "RTX4090": 1536}
#: One cuBLAS workspace: 32 MiB from compute capability 9.0 on.
#: Source: torch@2.4.1:aten/src/ATen/cuda/CublasHandlePool.cpp:parseChosenWorkspaceSize.
SMALL_WORKSPACE, LARGE_WORKSPACE = 8 * MiB + 128 * 1024, 32 * MiB
#: Vocabularies of the models that benchmark tables name. Source: liger-kernel@0.8.0:benchmark/scripts/
#: benchmark_model_configs.py (the models' own configs).
VOCABULARIES = {
    "llama_2_7b": 32000,
    "llama_3_8b": 128256,
    "qwen2.5_7b": 152064,
    "qwen2.5_14b": 152064,
    "qwen2.5_72b": 152064,
    "deepseek_v2_lite": 102400,
    "deepseek_v3": 129280,
}
#: Largest size, and most parts of one, that a script is run with: beyond them a record is a mistake.
MOST_VALUES, MOST_PARTS = 1 << 40, 4096
#: From this version on the scripts make the gradient anew for every iteration and keep the graph; the loss's gradient
#: is not 1. Source: liger-kernel@0.8.0:benchmark/scripts/utils.py:run_memory_benchmark.
SHARED_SCRIPTS = (0, 8)


class Case:
    """What a record says, by the names the scripts use."""

    def __init__(self, record: Record) -> None:
        params = record.job.get("params")
        self.params: dict[str, Any] = params if isinstance(params, dict) else {}
        self.record = record
        self.kernel = str(record.job.get("kernel"))
        self.provider = str(record.job.get("provider"))
        self.mode = str(record.job.get("mode") or "full")
        self.gpu = str(record.job.get("gpu"))
        found = re.search(r"(\d+(?:\.\d+)+)", str(record.job.get("version") or ""))
        self.version = tuple(int(part) for part in found.group(1).split(".")) if found else SHARED_SCRIPTS

    @property
    def liger(self) -> bool:
        """Whether the kernel is Liger's, in whichever language."""
        return self.provider.startswith("liger")

    @property
    def cutile(self) -> bool:
        """Whether it is the cuTile kernel."""
        return "cutile" in self.provider

    @property
    def compiled(self) -> bool:
        """Whether the module went through ``torch.compile``."""
        return self.provider == "torch_compile"

    @property
    def shared(self) -> bool:
        """Whether the shared scripts measured it (see :data:`SHARED_SCRIPTS`)."""
        return self.version >= SHARED_SCRIPTS

    def size(self, key: str) -> int:
        """Return a size that the record must give."""
        found = words.integer(self.params, key, self.record.where)
        if not found:
            raise NotComparableError(_("{key} is not given").format(key=key))
        if found > MOST_VALUES:
            raise NotComparableError(_("{key} is too large").format(key=key))
        return int(found)

    def optional(self, key: str) -> int:
        """Return a size, 0 where it is not given."""
        return self.size(key) if self.params.get(key) else 0

    def parts(self, key: str, count: int | None = None) -> int:
        """Return how many parts a script runs through one after another."""
        found = self.size(key) if count is None else count
        if found > MOST_PARTS:
            raise NotComparableError(_("{key} is too large").format(key=key))
        return found

    def width(self, default: str = "bf16") -> int:
        """Return the bytes of a value."""
        return int(dtype_bytes(canonical_dtype(str(self.params.get("dtype") or default))))

    @property
    def tokens(self) -> int:
        """The rows a kernel works on: tokens, rows, or batch x sequence."""
        for key in ("tokens", "rows"):
            if self.params.get(key):
                return self.size(key)
        return self.size("seq") * (words.integer(self.params, "batch", self.record.where) or 1)

    @property
    def vocab(self) -> int:
        """The vocabulary, of the model where one is named."""
        return VOCABULARIES.get(str(self.params.get("model"))) or self.size("vocab")

    @property
    def device(self) -> Device:
        """The GPU, as far as kernels ask for it."""
        name = next((name for name in MULTIPROCESSORS if self.gpu.startswith(name)), "")
        return Device(
            num_multiprocessors=MULTIPROCESSORS.get(name, 0), threads_per_multiprocessor=THREADS.get(name, 2048)
        )

    @property
    def workspace(self) -> int:
        """Bytes of one cuBLAS workspace."""
        return LARGE_WORKSPACE if self.gpu.startswith(("H100", "H200", "B200")) else SMALL_WORKSPACE

    def not_counted(self) -> NotComparableError:
        """Return the error for a provider that has no program."""
        text = _("no count of {kernel} by {provider}")
        return NotComparableError(text.format(kernel=self.kernel, provider=self.provider))


@dataclass
class Trial:
    """One iteration of a script, and what stands beside it.

    Attributes:
        forward: makes the outputs that are differentiated.
        given: gradients that were made once, before; None: made like the outputs in every iteration.
        into: tensors whose gradients are asked for (``torch.autograd.grad``); None: leaves accumulate.
        retain_graph: as given to the backward pass.
        summed: the output's sum is differentiated: a gradient of one value, seen as the whole.
        cleared: leaves whose gradient is dropped before every iteration.
        beside: what stays alive all the time: cuBLAS workspaces, indices, other modules.
        holds: variables hold outputs and gradients of an iteration until the next one replaces them.
        always_full: the script runs forward and backward whatever mode the row names.
        high_bytes: how much more it may be than counted.
    """

    forward: Callable[[], Tensor | Sequence[Tensor]]
    given: Sequence[Tensor] | None = None
    into: Sequence[Tensor] | None = None
    retain_graph: bool = True
    summed: bool = False
    cleared: Sequence[Tensor] = ()
    beside: list[Tensor] = field(default_factory=list)
    holds: bool = False
    held: list[Sequence[Tensor]] = field(default_factory=lambda: [(), ()])
    always_full: bool = False
    high_bytes: int = 0

    def run(self, tape: Tape) -> None:
        """Forward and backward."""
        for leaf in self.cleared:
            leaf.grad = None
        outputs = self.outputs()
        if not self.holds:
            self.differentiate(tape, outputs)
            return
        self.held[0] = outputs
        self.held[1] = self.gradients(tape, outputs)
        self.differentiate(tape, outputs, self.held[1])

    def outputs(self) -> Sequence[Tensor]:
        """Forward."""
        made = self.forward()
        return [made] if isinstance(made, Tensor) else made

    def differentiate(self, tape: Tape, outputs: Sequence[Tensor], grads: Sequence[Tensor] | None = None) -> None:
        """Backward."""
        grads = grads or self.given or self.gradients(tape, outputs)
        tape.run_backward_all(outputs, grads, retain_graph=self.retain_graph, into=self.into)

    def gradients(self, tape: Tape, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Make gradients like the outputs."""
        if self.summed:
            return [Tensor(tape.empty(1, out.width).storage, out.num_elements, out.width) for out in outputs]
        return [tape.empty(out.num_elements, out.width) for out in outputs]


#: Iterations after which nothing changes: the first makes the leaves' gradients, the second adds to them.
ITERATIONS = 3


def peak_bytes(tape: Tape, trial: Trial, mode: str) -> int:
    """Return the peak of a script's steady iteration.

    Source: liger-kernel@0.8.0:benchmark/scripts/utils.py:_test_memory, run_memory_benchmark: the peak statistics are
        reset before each of ten iterations, whose median is published; backward mode holds one graph.
    """
    if trial.always_full:
        mode = "full"
    if mode == "backward":
        outputs = trial.outputs()
        grads = trial.given or trial.gradients(tape, outputs)
        trial.retain_graph = True
        for _index in range(ITERATIONS):
            tape.memory.reset()
            trial.differentiate(tape, outputs, grads)
        return tape.memory.peak
    for _index in range(ITERATIONS):
        tape.memory.reset()
        if mode == "forward":
            trial.outputs()
        else:
            trial.run(tape)
    return tape.memory.peak
