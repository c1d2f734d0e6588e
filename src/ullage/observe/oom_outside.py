"""The words of what lies outside the frameworks' allocators: NCCL, cuBLAS, the driver, the host, and the launchers.

Source: the messages themselves, as published (NCCL alloc.h, PyTorch ProcessGroupNCCL, torchrun, Linux oom_kill, Slurm,
Kubernetes, Ray).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ullage.observe.oom import SIZE, Fact, excerpt, flatten, read_size

WORDS = (
    "NCCL WARN",
    "CUDA calloc",
    "ncclUnhandledCudaError",
    "unhandled cuda error",
    "ALLOC_FAILED",
    "CUDA error: out of memory",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "cudaErrorMemoryAllocation",
    "out of memory",
    "Out of memory",
    "oom-kill",
    "oom_kill",
    "OOMKilled",
    "SIGKILL",
    "Signals.SIGKILL",
    "Signal 9",
    "signal 9",
    "code 137",
    "exitcode: -9",
    "exitcode  : -9",
    "exit code: 137",
    "Killed",
    "allocate memory",
    "Unable to allocate",
    "MemoryError",
    "running low on memory",
    "collective operation timeout",
    "Killed process",
    "xit code",
    "xitCode",
    "xit Code",
    "bad_alloc",
    "WinError 1455",
    "insufficient memory",
    "unhandled cuda error",
    "NOT_INITIALIZED",
    "on a different rank",
    "EngineDeadError",
    "Engine core initialization failed",
    "sigquit from a child",
    "ChildFailedError",
    "NCCL watchdog",
    "Insufficient shared memory",
)
_NCCL = re.compile(
    r"NCCL WARN (?:Cuda failure (?:\d{1,20} )?'?out of memory'?"
    r"|Failed to CUDA (?:host )?(?:c|m)alloc(?: async)? (?P<requested>\d{1,20}) bytes)"
    r"|ncclUnhandledCudaError[^\n]{0,200}?out of memory|Failed to CUDA calloc(?: async)? (?P<second>\d{1,20}) bytes"
)
_LIBRARY = re.compile(r"\b(CUBLAS|CUDNN|CUSOLVER|CUSPARSE|CUFFT|CURAND)_(?:STATUS_)?ALLOC_FAILED")
_DRIVER = re.compile(
    r"(?:CUDA|HIP) error: out of memory|CUDA_ERROR_OUT_OF_MEMORY|cudaErrorMemoryAllocation|hipErrorOutOfMemory"
)
_KERNEL = re.compile(
    r"(?P<_cgroup>Memory cgroup )?(?:[Oo]ut of memory: )?Kill(?:ed)? process "
    r"(?P<_pid>\d{1,20}),? \((?P<_name>[^)]{1,64})\)"
    r"(?:[^\n]{0,40}?total-vm:(?P<virtual>\d{1,20})kB, anon-rss:(?P<anonymous>\d{1,20})kB)?"
)
_TASK_KILL = re.compile(r"oom-kill:constraint=(?P<constraint>\w+)")
_CGROUP = re.compile(r"OOMKilled|oom[-_]kill(?:ed)? event|Exceeded (?:job|step) memory limit|oom_kill_process")
_RAY = re.compile(r"running low on memory|node memory usage|ray\.exceptions\.OutOfMemoryError")
_HOST_PYTHON = re.compile(
    rf"DefaultCPUAllocator: (?:can't|not enough memory)[^\n]{{0,60}}?allocate (?P<requested>\d{{1,20}} bytes)"
    rf"|Unable to allocate (?P<_numpy>{SIZE}) for an array|\[Errno 12\] Cannot allocate memory|(?:^|\s)MemoryError\b"
    r"|std::bad_alloc|WinError 1455|ggml_aligned_malloc: insufficient memory"
)
_SHARED = re.compile(r"Insufficient shared memory \(shm\)|bus error.{0,80}shared memory", re.IGNORECASE)
_KILLED = re.compile(
    r"(?i:exit(?:ed)?[- ]?(?:with )?(?:code|status)\"?\s{0,8}[:= ]\s{0,8})(?:137|-9)\b|Signals\.SIGKILL|"
    r"Signal 9 \(SIGKILL\)|killed by signal(?: SIGKILL)?:? ?\(?9|\bSIGKILL\b|"
    r"(?m:^|: line \d{1,20}:\s{1,8}\d{1,20} )Killed\b"
)
_TIMEOUT = re.compile(
    r"\[Rank (?P<rank>\d{1,20})\] (?:Watchdog caught collective operation timeout|.{0,60}?NCCL watchdog)"
    r"|Watchdog caught collective operation timeout"
)
_LIKE_MEMORY = re.compile(
    r"(?P<_nccl>unhandled cuda error)|(?P<_library>CUBLAS|CUDNN)_STATUS_NOT_INITIALIZED|CUDNN_STATUS_INTERNAL_ERROR"
)
#: What a process says when another one failed first.
_FOLLOWS = re.compile(
    r"CUDA out of memory encountered on a different rank|EngineDeadError|Engine core initialization failed"
    r"|Received sigquit from a child process|ChildFailedError"
)
_COLLECTIVE = re.compile(r"OpType=(?P<op>\w+).{0,120}?Timeout\(ms\)=(?P<limit>\d{1,20})")


def match_outside(window: str) -> Iterator[Fact]:
    """Yield the messages of libraries, host and launchers in a window of lines."""
    text = flatten(window)
    yield from _libraries(text)
    yield from _host(text, window)
    for match in _TIMEOUT.finditer(text):
        collective = _COLLECTIVE.search(text, match.start(), match.start() + 400)
        details = (("collective", collective.group("op")),) if collective else ()
        counts = (("timeout_ms", int(collective.group("limit"))),) if collective else ()
        words = excerpt(text[match.start() : match.start() + 200])
        rank = match.group("rank") or ""
        yield Fact(kind="timeout", framework="nccl", counts=counts, details=details, rank=rank, text=words)
    if follows := _FOLLOWS.search(text):
        words = excerpt(text[follows.start() : follows.start() + 200])
        yield Fact(kind="follows", framework="", text=words)


def _libraries(text: str) -> Iterator[Fact]:
    found = list(_NCCL.finditer(text))
    if found:
        amount = next((given for match in found if (given := match.group("requested") or match.group("second"))), None)
        asked = (("requested", read_size(f"{amount} bytes")),) if amount else ()
        words = excerpt(" / ".join(match.group(0) for match in found[:3]))
        yield Fact(kind="library_oom", framework="nccl", sizes=asked, details=(("library", "NCCL"),), text=words)
    for named in _LIBRARY.finditer(text):
        library = {"CUBLAS": "cuBLAS", "CUDNN": "cuDNN"}.get(named.group(1), named.group(1).lower())
        words = excerpt(text[max(0, named.start() - 40) : named.end() + 80])
        yield Fact(kind="library_oom", framework="pytorch", details=(("library", library),), text=words)
    if (match := _LIKE_MEMORY.search(text)) and not found:
        library = "NCCL" if match.group("_nccl") else {"CUBLAS": "cuBLAS"}.get(match.group("_library") or "", "cuDNN")
        words = excerpt(text[max(0, match.start() - 40) : match.end() + 80])
        yield Fact(kind="library_odd", framework="pytorch", details=(("library", library),), text=words)
    if match := _DRIVER.search(text):
        words = excerpt(text[max(0, match.start() - 60) : match.end() + 120])
        yield Fact(kind="library_oom", framework="cuda", details=(("library", "driver"),), text=words)


def _host(text: str, window: str) -> Iterator[Fact]:
    for kill in _KERNEL.finditer(text):
        given = kill.groupdict()
        amounts = tuple((name, read_size(f"{given[name]} kB")) for name in ("virtual", "anonymous") if given[name])
        scope = "cgroup" if given["_cgroup"] or "CONSTRAINT_MEMCG" in text else "host"
        yield Fact(
            kind="host_kill",
            framework="linux",
            sizes=amounts,
            counts=(("pid", int(given["_pid"])),),
            details=(("process", given["_name"]), ("scope", scope)),
            text=excerpt(kill.group(0)),
        )
    if not _KERNEL.search(text) and (match := _TASK_KILL.search(text) or _CGROUP.search(text)):
        words = excerpt(text[max(0, match.start() - 60) : match.end() + 120])
        yield Fact(kind="host_kill", framework="linux", details=(("scope", "cgroup"),), text=words)
    if match := _RAY.search(text):
        yield Fact(
            kind="host_kill", framework="ray", details=(("scope", "node"),), text=excerpt(text[match.start() :], 240)
        )
    for failed in _HOST_PYTHON.finditer(text):
        asked = failed.group("requested") or failed.group("_numpy")
        found = (("requested", read_size(asked)),) if asked else ()
        yield Fact(kind="host_oom", framework="python", sizes=found, text=excerpt(failed.group(0)))
    if match := _SHARED.search(text):
        yield Fact(
            kind="host_oom", framework="python", details=(("scope", "shared memory"),), text=excerpt(match.group(0))
        )
    if match := _KILLED.search(window):
        line = window[max(0, match.start() - 80) : match.end() + 80]
        yield Fact(kind="killed", framework="", text=excerpt(line))
