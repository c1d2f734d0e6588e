"""Start-up logs of engines, read back into the figures that ``ullage validate`` compares: one name per quantity.

Source: vllm@0.33.0:vllm/v1/worker/gpu_worker.py, gpu_model_runner.py and v1/core/kv_cache_utils.py;
sglang@0.5.23:srt/model_executor/model_runner.py, srt/mem_cache/memory_pool.py:_finalize_allocation_log; the lines of
older versions, of llama.cpp and of ik_llama.cpp as ``engines/*`` prints them; published logs of TensorRT-LLM and
ollama. SGLang and old vLLM print GB and mean GiB.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

from ullage.frozen import Frozen
from ullage.observe.oom import Size, read_size

_N = r"(-?\d[\d,]{0,24}(?:\.\d{1,20})?)"
_G = rf"{_N}\s{{0,8}}(Gi?B|Mi?B)?"
#: (engine, quantity, words). Amounts have two groups: number and unit (GiB where it is cut off). Counts have one.
_AMOUNTS: tuple[tuple[str, str, str], ...] = (
    ("vllm", "weights", rf"(?:Model loading|[Ll]oading model weights) took {_G}"),
    ("vllm", "weights", rf"model weights take {_G}"),
    ("vllm", "weights", rf"Actual usage is {_G} for weight"),
    ("vllm", "consumed", rf"Actual usage is {_G} for consumed memory"),
    ("vllm", "non_torch", rf"non_torch_memory takes {_G}"),
    ("vllm", "non_torch", rf"\bnon_torch_memory={_G}"),
    ("vllm", "non_torch", rf"{_G} for non-torch memory"),
    ("vllm", "activation_peak", rf"PyTorch activation peak memory takes {_G}"),
    ("vllm", "activation_peak", rf"{_G} for peak activation"),
    ("vllm", "max_allocated", rf"peak_torch_memory={_G}"),
    ("vllm", "kv_cache", rf"the rest of the memory reserved for KV Cache is {_G}"),
    ("vllm", "kv_cache", rf"\bkv_cache_size={_G}"),
    ("vllm", "kv_cache", rf"Available KV cache memory: {_G}"),
    ("vllm", "kv_cache", rf"available KV cache memory \({_G}\)"),
    ("vllm", "cuda_graph_estimate", rf"Estimated CUDA graph memory: {_G}"),
    ("vllm", "cuda_graphs", rf"Graph capturing finished(?: in [\d.]{{1,20}} secs?)?,? took {_G}"),
    ("vllm", "cuda_graphs", rf"{_G} for CUDAGraph memory"),
    ("vllm", "total", rf"total_gpu_memory \({_G}\)"),
    ("vllm", "total", rf"\btotal_gpu_memory={_G}"),
    ("vllm", "requested", rf"gpu_memory_utilization \([\d.]{{1,20}}\) = {_G}"),
    ("vllm", "requested", rf"Desired GPU memory utilization is \([\d.]{{1,20}}, {_G}\)"),
    ("sglang", "available_before_weights", rf"Load weight begin\. avail mem={_G}"),
    ("sglang", "available_after_weights", rf"Load weight end\..{{0,300}}?avail mem={_G}"),
    ("sglang", "weights", rf"Load weight end\..{{0,300}}?mem usage={_G}"),
    ("sglang", "non_torch", rf"Init torch distributed ends?\..{{0,100}}?mem usage={_G}"),
    ("sglang", "kv_cache", rf"#tokens: \d{{1,20}}, KV size: {_G}"),
    ("sglang", "available_after_pool", rf"Memory pool end\. avail mem={_G}"),
    ("sglang", "cuda_graphs", rf"Capture .{{0,40}}?(?i:cuda|npu|xpu|hip) graphs? end\..{{0,200}}?mem usage={_G}"),
    ("sglang", "available_at_end", rf"available_gpu_mem={_G}"),
    ("trtllm", "weights", rf"Loaded engine size: {_G}"),
    ("trtllm", "activation_peak", rf"Allocated {_G} for execution context memory"),
    ("trtllm", "kv_cache", rf"Allocated {_G} for max tokens in paged KV cache"),
    ("ollama", "total", rf'memory\.required\.full="{_G}"'),
    ("ollama", "kv_cache", rf'memory\.required\.kv="{_G}"'),
    ("ollama", "weights", rf'memory\.weights\.total="{_G}"'),
    ("ollama", "activation_peak", rf'memory\.graph\.full="{_G}"'),
)
_COUNTS: tuple[tuple[str, str, str], ...] = (
    ("vllm", "kv_cache_tokens", rf"KV cache size: {_N} tokens"),
    ("vllm", "kv_cache_tokens", rf"maximum number of tokens that can be stored in KV cache \({_N}\)"),
    ("vllm", "max_concurrency", rf"Maximum concurrency for [\d,]{{1,24}} tokens per request: {_N}x"),
    ("vllm", "num_gpu_blocks", rf"# (?:GPU|CUDA|cuda|rocm|HPU|NPU) blocks: {_N}"),
    ("sglang", "kv_cache_tokens", rf"#tokens: {_N}, (?:K|KV) size"),
    ("sglang", "kv_cache_tokens", rf"max_total_num_tokens={_N}"),
    ("trtllm", "kv_cache_tokens", rf"Using {_N} tokens in paged KV cache"),
)
_K_AND_V = re.compile(rf"K size: {_G}, V size: {_G}")
_BUFFER = re.compile(
    rf"\b([A-Za-z]+(?:_[A-Za-z]+)?\d*)\s{{1,8}}(?:(model|KV|compute|RS|output) )?buffer size\s{{0,8}}=\s{{0,8}}{_N} MiB"
)
_SELF_SIZE = re.compile(rf"KV self size\s{{0,8}}=\s{{0,8}}{_N} MiB")
_HOSTS = ("cpu", "cuda_host", "rocm_host", "vulkan_host", "sycl_host")
_COMPILED = tuple((engine, name, re.compile(words), True) for engine, name, words in _AMOUNTS) + tuple(
    (engine, name, re.compile(words), False) for engine, name, words in _COUNTS
)
#: Words of which one stands in every line that is read here.
WORDS = (
    "Model loading took", "oading model weights took", "model weights take", "Actual usage is", "non_torch_memory",
    "peak_torch_memory", "kv_cache_size=", "KV cache memory", "CUDA graph memory", "Graph capturing finished",
    "total_gpu_memory", "KV cache size", "Maximum concurrency", " blocks: ", "stored in KV cache",
    "Load weight", "Init torch distributed", "#tokens: ", "Memory pool end", "Capture ", "max_total_num_tokens=",
    "Loaded engine size", "execution context memory", "paged KV cache", "memory.required", "buffer size", "self size",
)  # fmt: skip
_SETTINGS = {
    "gpu_memory_utilization": re.compile(
        r"gpu[-_]memory[-_]utilization'?[ =:]+\(?'?(0?\.\d{1,20}|1\.0+|1)\b"
        r"|gpu_memory_utilization \((0?\.\d{1,20}|1\.0+)\)"
    ),
    "mem_fraction_static": re.compile(r"mem[-_]fraction[-_]static[= ]+(0?\.\d{1,20})\b"),
    "max_model_len": re.compile(r"max[-_](?:model|seq)[-_]len'?[= :]+(\d{2,9})\b"),
    "kv_cache_dtype": re.compile(r"kv[-_]cache[-_]dtype'?[= :]+'?(\w+)"),
    "tensor_parallel_size": re.compile(r"(?:tensor[-_]parallel[-_]size|\btp[-_]size)'?[= :]+(\d{1,4})\b"),
    "alloc_conf": re.compile(r"(?<!setting )PYTORCH_(?:CUDA_|HIP_|NPU_)?ALLOC_CONF=([\w:.,\[\]>-]+)"),
}

#: Words of which one stands in every line that names a setting.
SETTING_WORDS = (
    "memory_utilization", "memory-utilization", "mem_fraction_static", "mem-fraction-static", "max_model_len",
    "max-model-len", "max_seq_len", "max-seq-len", "kv_cache_dtype", "kv-cache-dtype", "tensor_parallel_size",
    "tensor-parallel-size", "tp_size", "tp-size", "ALLOC_CONF",
)  # fmt: skip


class Figure(Frozen):
    """One figure of a log: bytes for amounts (``size``), a plain number otherwise (``value``).

    ``place`` is the rank or buffer that it belongs to, empty where the log does not say.
    """

    engine: str
    quantity: str
    place: str = ""
    line: int = 0
    size: Size | None = None
    value: float = 0.0


def figures_of(text: str, place: str = "", line: int = 0) -> Iterator[Figure]:
    """Yield the figures of one line."""
    for engine, quantity, pattern, amount in _COMPILED:
        for match in pattern.finditer(text):
            if amount:
                size = read_size(f"{match.group(1)} {_binary(match.group(2))}")
                yield Figure(engine=engine, quantity=quantity, place=place, line=line, size=size)
            else:
                value = float(match.group(1).replace(",", ""))
                yield Figure(engine=engine, quantity=quantity, place=place, line=line, value=value)
    for match in _K_AND_V.finditer(text):
        parts = [read_size(f"{match.group(at)} {_binary(match.group(at + 1))}") for at in (1, 3)]
        both = Size(
            bytes=sum(part.bytes for part in parts),
            text=" + ".join(part.text for part in parts),
            half_step_bytes=sum(part.half_step_bytes for part in parts),
        )
        yield Figure(engine="sglang", quantity="kv_cache", place=place, line=line, size=both)
    yield from _buffers(text, line)


def _binary(unit: str | None) -> str:
    """Return the unit that is meant: engines that print GB divide by 2**30."""
    return {"GB": "GiB", "MB": "MiB", None: "GiB"}.get(unit, unit or "GiB")


def _buffers(text: str, line: int) -> Iterator[Figure]:
    for match in _BUFFER.finditer(text):
        where, kind = match.group(1), match.group(2) or "model"
        quantity = {"model": "weights", "KV": "kv_cache", "RS": "kv_cache", "compute": "activation_peak"}.get(kind)
        if quantity is not None:
            host = "host " if where.lower() in _HOSTS or where.lower().startswith("cpu") else ""
            size = read_size(f"{match.group(3)} MiB")
            yield Figure(engine="llama.cpp", quantity=quantity, place=host + where, line=line, size=size)
    for match in _SELF_SIZE.finditer(text):
        size = read_size(f"{match.group(1)} MiB")
        yield Figure(engine="llama.cpp", quantity="kv_self_size", place="all", line=line, size=size)


def settings_of(text: str) -> Iterator[tuple[str, str]]:
    """Yield the settings that a line names: they decide which advice is possible."""
    for name, pattern in _SETTINGS.items():
        if match := pattern.search(text):
            yield name, next(group for group in match.groups() if group)


class Collected:
    """The figures of a log: of each quantity and place the last, since a start may be tried again."""

    def __init__(self) -> None:
        self._figures: dict[tuple[str, str, str], Figure] = {}
        self.settings: dict[str, str] = {}

    def take(self, number: int, place: str, text: str) -> None:
        """Look at a line."""
        if len(self._figures) > 10_000:
            return
        if any(map(text.__contains__, WORDS)):
            for figure in figures_of(text, place, number):
                self._figures[figure.engine, figure.quantity, figure.place] = figure
        if any(map(text.__contains__, SETTING_WORDS)):
            self.settings.update(settings_of(text))

    def engine(self) -> str:
        """Return the engine that printed most of the figures, empty without any."""
        engines = [figure.engine for figure in self._figures.values()]
        return max(sorted(set(engines)), key=engines.count, default="")

    def all(self) -> list[Figure]:
        """Return the figures of that engine."""
        engine = self.engine()
        return [figure for figure in self._figures.values() if figure.engine == engine]

    def fullest(self) -> dict[str, Figure]:
        """Return per quantity the figure of the place where it is largest, host buffers and sums left out."""
        found: dict[str, Figure] = {}
        for figure in self.all():
            if figure.place.startswith("host ") and any(
                other.quantity == figure.quantity and not other.place.startswith("host ") for other in self.all()
            ):
                continue
            known = found.get(figure.quantity)
            if known is None or _amount(figure) > _amount(known):
                found[figure.quantity] = figure
        return found


def _amount(figure: Figure) -> Fraction:
    return Fraction(figure.size.bytes) if figure.size is not None else Fraction(figure.value)
