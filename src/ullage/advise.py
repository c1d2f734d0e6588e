"""The cheapest next change: run the engine's start again with one field changed, and see what it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from ullage.engines.serving import EngineStart
from ullage.errors import InputError
from ullage.fitting import ELASTIC_POOLS, Advice, FitResult, as_int, judge, replicas
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.spec.machine import Machine
from ullage.spec.model import LatentAttention
from ullage.spec.serving import ServingJob
from ullage.units import cdiv, format_bytes

_RANK = {"fits": 0, "tight": 1, "does_not_fit": 2}
MIN_BATCHED_TOKENS = 2048
#: Shares of the device worth trying; SGLang's must leave room for activations and graphs, so smaller ones come first.
FRACTIONS = {"vllm": (0.95,), "sglang": (0.88, 0.92, 0.95)}
MIN_CONTEXT = 1024
#: Where all is well, the answer comes before further advice: a few changes that are known to win much (the share of the
#: device, the attention layout, the formats of cache and weights).
ROOMY_PRICES = (1, 4, 5, 6)
MAX_TRIED_WHEN_IT_FITS = 3


class Change(Frozen):
    """A candidate: the job changed in one field. ``price`` orders them, cheapest first."""

    price: int
    change: str
    cost: str
    flags: str
    job: ServingJob
    context: int | None = None


def advice(
    result: FitResult, *, reserve: str, starter: Callable[[ServingJob], EngineStart], limit: int = 3
) -> tuple[Advice, ...]:
    """Return the changes that help, the cheapest that mends the verdict first.

    When the job fits, only changes that give noticeably more room (1 % of the device) are named.
    """
    found: list[tuple[tuple[int, int], Advice]] = []
    changes = sorted(candidates(result), key=lambda change: change.price)
    if result.verdict == "fits":
        changes = [change for change in changes if change.price in ROOMY_PRICES][:MAX_TRIED_WHEN_IT_FITS]
    for change in changes:
        tried = _try(change, result, reserve, starter)
        if tried is None:
            continue
        item, rank = tried
        wins = item.gain_bytes >= result.total_bytes.value / 100
        wins = wins or item.max_concurrency >= max(1.1 * result.max_concurrency.value, 1)
        if rank > _RANK[result.verdict] or item.gain_bytes <= 0 or not wins:
            continue
        found.append(((rank, change.price), item))
        if sum(key[0] == _RANK["fits"] for key, _item in found) >= limit:
            break  # nothing that comes later is both cheaper and better
    found.sort(key=lambda pair: pair[0])
    mending = [pair for pair in found if pair[0][0] < _RANK["does_not_fit"]]
    return tuple(item for _key, item in (mending or found)[:limit])


def _try(
    change: Change, result: FitResult, reserve: str, starter: Callable[[ServingJob], EngineStart]
) -> tuple[Advice, int] | None:
    try:
        engine = starter(change.job)
        tokens = change.context or result.context
        after = judge(
            engine,
            asked=change.job,
            context=tokens,
            concurrency=result.concurrency,
            reserve=reserve,
            counts=result.counts,
        )
    except InputError:
        return None  # the engine refuses this setting for this model
    item = Advice(
        change=change.change,
        gain_bytes=_gain(result, after),
        cost=change.cost,
        flags=change.flags,
        verdict=after.verdict,
        max_concurrency=as_int(after.max_concurrency.value) or 0,
        max_context=after.max_context,
    )
    return item, _RANK[after.verdict]


def _gain(before: FitResult, after: FitResult) -> int:
    """Return the room won per GPU: by needing less on the device, or by a larger share of the pool being free."""
    less = before.need.value - after.need.value
    if after.engine.starts:
        free = [result.pool.value - result.need.kv_cache_bytes for result in (before, after)]
        less = max(less, free[1] - free[0])
    return int(less)


def candidates(result: FitResult) -> Iterator[Change]:
    """Yield the changes that apply to this job."""
    yield from _settings(result)
    yield from _layouts(result)
    yield from _formats(result)
    yield from _smaller_context(result)


def _settings(result: FitResult) -> Iterator[Change]:
    job, given = result.job, result.asked
    tokens, seqs, fraction = job.max_num_batched_tokens, job.max_num_seqs, job.memory_fraction
    for share in FRACTIONS.get(job.engine, ()):
        if fraction is not None and fraction < share:
            flag = "--gpu-memory-utilization" if job.engine == "vllm" else "--memory-fraction"
            yield Change(
                price=1,
                change=_("give the engine {share:.0%} of the device").format(share=share),
                cost=_("less is left for anything else on the card"),
                flags=f"{flag} {share}",
                job=replace(given, memory_fraction=share),
            )
    if tokens is not None and tokens > MIN_BATCHED_TOKENS:
        lower = max(MIN_BATCHED_TOKENS, tokens // 4)
        yield Change(
            price=2,
            change=_("steps of {count:,} tokens").format(count=lower),
            cost=_("long prompts take more steps"),
            flags=f"--max-batched-tokens {lower}",
            job=replace(given, max_num_batched_tokens=lower),
        )
    per_replica = cdiv(result.concurrency, replicas(job))
    if seqs is not None and seqs > max(16, per_replica):
        fewer = max(16, per_replica)
        yield Change(
            price=3,
            change=_("at most {count:,} requests at a time").format(count=fewer),
            cost=_("further requests wait"),
            flags=f"--max-num-seqs {fewer}",
            job=replace(given, max_num_seqs=fewer),
        )
    if result.ledger.find("cuda_graphs") and not job.enforce_eager:
        yield Change(
            price=7,
            change=_("no CUDA graphs"),
            cost=_("slower decoding"),
            flags="--enforce-eager",
            job=replace(given, enforce_eager=True),
        )
    if job.redundant_experts:
        yield Change(
            price=4,
            change=_("no redundant experts"),
            cost=_("the load of the experts is less even"),
            flags="--redundant-experts 0",
            job=replace(given, redundant_experts=0),
        )


def _layouts(result: FitResult) -> Iterator[Change]:
    job, parallel = result.job, result.job.parallel
    if job.engine not in ELASTIC_POOLS:
        return
    latent = any(isinstance(mixer, LatentAttention) for layer in job.model.layers for mixer in layer.mixers)
    tensor = parallel.tensor_parallel_size
    if latent and tensor > 1 and not parallel.dp_attention and parallel.data_parallel_size == 1:
        spread = (
            replace(parallel, dp_attention=True, data_parallel_size=tensor)
            if job.engine == "sglang"
            else replace(parallel, tensor_parallel_size=1, data_parallel_size=tensor, expert_parallel=True)
        )
        typed = "--dp-attention" if job.engine == "sglang" else f"--tp 1 --dp {tensor} --ep"
        yield Change(
            price=4,
            change=_("attention data-parallel over {count} GPUs").format(count=tensor),
            cost=_("attention weights on every GPU; one request is held by one GPU"),
            flags=typed,
            job=replace(result.asked, parallel=spread),
        )
    machine = job.machine
    more = replace(machine, num_nodes=machine.num_nodes * 2) if tensor >= machine.gpus_per_node else machine
    if more is machine:
        doubled = replace(parallel, tensor_parallel_size=tensor * 2)
    else:
        doubled = replace(parallel, pipeline_parallel_size=parallel.pipeline_parallel_size * 2)
    if machine.gpus_per_node < machine.gpu.gpus_per_node and more is not machine:
        more = replace(machine, gpus_per_node=machine.gpus_per_node * 2)
        doubled = replace(parallel, tensor_parallel_size=tensor * 2)
    extra = more.num_gpus - machine.num_gpus
    yield Change(
        price=9 if extra else 3,
        change=_("{count} GPUs of this kind").format(count=more.num_gpus)
        if extra
        else _("tensor parallel over {count} GPUs").format(count=tensor * 2),
        cost=_("{count} more GPUs").format(count=extra) if extra else _("more communication"),
        flags=f"--on {machine_text(more)} --tp {doubled.tensor_parallel_size} --pp {doubled.pipeline_parallel_size}",
        job=replace(result.asked, machine=more, parallel=doubled),
    )


def _formats(result: FitResult) -> Iterator[Change]:
    job = result.job
    if job.engine in ELASTIC_POOLS and job.kv_cache_dtype in (None, "auto", "bfloat16", "float16", "bf16", "fp16"):
        name = "fp8" if job.engine == "vllm" else "fp8_e4m3"
        yield Change(
            price=5,
            change=_("KV cache in FP8"),
            cost=_("a little accuracy: measure it"),
            flags=f"--kv-dtype {name}",
            job=replace(result.asked, kv_cache_dtype=name),
        )
    if job.engine in ELASTIC_POOLS and job.model.quantization is None and job.quantization is None:
        yield Change(
            price=6,
            change=_("weights in FP8"),
            cost=_("some accuracy: measure it"),
            flags="--quantization fp8",
            job=replace(result.asked, quantization="fp8"),
        )


def _smaller_context(result: FitResult) -> Iterator[Change]:
    if result.verdict == "fits" or result.context <= MIN_CONTEXT:
        return
    shorter = min(result.context // 2, result.max_context or result.context // 2)
    if shorter < MIN_CONTEXT:
        shorter = MIN_CONTEXT
    yield Change(
        price=8,
        change=_("requests of at most {count:,} tokens").format(count=shorter),
        cost=_("longer requests are refused"),
        flags=f"--context {shorter}",
        job=replace(result.asked, max_model_len=shorter),
        context=shorter,
    )


def next_command(result: FitResult) -> str:
    """Return what to type next: the launch line when it fits, else the fit again with the first advice."""
    if result.verdict == "fits":
        return launch_line(result)
    if result.advice and result.advice[0].flags and result.advice[0].verdict != "does_not_fit":
        return _merge_flags(fit_line(result), result.advice[0].flags)
    return f"ullage explain {_largest(result)} {result.job.model.name}"


def _largest(result: FitResult) -> str:
    terms = [term for term in result.ledger.terms() if term.name != "kv_cache"]
    return max(terms, key=lambda term: term.bytes).name if terms else "weights"


def fit_line(result: FitResult) -> str:
    """Return this fit as a command line."""
    job, machine = result.job, result.job.machine
    parts = [
        "ullage fit serve",
        job.model.name,
        f"--on {machine_text(machine)}",
    ]
    parts.append(f"--engine {job.engine}@{_shell(job.engine_version)}")
    if job.engine in ELASTIC_POOLS:
        parts.append(f"--tp {job.parallel.tensor_parallel_size}")
    parts.append(f"--context {result.context} --concurrency {result.concurrency}")
    return " ".join(parts)


def machine_text(machine: Machine) -> str:
    """Return a machine as it is typed after ``--on``: ``8xH200``, ``2x8xH20``."""
    nodes = f"{machine.num_nodes}x" if machine.num_nodes > 1 else ""
    return f"{nodes}{machine.gpus_per_node}x{_shell(machine.gpu.name)}"


def _merge_flags(line: str, flags: str) -> str:
    """Return a command line with ``flags`` (name and value in turn) in place of what it said for them."""
    words, new = line.split(), flags.split()
    for name, value in zip(new, [*new[1:], ""], strict=True):
        if name in words:
            at = words.index(name)
            del words[at : at + (1 if value.startswith("--") or not value else 2)]
    return " ".join(words + new)


def _shell(text: str) -> str:
    return text if text.replace("-", "").replace(".", "").isalnum() else "'" + text.replace("'", "") + "'"


def launch_line(result: FitResult) -> str:
    """Return the engine's own launch line for this job."""
    job, asked, parallel = result.job, result.asked, result.job.parallel
    if job.native:
        return job.native
    if job.engine == "vllm":
        parts = [f"vllm serve {job.model.name}", f"--max-model-len {result.context}"]
        names = ("--tensor-parallel-size", "--pipeline-parallel-size", "--data-parallel-size")
        tail = [
            "--enable-expert-parallel" if parallel.expert_parallel else "",
            f"--kv-cache-dtype {asked.kv_cache_dtype}" if asked.kv_cache_dtype else "",
            f"--quantization {asked.quantization}" if asked.quantization else "",
            f"--max-num-seqs {asked.max_num_seqs}" if asked.max_num_seqs else "",
            f"--max-num-batched-tokens {asked.max_num_batched_tokens}" if asked.max_num_batched_tokens else "",
            "--enforce-eager" if asked.enforce_eager else "",
            f"--gpu-memory-utilization {asked.memory_fraction}" if asked.memory_fraction else "",
        ]
    elif job.engine == "sglang":
        parts = [f"python -m sglang.launch_server --model-path {job.model.name}", f"--context-length {result.context}"]
        names = ("--tp-size", "--pp-size", "--dp-size")
        tail = [
            "--enable-dp-attention" if parallel.dp_attention else "",
            f"--kv-cache-dtype {asked.kv_cache_dtype}" if asked.kv_cache_dtype else "",
            f"--quantization {asked.quantization}" if asked.quantization else "",
            f"--max-running-requests {asked.max_num_seqs}" if asked.max_num_seqs else "",
            f"--chunked-prefill-size {asked.max_num_batched_tokens}" if asked.max_num_batched_tokens else "",
            f"--mem-fraction-static {asked.memory_fraction}" if asked.memory_fraction else "",
        ]
    else:
        return f"llama-server -m MODEL.gguf -c {result.context * result.concurrency} -np {result.concurrency} -ngl 999"
    sizes = (parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.data_parallel_size)
    parts += [f"{name} {size}" for name, size in zip(names, sizes, strict=True) if size > 1]
    return " ".join(part for part in (*parts, *tail) if part)


def gain_text(item: Advice) -> str:
    """Return the gain of an advice for reading."""
    return _("{size} more room per GPU").format(size=format_bytes(item.gain_bytes))
