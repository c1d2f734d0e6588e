"""The catalogue for serving: what can be changed at the start of an engine, cheap changes first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ullage.fitting import ELASTIC_POOLS, FitResult, replicas
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.launch import own_flag
from ullage.spec.machine import Machine
from ullage.spec.model import LatentAttention, MoEFFN
from ullage.spec.serving import ServingJob, ServingParallel
from ullage.units import GiB, cdiv

MIN_BATCHED_TOKENS = 2048
#: Shares of the device worth trying; SGLang's must leave room for activations and graphs.
FRACTIONS = {"vllm": (0.85, 0.9, 0.95), "sglang": (0.85, 0.88, 0.92, 0.95)}
SMALLER_FRACTIONS = (0.95, 0.9, 0.85, 0.8, 0.7)
MIN_CONTEXT = 1024
#: Largest batch of which a graph is kept, where fewer graphs are advised.
FEW_GRAPHS = 16
FREE_PRICE, SMALL_PRICE = 1, 2
#: Weights come over PCIe in every step: some 25 GB/s of 16 lanes of generation 4. A step of decoding takes tens of
#: milliseconds; where the copies alone take more than a tenth of a second, more GPUs are told first.
PCIE_BYTES_PER_S, SLOW_STEP_S, SLOW_OFFLOAD_PRICE = 25e9, 0.1, 10
MOST_DOUBLINGS = 4


class Change(Frozen):
    """A candidate: the job with some fields replaced. ``price`` orders them, cheapest first.

    ``key`` names the change; of several sizes of one, the mildest that is enough is told. ``typed`` is in the engine's
    own words, ``flags`` are of ``ullage fit``; ``context`` and ``concurrency`` are what is asked of the changed job.
    """

    key: str
    price: int
    change: str
    cost: str
    flags: str
    given: ServingJob
    fields: tuple[tuple[str, Any], ...]
    typed: str = ""
    context: int | None = None
    concurrency: int | None = None

    @property
    def job(self) -> ServingJob:
        """The job as changed."""
        return replace(self.given, **dict(self.fields))


def candidates(result: FitResult) -> Iterator[Change]:
    """Yield the changes that apply to this job."""
    yield from _settings(result)
    yield from _graphs(result)
    yield from _layouts(result)
    yield from _formats(result)
    yield from _fewer_requests(result)
    yield from _smaller_context(result)


def _settings(result: FitResult) -> Iterator[Change]:
    job, given, vllm = result.job, result.asked, result.job.engine == "vllm"
    tokens, seqs, fraction = job.max_num_batched_tokens, job.max_num_seqs, job.memory_fraction
    for share in FRACTIONS.get(job.engine, ()):
        if fraction is not None and fraction < share:
            yield Change(
                key="memory_fraction",
                price=FREE_PRICE,
                change=_("give the engine {share:.0%} of the device").format(share=share),
                cost=_("less is left for anything else on the card"),
                flags=f"{'--gpu-memory-utilization' if vllm else '--memory-fraction'} {share}",
                typed=f"{own_flag(job.engine, 'memory_fraction')} {share}",
                given=given,
                fields=(("memory_fraction", share),),
            )
    if vllm and fraction is not None and not result.engine.starts:
        yield from _smaller_shares(result, fraction)
    if tokens is not None and tokens > MIN_BATCHED_TOKENS:
        lower = max(MIN_BATCHED_TOKENS, tokens // 4)
        yield Change(
            key="max_num_batched_tokens",
            price=SMALL_PRICE,
            change=_("steps of {count:,} tokens").format(count=lower),
            cost=_("long prompts take more steps"),
            flags=f"--max-batched-tokens {lower}",
            typed=f"{own_flag(job.engine, 'max_num_batched_tokens')} {lower}",
            given=given,
            fields=(("max_num_batched_tokens", lower),),
        )
    per_replica = cdiv(result.concurrency, replicas(job))
    if seqs is not None and seqs > max(16, per_replica):
        fewer = max(16, per_replica)
        yield Change(
            key="max_num_seqs",
            price=3,
            change=_("at most {count:,} requests at a time").format(count=fewer),
            cost=_("further requests wait"),
            flags=f"--max-num-seqs {fewer}",
            typed=f"{own_flag(job.engine, 'max_num_seqs')} {fewer}",
            given=given,
            fields=(("max_num_seqs", fewer),),
        )


def _smaller_shares(result: FitResult, fraction: float) -> Iterator[Change]:
    """Yield smaller shares of the device: vLLM does not start where less is free than it was told to take."""
    for share in SMALLER_FRACTIONS:
        if share < fraction:
            yield Change(
                key="smaller_memory_fraction",
                price=FREE_PRICE,
                change=_("ask for {share:.0%} of the device, which is there").format(share=share),
                cost=_("the cache is smaller"),
                flags=f"--gpu-memory-utilization {share}",
                typed=f"--gpu-memory-utilization {share}",
                given=result.asked,
                fields=(("memory_fraction", share),),
            )


def _graphs(result: FitResult) -> Iterator[Change]:
    """Yield fewer CUDA graphs, or none, and fewer copies of experts."""
    job, given = result.job, result.asked
    if result.ledger.find("cuda_graphs") and not job.enforce_eager:
        if job.engine == "sglang" and (job.cuda_graph_max_batch_size or FEW_GRAPHS + 1) > FEW_GRAPHS:
            yield Change(
                key="cuda_graph_sizes",
                price=4,
                change=_("CUDA graphs up to a batch of {count}").format(count=FEW_GRAPHS),
                cost=_("slower decoding of larger batches"),
                flags="",
                typed=f"{own_flag(job.engine, 'cuda_graph_max_batch_size')} {FEW_GRAPHS}",
                given=given,
                fields=(("cuda_graph_max_batch_size", FEW_GRAPHS),),
            )
        if job.engine == "vllm":
            sizes = (1, 2, 4, 8, FEW_GRAPHS)
            yield Change(
                key="cuda_graph_sizes",
                price=4,
                change=_("CUDA graphs up to a batch of {count}").format(count=FEW_GRAPHS),
                cost=_("slower decoding of larger batches"),
                flags="",
                typed="--compilation-config '{\"cudagraph_capture_sizes\": [1, 2, 4, 8, 16]}'",
                given=given,
                fields=(("cuda_graph_sizes", sizes),),
            )
        yield Change(
            key="enforce_eager",
            price=7,
            change=_("no CUDA graphs"),
            cost=_("slower decoding"),
            flags="--enforce-eager",
            typed="--enforce-eager" if job.engine == "vllm" else "--disable-cuda-graph",
            given=given,
            fields=(("enforce_eager", True),),
        )
    if job.redundant_experts:
        yield Change(
            key="redundant_experts",
            price=4,
            change=_("no redundant experts"),
            cost=_("the load of the experts is less even"),
            flags="--redundant-experts 0",
            typed="--ep-num-redundant-experts 0" if job.engine == "sglang" else "",
            given=given,
            fields=(("redundant_experts", 0),),
        )


def _layouts(result: FitResult) -> Iterator[Change]:
    job, given, parallel = result.job, result.asked, result.job.parallel
    if job.engine not in ELASTIC_POOLS:
        return
    latent = any(isinstance(mixer, LatentAttention) for layer in job.model.layers for mixer in layer.mixers)
    tensor, sglang = parallel.tensor_parallel_size, job.engine == "sglang"
    if latent and tensor > 1 and not parallel.dp_attention and parallel.data_parallel_size == 1:
        spread = (
            replace(parallel, dp_attention=True, data_parallel_size=tensor)
            if sglang
            else replace(parallel, tensor_parallel_size=1, data_parallel_size=tensor, expert_parallel=True)
        )
        own = f"--tensor-parallel-size 1 --data-parallel-size {tensor} --enable-expert-parallel"
        yield Change(
            key="dp_attention",
            price=4,
            change=_("attention data-parallel over {count} GPUs").format(count=tensor),
            cost=_("attention weights on every GPU; one request is held by one GPU"),
            flags="--dp-attention" if sglang else f"--tp 1 --dp {tensor} --ep",
            typed=f"--dp-size {tensor} --enable-dp-attention" if sglang else own,
            given=given,
            fields=(("parallel", spread),),
        )
    mixture = any(isinstance(block, MoEFFN) for layer in job.model.layers for block in layer.ffns)
    if mixture and tensor > 1 and not parallel.expert_parallel and not sglang:
        yield Change(
            key="expert_parallel",
            price=4,
            change=_("whole experts on each GPU instead of slices"),
            cost=_("the load of the experts is less even"),
            flags="--ep",
            typed="--enable-expert-parallel",
            given=given,
            fields=(("parallel", replace(parallel, expert_parallel=True)),),
        )
    if latent and not sglang and tensor > 1 and parallel.decode_context_parallel_size == 1:
        yield Change(
            key="decode_context_parallel",
            price=4,
            change=_("the KV cache of a request over {count} GPUs").format(count=tensor),
            cost=_("more communication in decoding"),
            flags=f"--dcp {tensor}",
            typed=f"--decode-context-parallel-size {tensor}",
            given=given,
            fields=(("parallel", replace(parallel, decode_context_parallel_size=tensor)),),
        )
    yield from _more_gpus(result)


def _more_gpus(result: FitResult) -> Iterator[Change]:
    """Yield twice the GPUs, and again twice, as long as they may be missing."""
    machine, parallel = result.job.machine, result.job.parallel
    for _doubling in range(1 if result.verdict == "fits" else MOST_DOUBLINGS):
        machine, parallel = _doubled(machine, parallel)
        yield _spread_wider(result, machine, parallel)


def _doubled(machine: Machine, parallel: ServingParallel) -> tuple[Machine, ServingParallel]:
    """Return twice the ranks: idle GPUs of the machine first, then more of them in the node, then more nodes."""
    tensor = parallel.tensor_parallel_size
    wider = replace(parallel, tensor_parallel_size=tensor * 2)
    if tensor < machine.gpus_per_node:
        return machine, wider
    if machine.gpus_per_node < machine.gpu.gpus_per_node:
        return replace(machine, gpus_per_node=machine.gpus_per_node * 2), wider
    more = replace(machine, num_nodes=machine.num_nodes * 2)
    return more, replace(parallel, pipeline_parallel_size=parallel.pipeline_parallel_size * 2)


def _spread_wider(result: FitResult, more: Machine, parallel: ServingParallel) -> Change:
    job = result.job
    extra = more.num_gpus - job.machine.num_gpus
    size, stages = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    own = "--tensor-parallel-size {}" if job.engine == "vllm" else "--tp-size {}"
    if stages > 1:
        own += " --pipeline-parallel-size {}" if job.engine == "vllm" else " --pp-size {}"
    cost = _("one more GPU") if extra == 1 else _("{count} more GPUs").format(count=extra)
    return Change(
        key="more_gpus",
        price=9 if extra else 3,
        change=_("{count} GPUs of this kind").format(count=more.num_gpus)
        if extra
        else _("tensor parallel over {count} GPUs").format(count=size),
        cost=cost if extra else _("more communication"),
        flags=f"--on {machine_text(more)} --tp {size} --pp {stages}",
        typed=own.format(size, stages),
        given=result.asked,
        fields=(("machine", more), ("parallel", parallel)),
    )


def _formats(result: FitResult) -> Iterator[Change]:
    job = result.job
    if job.engine in ELASTIC_POOLS and job.kv_cache_dtype in (None, "auto", "bfloat16", "float16", "bf16", "fp16"):
        name = "fp8" if job.engine == "vllm" else "fp8_e4m3"
        yield Change(
            key="kv_cache_dtype",
            price=5,
            change=_("KV cache in FP8"),
            cost=_("a little accuracy: measure it"),
            flags=f"--kv-dtype {name}",
            typed=f"{own_flag(job.engine, 'kv_cache_dtype')} {name}",
            given=result.asked,
            fields=(("kv_cache_dtype", name),),
        )
    if job.engine in ELASTIC_POOLS and job.model.quantization is None and job.quantization is None:
        yield Change(
            key="quantization",
            price=6,
            change=_("weights in FP8"),
            cost=_("some accuracy: measure it"),
            flags="--quantization fp8",
            typed="--quantization fp8",
            given=result.asked,
            fields=(("quantization", "fp8"),),
        )
    if job.engine == "vllm" and not job.cpu_offload_bytes and result.verdict != "fits":
        yield _offload(result)


def _offload(result: FitResult) -> Change:
    """Return the least whole GiB of weights on the host that make up for what is missing, at most all of them."""
    missing = result.need.value + result.reserve_bytes - result.total_bytes.value
    missing = max(missing, result.need.kv_cache_bytes - result.pool.value, 1)
    weights = result.ledger.find("weights")
    size = int(cdiv(int(missing), GiB)) + 1
    size = min(size, int(cdiv(weights.bytes, GiB))) if weights and weights.bytes else size
    seconds = size * GiB / PCIE_BYTES_PER_S
    return Change(
        key="cpu_offload",
        price=SLOW_OFFLOAD_PRICE if seconds > SLOW_STEP_S else 8,
        change=_("{size} GiB of weights in host memory").format(size=size),
        cost=_("they come over PCIe in every step: {seconds:.2g} s at 25 GB/s").format(seconds=seconds),
        flags=f"--cpu-offload {size}GiB",
        typed=f"--cpu-offload-gb {size}",
        given=result.asked,
        fields=(("cpu_offload_bytes", size * GiB),),
    )


def _fewer_requests(result: FitResult) -> Iterator[Change]:
    """Yield as many requests at a time as the pool holds: as expected, surely, and with the reserve left free."""
    spread = replicas(result.job)
    cost = result.need.kv_cache_bytes / cdiv(result.concurrency, spread)
    room = result.total_bytes.value - result.reserve_bytes - result.need.rest.value
    held = {result.max_concurrency.value, result.max_concurrency.low}
    held.add(min(result.max_concurrency.low, spread * (room // cost)) if cost > 0 else 0)
    for count in sorted((int(size) for size in held if 1 <= size < result.concurrency), reverse=True):
        yield Change(
            key="concurrency",
            price=4,
            change=_("{count:,} requests at a time instead of {asked:,}").format(count=count, asked=result.concurrency),
            cost=_("further requests wait"),
            flags=f"--concurrency {count}",
            given=result.asked,
            fields=(),
            concurrency=count,
        )


def _smaller_context(result: FitResult) -> Iterator[Change]:
    """Yield shorter requests: the longest that the pool holds, and half of what was asked."""
    if result.verdict == "fits" or result.context <= MIN_CONTEXT:
        return
    own = {"vllm": "--max-model-len", "sglang": "--context-length"}.get(result.job.engine, "-c")
    held = min(result.max_context, result.context)
    lengths = {length for length in (held, result.context // 2) if MIN_CONTEXT <= length < result.context}
    for shorter in sorted(lengths or {MIN_CONTEXT}, reverse=True):
        yield Change(
            key="max_model_len",
            price=6,
            change=_("requests of at most {count:,} tokens").format(count=shorter),
            cost=_("longer requests are refused"),
            flags=f"--context {shorter}",
            typed=f"{own} {shorter}",
            given=result.asked,
            fields=(("max_model_len", shorter),),
            context=shorter,
        )


def machine_text(machine: Machine) -> str:
    """Return a machine as it is typed after ``--on``: ``8xH200``, ``2x8xH20``."""
    nodes = f"{machine.num_nodes}x" if machine.num_nodes > 1 else ""
    return f"{nodes}{machine.gpus_per_node}x{shell(machine.gpu.name)}"


def shell(text: str) -> str:
    """Return a word as a shell takes it."""
    return text if text.replace("-", "").replace(".", "").isalnum() else "'" + text.replace("'", "") + "'"
