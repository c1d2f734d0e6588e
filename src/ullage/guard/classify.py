"""Say whether an exception is an out-of-memory, of which kind, and whether it is worth an unchanged second try."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

from ullage.frozen import Frozen

#: The context of the device is dead after these: nothing in this process can go on.
_DEAD = re.compile(
    r"illegal memory access|device-side assert|unspecified launch failure|misaligned address|"
    r"Watchdog caught collective|ncclRemoteError|NCCL communicator was aborted",
    re.IGNORECASE,
)
#: Out-of-memory in the words of allocators and libraries that raise no OutOfMemoryError.
_HOST = re.compile(
    r"DefaultCPUAllocator: (?:can't allocate memory|not enough memory)|std::bad_alloc|Cannot allocate memory"
)
_LIBRARY = re.compile(
    r"CUDA out of memory|HIP out of memory|CUDA error: out of memory|CUDA_ERROR_OUT_OF_MEMORY|"
    r"CUBLAS_STATUS_ALLOC_FAILED|CUSPARSE_STATUS_ALLOC_FAILED|CUSOLVER_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED|"
    r"HIPBLAS_STATUS_ALLOC_FAILED|ncclUnhandledCudaError[\s\S]{0,400}out of memory|"
    r"Cuda failure (?:2 )?'out of memory'|Triton Error \[CUDA\]: out of memory|would exceed allowed memory"
)
_NCCL = re.compile(r"nccl", re.IGNORECASE)
MAX_TEXT = 2000


class Failure(Frozen):
    """What is kept of an exception: words only, so that nothing holds its frames and their tensors.

    ``kind``: ``device`` or ``host`` memory ran out, ``peer`` (on another rank), or ``dead`` (the device's context is
    lost, only a restart helps). ``transient``: more was cached than asked for, so an unchanged second try, after the
    cache is given back, can succeed.
    """

    kind: str
    phase: str
    text: str
    rank: int = 0
    transient: bool = False
    shape: int = 0
    micro_batch: int = 0


class PeerOutOfMemoryError(RuntimeError):
    """Raised on a healthy rank in place of a collective that a rank out of memory will not join."""


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and all that led to it, each once."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        current = waiting.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        waiting += [current.__cause__, current.__context__]


def classify(error: BaseException, *, phase: str = "", rank: int = 0) -> Failure | None:
    """Return what failed, or None for an error that is not about memory (which must be raised again)."""
    if isinstance(error, PeerOutOfMemoryError):
        return Failure(kind="peer", phase=phase, text=str(error), rank=rank)
    each: BaseException | None = error
    seen: set[int] = set()
    while isinstance(each, Exception) and id(each) not in seen:  # by __cause__ only: a context may have been handled
        seen.add(id(each))
        kind = _kind(each)
        if kind:
            text = str(each)[:MAX_TEXT]
            return Failure(
                kind=kind, phase=phase, text=text, rank=rank, transient=kind == "device" and _transient(text)
            )
        each = each.__cause__
    return None


def _kind(error: Exception) -> str:
    text = str(error)[: 4 * MAX_TEXT]
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError):
        return "host"
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return "device"
    if not isinstance(error, RuntimeError):  # torch's errors are; a user's ValueError may quote one
        return ""
    if _DEAD.search(text):
        return "dead"
    if _HOST.search(text):
        return "host"
    if _LIBRARY.search(text):  # a communicator that failed half-way cannot be used again
        return "dead" if _NCCL.search(text) else "device"
    return ""


def _transient(text: str) -> bool:
    """True where PyTorch held enough unallocated memory: it waited for an event, or lay in pieces."""
    from ullage.observe.scan import match_window

    for fact in match_window(text):
        sizes = dict(fact.sizes)
        requested, cached = sizes.get("requested"), sizes.get("unallocated")
        if requested is not None and cached is not None and cached.bytes >= requested.bytes:
            return True
    return False
