"""What a stack says about an allocation: which phase of the work made it, and on which line of whose code.

Each distinct frame and each distinct stack is judged once, however many events share it. A stack alone never says
"gradient" or "activation": that takes the life of the block as well (see :mod:`ullage.observe.attribution`).
Source of the names: pytorch@2.13.0:torch/nn/modules/module.py (_call_impl), torch/optim/optimizer.py
(profile_hook_step), torch/utils/checkpoint.py, torch/csrc/autograd/engine.cpp (evaluate_function),
torch/csrc/distributed/c10d/reducer.cpp, torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py;
vllm@0.33.0:vllm/v1/worker/gpu_model_runner.py (initialize_kv_cache), sglang@0.5.23:sglang/srt/mem_cache/memory_pool.py,
transformers@5.23.0:cache_utils.py.
"""

from __future__ import annotations

import re
from functools import lru_cache

from ullage.allocator.stacks import NO_STACK, Frame, Stacks

#: What a stack speaks of.
(
    SILENT, OTHER, FORWARD, BACKWARD, OPTIMIZER, RECOMPUTE, LOAD, KV_CACHE, WORKSPACE, COLLECTIVE, REDUCER, BUILD,
) = range(12)  # fmt: skip
#: Signs that say enough by themselves, the strongest first.
_ALONE = (KV_CACHE, WORKSPACE, LOAD, REDUCER, COLLECTIVE)
_PHASES = (FORWARD, BACKWARD, OPTIMIZER)

_LIBRARIES = re.compile(
    r"(?:^|/)(?:site-packages|dist-packages)/|/lib/python3[.\d]*/|^<frozen|(?:^|/)torch/(?:nn|optim|utils|autograd|_)|"
    r"(?:^|/)torchinductor_|(?:^|/)torch/\w+\.py$"
)
_TORCH = re.compile(r"(?:^|/)torch/")
_LOADERS = frozenset(
    (
        "from_pretrained", "load_state_dict", "_load_pretrained_model", "_load_state_dict_into_model", "load_weights",
        "weight_loader", "create_weights", "process_weights_after_loading", "initialize_model", "_initialize_model",
        "set_module_tensor_to_device", "load_model", "reset_parameters", "_move_model_to_device",
    )
)  # fmt: skip
_MOVERS = frozenset(("_apply", "to", "cuda", "to_empty", "half", "bfloat16", "float", "npu"))
_KV_NAMES = re.compile(r"(?:alloc|init|create)\w*kv_?cache|kv_?cache\w*(?:alloc|init|create)|_create_kv_buffers", re.I)
_KV_FILES = re.compile(
    r"transformers/cache_utils\.py$|sglang/srt/mem_cache/\w+\.py$|/cache_engine\.py$|/kv_cache\w*\.py$"
)
_WORKSPACES = re.compile(r"workspace|CUDABlasHandle|CuFFTConfig", re.I)
_COLLECTIVES = re.compile(
    r"torch/distributed/(?:fsdp/|_functional_collectives|distributed_c10d)|deepspeed/runtime/(?:zero|comm)/|"
    r"megatron/core/tensor_parallel/mappings"
)
_OPTIMIZERS = re.compile(r"torch/optim/(?!lr_scheduler)|apex/optimizers/|bitsandbytes/optim/|optimizers?/\w+\.py$")
_NODE = re.compile(r"torch::autograd::generated::(\w+)::apply|torch::autograd::(AccumulateGrad|CopySlices)\b")


@lru_cache(maxsize=1 << 16)
def _sign(frame: Frame) -> int:
    """Return what one frame says, :data:`SILENT` when nothing."""
    name, file, _line = frame
    return _python_sign(name, file) if file.endswith(".py") or file.startswith("<") else _native_sign(name)


def _native_sign(name: str) -> int:
    if "torch::autograd::Engine::" in name or "torch::autograd::Node::operator()" in name:
        return BACKWARD
    if "c10d::Reducer" in name:
        return REDUCER
    if "c10d::" in name or "ProcessGroupNCCL" in name:
        return COLLECTIVE
    return WORKSPACE if _WORKSPACES.search(name) else SILENT


