"""The words in which PyTorch's allocators (CUDA, HIP, NPU, XPU, MPS) say that memory ran out, from 1.0 to 2.14.

Source: the messages themselves, as published with each version (pytorch:c10/cuda/CUDACachingAllocator.cpp, the branch
of malloc in which all else has failed). The amount asked for is the segment that the allocator wanted from the driver,
rounded up (2 MiB, 20 MiB, or a multiple of 2 MiB), not the tensor. In 1.0 to 1.3 "cached" is what is reserved and not
allocated; later "reserved in total" holds the allocated memory too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ullage.observe.oom import SIZE, Fact, Size, excerpt, flatten, read_size, sizes, spans

#: Words of which one stands in every message of this module.
WORDS = ("Tried to allocate", "out of memory. Tried", "would exceed allowed memory")

_TRIED = re.compile(
    r"(?:\b(?P<_chip>CUDA|HIP|NPU|XPU|MUSA|MLU|GCU|MPS backend|XLA)\s{1,8}out of memory[^A-Za-z]*"
    rf"(?:\(MPS allocated[^)]*\)\W*)?)?Tried to allocate\s{{1,8}}(?P<requested>{SIZE})"
)
_MPS = re.compile(
    rf"MPS allocated:\s{{0,8}}(?P<allocated>{SIZE}), other allocations:\s{{0,8}}(?P<outside>{SIZE})"
    rf"(?:, max allowed:\s{{0,8}}(?P<limit>{SIZE}))?"
)
_OLD_DEVICE = re.compile(
    rf"\((?:GPU|NPU|XPU|MLU|MUSA)\s{{1,8}}(?P<_index>\d{{1,20}})\s{{0,8}};\s{{0,8}}(?P<capacity>{SIZE}) total capacity"
)
_NEW_DEVICE = re.compile(
    rf"\b(?:GPU|NPU|XPU|MLU|MUSA)\s{{1,8}}(?P<_index>\d{{1,20}}) has a total capaci?ty of\s{{1,8}}(?P<capacity>{SIZE})"
    rf"(?:\s{{1,8}}of which\s{{1,8}}(?P<free>{SIZE}) is free)?"
)
_FIELDS = {
    "free": re.compile(rf"({SIZE}) free\b"),
    "allocated": re.compile(rf"({SIZE}) (?:already allocated|is allocated by PyTorch)"),
    "active": re.compile(rf"({SIZE}) current active"),
    "reserved": re.compile(rf"({SIZE}) reserved in total by PyTorch"),
    "unallocated": re.compile(rf"({SIZE})(?: is reserved by PyTorch but unallocated| cached\))"),
    "private_pools": re.compile(rf"with ({SIZE}) allocated in private pools"),
    "process_used": re.compile(rf"this process has ({SIZE}) memory in use"),
    "limit": re.compile(rf"({SIZE}) allowed;"),
}
_PROCESS = re.compile(rf"\bProcess (\d{{1,20}}) has ({SIZE}) memory in use")
_REJECTED = re.compile(r"preemptively rejected|would exceed per_process_memory_fraction")
_CUT = re.compile(r"\(?\b(?:GPU|NPU|XPU)\s{1,8}\d{1,20} (?:has a total capac\w* of\s{0,8}[\d.]{0,20}\s{0,8}$|;[^)]*$)")
_ASYNC = re.compile(
    rf"would exceed allowed memory\. \(out of memory\) ?Currently allocated ?: ?(?P<allocated>{SIZE}) ?"
    rf"Requested ?: ?(?P<requested>{SIZE}) ?Device limit ?: ?(?P<capacity>{SIZE}) ?"
    rf"Free \(according to CUDA\) ?: ?(?P<free>{SIZE}) ?"
    rf"(?:PyTorch limit \(set by user-supplied memory fraction\) ?: ?(?P<limit>{SIZE}))?"
)


def match_torch(window: str) -> Iterator[Fact]:
    """Yield the messages of PyTorch's allocators in a window of lines."""
    text = flatten(window)
    for match, words in spans(_TRIED, text):
        if (match.group("_chip") or "") == "XLA":
            continue
        found = _mps(words, text[: match.start()]) if match.group("_chip") == "MPS backend" else _caching(words)
        chip = (match.group("_chip") or _chip_of(words)).removesuffix(" backend")
        yield Fact(
            kind="device_oom",
            framework="torch_npu" if chip == "NPU" else "pytorch",
            versions=""
            if chip in ("NPU", "MPS")
            else _versions(text[max(0, match.start() - 60) : match.start()], words),
            sizes=(("requested", read_size(match.group("requested"))), *found),
            counts=_index(words),
            processes=tuple((int(number), read_size(amount)) for number, amount in _PROCESS.findall(words)),
            details=_details(chip, text[: match.start()], words),
            text=excerpt(words),
            partial=_CUT.search(words) is not None,
        )
    for match in _ASYNC.finditer(text):
        yield Fact(
            kind="device_oom",
            framework="pytorch",
            versions="1.13+, backend:cudaMallocAsync",
            sizes=sizes(match),
            details=(("chip", "CUDA"), ("allocator", "cudaMallocAsync")),
            text=excerpt(match.group(0)),
        )


def _chip_of(words: str) -> str:
    match = re.search(r"\((NPU|XPU|MLU|MUSA) \d|\b(NPU|XPU|MLU|MUSA) \d{1,20} has a total", words)
    return next((name for name in match.groups() if name), "CUDA") if match else "CUDA"


def _details(chip: str, before: str, words: str) -> tuple[tuple[str, str], ...]:
    found = [("chip", chip)]
    if _REJECTED.search(before[-400:]) or _REJECTED.search(words):
        found.append(("rejected", "per_process_memory_fraction"))
    if re.search(r"Capture cuda ?graphs? failed:\W*(?:CUDA|HIP)?[^.]{0,40}\.?\s{0,8}$", before, re.IGNORECASE):
        found.append(("phase", "graph capture"))
    if re.search(r"\[RANK \d{1,20}\]", before):
        found.append(("ranks", "several"))
    return tuple(found)


def _index(words: str) -> tuple[tuple[str, int], ...]:
    match = _OLD_DEVICE.search(words) or _NEW_DEVICE.search(words)
    return (("device", int(match.group("_index"))),) if match else ()


def _caching(words: str) -> list[tuple[str, Size]]:
    found: dict[str, Size] = {}
    device = _OLD_DEVICE.search(words) or _NEW_DEVICE.search(words)
    if device is not None:
        found |= dict(sizes(device))
    for name, pattern in _FIELDS.items():
        match = pattern.search(words)
        if match is not None and name not in found:
            found[name] = read_size(match.group(1))
    return list(found.items())


def _mps(words: str, before: str) -> list[tuple[str, Size]]:
    matches = list(_MPS.finditer(before + words))
    return list(sizes(matches[-1])) if matches else []


def _versions(before: str, words: str) -> str:
    """Return the versions that say it in these words; each step below is a change of the text."""
    if "preemptively rejected" in before + words:
        return "2.12+"
    if "PYTORCH_ALLOC_CONF" in words:
        return "2.9+"
    if "allowed;" in words or "private pools" in words or "has a total capacity" in words:
        if "torch.OutOfMemoryError" in before:
            return "2.5+"
        return "2.2-2.4" if "torch.cuda.OutOfMemoryError" in before else "2.2+"
    if "has a total capacty" in words:
        return "2.1"
    if "If reserved memory is >>" in words:
        return "1.10-2.0"
    if "reserved in total by PyTorch" in words:
        return "1.4-2.0"
    if re.search(r"B cached\)", words):
        return "1.0-1.3"
    return ""
