"""The words of engines, compilers and llama.cpp when memory is short at a start or in a run.

Source: vllm@0.33.0:vllm/v1/core/kv_cache_planning.py:_check_enough_kv_cache_memory, v1/worker/utils.py:request_memory,
v1/worker/gpu_worker.py; sglang@0.5.23:srt/model_executor/pool_configurator.py, srt/mem_cache/kv_cache_configurator.py,
srt/mem_cache/allocation.py; for older versions and the other programs the messages themselves, as published.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ullage.observe.oom import SIZE, Fact, excerpt, flatten, read_size, sizes

WORDS = (
    "No available memory for the cache blocks",
    "max seq len",
    "Free memory on device",
    "KV cache is needed",
    "Error in memory profiling",
    "CUDA graphs can take additional",
    "Not enough memory. Please try to increase",
    "Not enough GPU memory for hybrid",
    "leave no GPU memory for the KV cache",
    "is larger than the profiled value",
    "Prefill out of memory",
    "Decode out of memory",
    "KV cache pool is full",
    "Out of memory while trying",
    "esource exhausted",
    "RESOURCE_EXHAUSTED",
    "cudaMalloc failed",
    "failed to allocate",
    "unable to allocate",
    "requires more system memory",
    "Unable to warmup model",
    "cudaMallocAsync",
    "Requested size was",
    "Insufficient memory",
)
_NUMBER = r"-?\d[\d,]{0,24}"
_D = r"\d{1,9}(?:\.\d{1,9})?"
_VLLM_NONE = re.compile(r"No available memory for the cache blocks")
_VLLM_LENGTH = re.compile(
    rf"max seq len \((?P<max_model_len>{_NUMBER})\) is larger than the maximum number of tokens that can be stored in "
    rf"KV cache \((?P<kv_cache_tokens>{_NUMBER})\)"
)
_VLLM_NEEDED = re.compile(
    rf"(?:max seq len \((?P<max_model_len>{_NUMBER})\),? *)?\(?(?P<needed>{SIZE}) KV cache is needed, which is larger "
    rf"than the available KV cache memory \((?P<available>{SIZE})\)"
    rf"(?:.{{0,80}}?estimated maximum model length is (?P<estimated>{_NUMBER}))?"
)
_VLLM_START = re.compile(
    rf"Free memory on device [\w:]{{0,40}} ?\((?P<free>{_D})/(?P<capacity>{_D}) GiB\) on startup is less than "
    r"(?:the )?(?:desired GPU memory utilization|engine's budget[\w' ]{0,80}) "
    rf"\((?P<utilization>{_D}), (?P<requested>{_D}) GiB\)"
)
_VLLM_MOVED = re.compile(
    rf"Error in memory profiling\. Initial free memory:? (?P<free_before>{SIZE}|\d{{1,20}}),? (?:and )?"
    rf"current free memory:? (?P<free_after>{SIZE}|\d{{1,20}})"
)
_VLLM_HINT = re.compile(r"CUDA graphs can take additional (?P<low>\d)~(?P<high>\d) GiB memory per GPU")
_SGLANG = (
    ("kv_pool", re.compile(r"Not enough memory\. Please try to increase --mem-fraction-static")),
    ("kv_pool", re.compile(r"Not enough GPU memory for hybrid")),
    (
        "kv_pool",
        re.compile(
            r"leave no GPU memory for the KV cache under --mem-fraction-static=(?P<fraction>\d{1,9}(?:\.\d{1,9})?)"
            r".{0,80}?above (?P<needed_fraction>\d{1,9}(?:\.\d{1,9})?)"
        ),
    ),
    (
        "kv_pool",
        re.compile(
            rf"max_total_tokens=(?P<asked_tokens>{_NUMBER}) is larger than the profiled value "
            rf"(?P<kv_cache_tokens>{_NUMBER})"
        ),
    ),
    ("pool_full", re.compile(rf"Prefill out of memory.{{0,80}}?allocate (?P<tokens>{_NUMBER}) tokens")),
    ("pool_full", re.compile(rf"Decode out of memory.{{0,80}}?allocate (?P<tokens>{_NUMBER}) tokens")),
    ("hint", re.compile(r"KV cache pool is full\. Retract requests")),
)
_XLA = re.compile(
    r"[Oo]ut of memory (?:while trying to allocate|allocating) "
    r"(?P<requested>\d{1,20}(?:\.\d{1,9})? ?(?:[KMGT]i?B|bytes))"
)
_XLA_PARTS = re.compile(
    r"(parameter|constant|maybe_live_out|preallocated temp|total) (?:allocation|fragmentation):"
    rf"\s{{0,8}}({_D}\s{{0,8}}[KMGT]?i?B)"
)
_GGML = re.compile(
    rf"(?:allocating (?P<requested>{_D} MiB) on device (?P<_device>\d{{1,20}}): )?cuda?Malloc\w* failed: out of memory"
    r"|failed to allocate (?P<_name>[\w ]{1,40}?) ?buffer of size (?P<exact>\d{1,20})"
    r"|(?:failed|unable) to allocate "
    r"(?P<_what>compute (?:pp |tg )?buffers|\w+ (?:backend )?buffer|(?:buffer for )?kv cache)"
)
_OLLAMA = re.compile(
    rf"model requires more system memory \((?P<requested>{SIZE})\) than is available \((?P<free>{SIZE})\)"
)
_TRTLLM = re.compile(
    r"CUDA runtime error in (?:::)?cudaMalloc\w*\([^\n]{0,80}\): out of memory"
    r"|Requested size was (?P<requested>\d{1,20}) bytes"
    r"|Insufficient memory\b[^\n]{0,120}"
)


def match_engines(window: str) -> Iterator[Fact]:
    """Yield the messages of engines in a window of lines."""
    text = flatten(window)
    yield from _vllm(text)
    yield from _sglang(text)
    yield from _xla(text)
    yield from _llama(window)
    for match in _TRTLLM.finditer(text):
        near = text[max(0, match.start() - 400) : match.end() + 200]
        if "TensorRT" in near or "TRT" in near or "tensorrt" in near:
            found = (("requested", read_size(match.group("requested"))),) if match.group("requested") else ()
            yield Fact(kind="buffer_oom", framework="tensorrt-llm", sizes=found, text=excerpt(match.group(0)))


def _integer(text: str) -> int:
    return int(text.replace(",", ""))


def _vllm(text: str) -> Iterator[Fact]:
    for match in _VLLM_NONE.finditer(text):
        versions = "0.15+" if "conserving_memory" in text else "0.2.5+"
        yield Fact(kind="kv_pool", framework="vllm", versions=versions, text=excerpt(text[match.start() :], 160))
    for match in _VLLM_LENGTH.finditer(text):
        counts = tuple((name, _integer(value)) for name, value in match.groupdict().items())
        cut = not re.match(r".{0,4}Try increasing.{0,120}(?:engine|details)", text[match.end() :])
        words = excerpt(match.group(0), 240)
        yield Fact(kind="kv_pool", framework="vllm", versions="0.2.5-0.8", counts=counts, text=words, partial=cut)
    for match in _VLLM_NEEDED.finditer(text):
        given = match.groupdict()
        counts = tuple((name, _integer(given[name])) for name in ("max_model_len", "estimated") if given[name])
        amounts = tuple((name, read_size(given[name])) for name in ("needed", "available"))
        yield Fact(
            kind="kv_pool",
            framework="vllm",
            versions="0.8.2+",
            sizes=amounts,
            counts=counts,
            text=excerpt(match.group(0)),
        )
    for match in _VLLM_START.finditer(text):
        given = match.groupdict()
        yield Fact(
            kind="start_budget",
            framework="vllm",
            versions="0.8+",
            sizes=tuple((name, read_size(given[name], "GiB")) for name in ("free", "capacity", "requested")),
            details=(("utilization", given["utilization"]),),
            text=excerpt(match.group(0)),
        )
    for match in _VLLM_MOVED.finditer(text):
        yield Fact(kind="profile_moved", framework="vllm", sizes=sizes(match), text=excerpt(match.group(0)))
    for match in _VLLM_HINT.finditer(text):
        cut = "to enforce eager" not in text and "max_num_seqs" not in text and "'enforce_eager" not in text
        words = excerpt(text[match.start() :], 200)
        yield Fact(kind="hint", framework="vllm", details=(("phase", "graph capture"),), text=words, partial=cut)


def _sglang(text: str) -> Iterator[Fact]:
    for kind, pattern in _SGLANG:
        for match in pattern.finditer(text):
            given = {name: value for name, value in match.groupdict().items() if value}
            counts = tuple((name, _integer(value)) for name, value in given.items() if not name.endswith("fraction"))
            details = tuple((name, value.rstrip(".")) for name, value in given.items() if name.endswith("fraction"))
            if "larger than the profiled" in match.group(0) and dict(counts)["kv_cache_tokens"] > 0:
                continue  # a note: the pool is smaller than asked for, and it starts
            words = excerpt(match.group(0), 240)
            yield Fact(kind=kind, framework="sglang", counts=counts, details=details, text=words)


def _xla(text: str) -> Iterator[Fact]:
    for match in _XLA.finditer(text):
        after = text[match.end() : match.end() + 1500]
        parts = {
            name.replace(" ", "_"): amount for name, amount in _XLA_PARTS.findall(after.partition("Out of memory")[0])
        }
        found = [("requested", read_size(match.group("requested")))]
        found += [(name, read_size(parts[name])) for name in parts if name != "total"]
        total = re.search(r"total allocation:\s{0,8}(\d{1,20}(?:\.\d{1,9})?\s{0,8}[KMGT]?i?B)", after)
        if total:
            found.append(("total", read_size(total.group(1))))
        yield Fact(kind="xla_oom", framework="jax/xla", sizes=tuple(found), text=excerpt(match.group(0) + after, 300))


def _llama(text: str) -> Iterator[Fact]:
    requested, names, whats = None, [], []
    device, words = "", []
    for match in _GGML.finditer(text):
        given = match.groupdict()
        words.append(match.group(0))
        if given["exact"]:
            requested = read_size(f"{given['exact']} bytes")
        elif given["requested"] and requested is None:
            requested = read_size(given["requested"])
        device = given["_device"] or device
        names += [given["_name"]] if given["_name"] else []
        whats += [given["_what"]] if given["_what"] else []
    ours = "ggml" in text or "llama" in text or "alloc_tensor_range" in text
    if words and ours:
        role = _role(text, whats)
        details = [("role", role), ("buffer", (names or whats or [""])[0].strip())]
        yield Fact(
            kind="host_oom" if details[1][1].startswith(("CPU", "CUDA_Host")) else "buffer_oom",
            framework="ollama" if re.search(r"ollama|llama runner process", text) else "llama.cpp",
            sizes=(("requested", requested),) if requested else (),
            counts=(("device", int(device)),) if device else (),
            details=tuple(details),
            text=excerpt(" / ".join(words)),
        )
    for match in _OLLAMA.finditer(flatten(text)):
        yield Fact(kind="host_oom", framework="ollama", sizes=sizes(match), text=excerpt(match.group(0)))


def _role(text: str, whats: list[str]) -> str:
    """Return what the buffer is for; its allocator tells: graphs by ggml_gallocr, weights by alloc_tensor_range."""
    if "ggml_gallocr" in text or any("compute" in what for what in whats):
        return "compute"
    if re.search(r"kv_cache_init|for kv cache|llama_kv_cache", text):
        return "kv_cache"
    return "weights" if re.search(r"alloc_tensor_range|error loading model|load_tensors", text) else ""
