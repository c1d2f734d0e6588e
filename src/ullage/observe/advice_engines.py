"""Advice in the flags of engines and of llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ullage.i18n import _
from ullage.units import format_bytes

if TYPE_CHECKING:
    from ullage.observe.advice import Case, Piece

#: Above this share nothing is left to raise: the driver and the graphs need the rest.
HIGHEST_SHARE = 0.95


def _piece(change: str, flags: str = "", gain: int = 0, cost: str = "") -> Piece:
    from ullage.observe.advice import Piece

    return Piece(change=change, flags=flags, gain_bytes=max(0, gain), cost=cost)


def _engine(case: Case) -> str:
    return case.fact.framework if case.fact.framework in ("vllm", "sglang") else case.program


def _fraction(case: Case, name: str) -> float | None:
    return float(case.settings[name]) if name in case.settings else None


def kv_pool(case: Case) -> Iterator[Piece]:
    """Yield advice when the KV cache is too small."""
    yield from _kv_sglang(case) if _engine(case) == "sglang" else _kv_vllm(case)


def _kv_vllm(case: Case) -> Iterator[Piece]:
    fact, gap = case.fact, case.finding.gap_bytes or 0
    length = fact.count("estimated") or fact.count("kv_cache_tokens")
    if length is not None and length > 0:
        wanted = fact.count("max_model_len")
        cost = _("requests above {length:,} tokens are refused").format(length=length)
        change = _("a shorter longest request")
        if wanted is not None:
            change = _("a longest request of {length:,} tokens instead of {wanted:,}").format(
                length=length, wanted=wanted
            )
        yield _piece(change, f"--max-model-len {length}", gap, cost)
    share = _fraction(case, "gpu_memory_utilization")
    if share is None or share < HIGHEST_SHARE:
        yield _raised_share(case, share, gap)
    needed = fact.size("needed")
    if needed is not None:
        yield _piece(
            _("a KV cache of one byte per value: half of {needed}").format(needed=format_bytes(needed)),
            "--kv-cache-dtype fp8",
            needed // 2,
            _("some accuracy; not if it is fp8 already"),
        )
    if length is None:
        change = _("a smaller profiled peak: fewer tokens at once")
        yield _piece(
            change, "--max-num-batched-tokens 2048 --max-num-seqs 64", 0, _("long prompts take more steps; queueing")
        )
        yield _piece(_("no CUDA graphs"), "--enforce-eager", 0, _("slower decoding"))
        yield _piece(_("quantised weights"), "", 0, _("some accuracy"))
    yield _piece(
        _("the weights over more GPUs"), "--tensor-parallel-size N", 0, _("GPUs; an MLA cache is kept on each of them")
    )


def _raised_share(case: Case, share: float | None, gap: int) -> Piece:
    total = case.fact.size("capacity")
    change = _("a larger share of the card for the engine")
    flags = "--gpu-memory-utilization 0.95"
    if share is not None:
        change = _("a larger share of the card for the engine than {share}").format(share=share)
        if total:
            flags = f"--gpu-memory-utilization {min(HIGHEST_SHARE, share + gap / total + 0.01):.2f}"
    return _piece(change, flags, 0, _("less is left for graphs and for other processes"))


def _kv_sglang(case: Case) -> Iterator[Piece]:
    needed, share = case.fact.detail("needed_fraction"), _fraction(case, "mem_fraction_static")
    if case.fact.kind in ("pool_full", "hint"):
        yield _piece(_("fewer requests at once"), "--max-running-requests N", 0, _("queueing"))
        yield _piece(_("schedule more carefully"), "--schedule-conservativeness 1.3", 0, _("some throughput"))
        yield _piece(_("a larger static share, if the card has room"), "--mem-fraction-static +0.02")
        return
    flags = "--mem-fraction-static 0.9"
    if needed:
        flags = f"--mem-fraction-static {min(0.98, float(needed) + 0.02):.2f}"
    elif share is not None:
        flags = f"--mem-fraction-static {min(0.98, share + 0.05):.2f}"
    yield _piece(
        _("a larger static share: at a start that holds weights and KV cache (while running out later, lower it)"),
        flags,
        0,
        _("less is left for activations and graphs"),
    )
    yield _piece(
        _("less beside the static share"),
        "--chunked-prefill-size 2048 --cuda-graph-max-bs 16",
        0,
        _("long prompts take more steps; slower large batches"),
    )
    yield _piece(_("quantised weights"), "--quantization fp8", 0, _("some accuracy"))
    yield _piece(_("the weights over more GPUs"), "--tp-size N", 0, _("GPUs"))


def start_budget(case: Case) -> Iterator[Piece]:
    """Yield advice when a start asks for more than is free."""
    free, capacity = case.fact.size("free") or 0, case.fact.size("capacity") or 0
    gap = case.finding.gap_bytes or 0
    share = int(100 * free / capacity) / 100 if capacity else 0.0
    if share >= 0.05:
        change = _("a share that is free: {free} of {total}").format(
            free=format_bytes(free), total=format_bytes(capacity)
        )
        yield _piece(change, f"--gpu-memory-utilization {share:.2f}", gap, _("a smaller KV cache"))
    flags = "nvidia-smi --query-compute-apps=pid,used_memory --format=csv"
    held = capacity - free
    yield _piece(_("end what holds {held} of the card").format(held=format_bytes(held)), flags, held)
    yield _piece(_("take a free GPU"), "CUDA_VISIBLE_DEVICES=N")


def smaller_pass(case: Case) -> Iterator[Piece]:
    """Yield advice when a forward pass or a capture of a serving engine found no room."""
    engine = _engine(case)
    if engine in ("llama.cpp", "ollama"):
        yield from buffers(case)
        return
    if engine == "text-generation-inference":
        yield _piece(_("a smaller warm-up: fewer prompt tokens at once"), "--max-batch-prefill-tokens 2048")
        yield _piece(_("fewer tokens in all"), "--max-batch-total-tokens N")
        return
    if case.phase in ("load", "kv cache") and engine != "sglang":
        yield _piece(_("the weights over more GPUs"), "--tensor-parallel-size N", 0, _("GPUs"))
        yield _piece(_("quantised weights"), "", 0, _("some accuracy"))
    yield from leave_room(case)
    if engine == "vllm":
        yield _piece(
            _("fewer tokens and sequences at once"),
            "--max-num-batched-tokens 2048 --max-num-seqs 64",
            0,
            _("throughput of long prompts"),
        )
    if engine == "sglang":
        yield _piece(_("smaller chunks of prompts"), "--chunked-prefill-size 2048", 0, _("throughput of long prompts"))
        yield _piece(_("fewer captured batch sizes"), "--cuda-graph-max-bs 16", 0, _("slower large batches"))


def leave_room(case: Case) -> Iterator[Piece]:
    """Yield advice that leaves room outside an allocator: the static share goes down."""
    engine, gap = _engine(case), case.finding.gap_bytes or case.fact.size("requested") or 0
    cost = _("a smaller KV cache")
    if engine == "sglang":
        share = _fraction(case, "mem_fraction_static")
        flags = f"--mem-fraction-static {_lowered(case, share, 0.8)}"
        yield _piece(_("a smaller static share, which leaves room for passes and graphs"), flags, gap, cost)
        return
    if engine == "vllm" or case.fact.framework == "vllm":
        share = _fraction(case, "gpu_memory_utilization")
        flags = f"--gpu-memory-utilization {_lowered(case, share, 0.85)}"
        yield _piece(_("a smaller share for the engine, which leaves room for passes and graphs"), flags, gap, cost)
        if case.phase == "graph capture" or case.fact.detail("phase") == "graph capture":
            yield _piece(_("no CUDA graphs"), "--enforce-eager", 0, _("slower decoding"))
        return
    if engine == "tensorrt-llm":
        yield _piece(_("a smaller share for the KV cache"), "--kv_cache_free_gpu_memory_fraction 0.8", gap, cost)
        yield _piece(_("smaller engine buffers"), "--max_num_tokens 4096 --max_batch_size 64")
        return
    yield _piece(
        _("leave room outside PyTorch's cache: a limit for the allocator"),
        "torch.cuda.set_per_process_memory_fraction(0.9)",
        0,
        _("less for tensors"),
    )


def _lowered(case: Case, share: float | None, otherwise: float) -> str:
    """Return a share that is lower by what was missing, and a hundredth; without figures a usual lower one."""
    total, gap = case.fact.size("capacity"), case.finding.gap_bytes
    if share is None:
        return f"{otherwise:.2f}"  # the log does not show the share: a usual one below the defaults
    step = 0.05 if not total or gap is None else gap / total + 0.02
    return f"{max(0.1, share - step):.2f}"


def buffers(case: Case) -> Iterator[Piece]:
    """Yield advice for one great buffer of llama.cpp, TensorRT-LLM or XLA."""
    fact, gain = case.fact, case.fact.size("requested") or 0
    if fact.framework == "jax/xla":
        yield _piece(_("a smaller batch, or shorter sequences"), "", 0, _("smaller kernels"))
        yield _piece(
            _("recompute activations in the backward pass"), "jax.checkpoint", 0, _("a third more computation")
        )
        yield _piece(_("let JAX take more of the card"), "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95")
        return
    if fact.framework == "tensorrt-llm":
        yield from leave_room(case)
        return
    if fact.detail("role") == "quantised load":
        yield _piece(_("weights over more GPUs, or fewer bits"), "device_map=auto load_in_4bit", 0, _("some accuracy"))
        yield _piece(_("let some modules lie in host memory"), "llm_int8_enable_fp32_cpu_offload=True", 0, _("slow"))
        return
    if fact.framework not in ("llama.cpp", "ollama"):
        yield _piece(_("a smaller batch, or shorter sequences"), "", 0, _("smaller kernels"))
        yield _piece(_("see who else holds the card"), "nvidia-smi")
        return
    if fact.detail("role") == "compute":
        yield _piece(_("flash attention, so that no attention scores are kept"), "-fa on", 0, _("none"))
        change = _("smaller batches of prompt tokens: half of 512 halves most of the buffer")
        yield _piece(change, "-ub 256", gain // 2, _("slower prompts"))
        yield _piece(_("one copy of the graph instead of four for pipelining"), "-DGGML_SCHED_MAX_COPIES=1")
        yield _piece(_("a shorter context"), "-c 8192", 0, _("shorter requests"))
        return
    if fact.detail("role") == "kv_cache":
        yield _piece(_("a KV cache of about one byte per value"), "-fa on -ctk q8_0 -ctv q8_0", gain * 15 // 32)
        yield _piece(_("a shorter context"), "-c 8192", 0, _("shorter requests"))
        return
    yield _piece(_("fewer layers on the GPU"), "-ngl N", 0, _("the others run on the CPU"))
    yield _piece(_("the experts in host memory"), "--cpu-moe", 0, _("slower; for mixtures of experts only"))
    yield _piece(_("the weights over several GPUs, or a smaller quantisation"), "-sm layer -ts 1,1")