def _python_sign(name: str, file: str) -> int:
    if _KV_NAMES.search(name) or _KV_FILES.search(file):
        return KV_CACHE
    if file.endswith("torch/utils/checkpoint.py") and name in ("recompute_fn", "unpack_hook", "backward", "unpack"):
        return RECOMPUTE
    in_modules = "torch/nn/modules/" in file
    if (
        name in _LOADERS
        or file.endswith("torch/serialization.py")
        or (in_modules and (name == "__init__" or (name in _MOVERS and file.endswith("/module.py"))))
    ):
        return LOAD
    if _OPTIMIZERS.search(file) or (name == "step" and "optim" in file.lower()):
        return OPTIMIZER
    if name == "backward" or name == "_engine_run_backward":
        return BACKWARD
    if _COLLECTIVES.search(file):
        return COLLECTIVE
    if name == "forward" or file.endswith(("torch/nn/functional.py", "torch/nn/modules/module.py")):
        return FORWARD
    if name == "__init__":
        return BUILD
    return WORKSPACE if "workspace" in name else SILENT


class StackReader:
    """Reads each stack of a table once."""

    def __init__(self, stacks: Stacks) -> None:
        self.stacks = stacks
        self._signs: list[int] = []
        self._kinds: dict[int, int] = {}

    def kinds(self) -> bytearray:
        """Return what each stack speaks of, by its number."""
        return bytearray(map(self.kind, range(len(self.stacks))))

    def kind(self, number: int) -> int:
        """Return what a stack speaks of: the innermost phase, unless a stronger sign stands beside it."""
        found = self._kinds.get(number)
        if found is None:
            found = self._kinds[number] = self._judge(number)
        return found

    def _judge(self, number: int) -> int:
        if number == NO_STACK:
            return SILENT
        frames = self.stacks.frames
        while len(self._signs) < len(frames):
            self._signs.append(_sign(frames[len(self._signs)]))
        signs = [self._signs[frame] for frame in self.stacks.row(number)]
        spoken = set(signs)
        for strong in _ALONE:
            if strong in spoken:
                return strong
        phase = next((sign for sign in signs if sign in _PHASES), OTHER)
        if phase == FORWARD and (RECOMPUTE in spoken or BACKWARD in spoken):
            return RECOMPUTE
        if phase == OTHER and RECOMPUTE in spoken:
            return BACKWARD
        if phase == OTHER and BUILD in spoken:
            return BUILD
        return phase

    def has_native_frames(self) -> bool:
        """Tell whether C++ frames were recorded: without them the threads of autograd have no frames at all."""
        return any("::" in frame[0] and not frame[1].endswith(".py") for frame in self.stacks.frames)

    def line(self, number: int) -> str:
        """Return the line of the user's code that asked: the innermost outside libraries, else the best there is."""
        best = self._innermost(number)
        if best is not None:
            name, file, line = best
            return f"{name} ({file}:{line})"
        return self.node(number) or ("C++" if number != NO_STACK else "")

    def _innermost(self, number: int) -> Frame | None:
        fallback = last = None
        for frame in self.stacks.stack(number):
            file = frame[1]
            if not file.endswith(".py"):
                continue
            if not _LIBRARIES.search(file):
                return frame
            last = last or frame
            if fallback is None and not _TORCH.search(file):
                fallback = frame
        return fallback or last

    def node(self, number: int) -> str:
        """Return the node of the autograd graph that asked, empty when none is named."""
        for name, _file, _line in self.stacks.stack(number):
            found = _NODE.search(name)
            if found:
                return f"{found.group(1) or found.group(2)} (autograd)"
        return ""

    def module(self, number: int, *, depth: int = 3) -> str:
        """Return the chain of modules that asked, the outermost first: the last ``depth`` calls of ``forward``."""
        chain = [
            f"{frame[1].rsplit('/', 1)[-1]}:{frame[2]}"
            for frame in self.stacks.stack(number)
            if frame[0] == "forward" and frame[1].endswith(".py")
        ]
        return " > ".join(reversed(chain[:depth]))

    def frames(self, number: int, *, limit: int = 8) -> list[str]:
        """Return the Python frames of a stack, the innermost first."""
        python = (frame for frame in self.stacks.stack(number) if frame[1].endswith(".py"))
        return [f"{name} ({file}:{line})" for (name, file, line), _at in zip(python, range(limit), strict=False)]
