"""Messages of programs that are seen less often, and bare words without any size.

Source: the messages themselves, as published (TensorFlow, XLA:TPU, PaddlePaddle, MLX, bitsandbytes, Vulkan and Metal in
llama.cpp, vLLM's sampler warm-up, DeepSpeed's and torchtitan's warnings).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ullage.observe.oom import SIZE, Fact, excerpt, flatten, read_size

WORDS = (
    "OOM when allocating tensor",
    "ran out of memory trying to allocate",
    "Ran out of memory in memory space",
    "Failed to allocate request for",
    "Cannot allocate",
    "Attempting to allocate",
    "Make sure you have enough GPU RAM",
    "ErrorOutOfDeviceMemory",
    "Device memory allocation of size",
    "failed to allocate buffer",
    "warming up sampler",
    "allocator cache flushes",
    "memory allocation retries",
    "OutOfMemoryError",
)
_G = r"\d[\d.]{0,20}\s{0,8}[KMGT]i?B?"
#: (kind, framework, role, words); the group is the amount asked for.
_RULES: tuple[tuple[str, str, str, re.Pattern[str]], ...] = (
    ("xla_oom", "tensorflow", "", re.compile(r"OOM when allocating tensor with shape\[[\d,]{0,24}\]")),
    ("xla_oom", "tensorflow", "", re.compile(rf"Allocator \(\w+\) ran out of memory trying to allocate ({_G})")),
    ("xla_oom", "jax/xla", "", re.compile(rf"Failed to allocate request for ({_G})")),
    (
        "xla_oom",
        "jax/xla",
        "",
        re.compile(rf"Ran out of memory in memory space \w+\W+Used ({_G}) of {_G} \w+"),
    ),
    ("buffer_oom", "paddle", "", re.compile(rf"Cannot allocate ({_G}) memory on GPU \d{{1,20}}")),
    ("buffer_oom", "mlx", "", re.compile(r"Attempting to allocate (\d{1,20} bytes) which is greater")),
    ("buffer_oom", "bitsandbytes", "quantised load", re.compile(r"Make sure you have enough GPU RAM")),
    ("buffer_oom", "llama.cpp", "", re.compile(r"Device memory allocation of size (\d{1,20}) failed")),
    ("buffer_oom", "llama.cpp", "", re.compile(rf"failed to allocate buffer, size =\s{{0,8}}({SIZE})")),
    ("buffer_oom", "llama.cpp", "", re.compile(r"ErrorOutOfDeviceMemory")),
    (
        "device_oom",
        "vllm",
        "",
        re.compile(r"out of memory occurred when warming up sampler with \d{1,20} dummy requests"),
    ),
    ("pressure", "deepspeed", "", re.compile(r"\d{1,20} pytorch allocator cache flushes since last step")),
    ("pressure", "torchtitan", "", re.compile(r"\d{1,20} CUDA memory allocation retries")),
    (
        "device_oom",
        "pytorch",
        "",
        re.compile(r"(?:CUDA|HIP|NPU|XPU) out of memory(?! encountered)|OutOfMemoryError(?!: Task)"),
    ),
)


def match_others(window: str) -> Iterator[Fact]:
    """Yield at most one message of each rule; a bare word counts only where nothing else does."""
    text = flatten(window)
    found = False
    for kind, framework, role, pattern in _RULES:
        match = pattern.search(text)
        if match is None or (found and framework == "pytorch") or "ray.exceptions" in text:
            continue
        found = True
        amount = match.group(1) if pattern.groups else None
        asked = (("requested", read_size(amount, "bytes")),) if amount else ()
        bare = framework == "pytorch"
        yield Fact(
            kind=kind,
            framework=framework,
            sizes=asked,
            details=(("role", role),) if role else (),
            text=excerpt(text[max(0, match.start() - 40) : match.end() + 160]),
            partial=bare,
        )
