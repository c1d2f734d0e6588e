"""Model + machine + engine → :class:`FitResult`: what is needed, what is there, and whether it fits.

How the verdict is reached is written down in ``docs/verdict.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import field, replace
from typing import Any

from ullage.account.parameters import Counts, count
from ullage.catalog.calibration import with_calibration
from ullage.engines.serving import Amount, EngineStart, RankClass, start
from ullage.errors import EXIT_DOES_NOT_FIT, EXIT_OK, EXIT_TIGHT, InputError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.ledger import Ledger
from ullage.spec.serving import ServingJob
from ullage.units import cdiv, format_bytes, parse_size

DEFAULT_RESERVE = "20%"
#: Engines whose KV pool takes whatever their memory fraction leaves, so that the pool's size says nothing of the need.
ELASTIC_POOLS = frozenset({"vllm", "sglang"})
EXIT_CODES = {"fits": EXIT_OK, "tight": EXIT_TIGHT, "does_not_fit": EXIT_DOES_NOT_FIT}
MAX_CONTEXT = 2**31


class Need(Frozen):
    """What one rank needs on its device in bytes: everything but the pool, and the pool that was asked for."""

    rest: Amount
    kv_cache_bytes: int

    @property
    def value(self) -> float:
        """Expected need."""
        return self.rest.value + self.kv_cache_bytes

    @property
    def high(self) -> float:
        """Upper end of the need."""
        return self.rest.high + self.kv_cache_bytes


class Point(Frozen):
    """A point of the curve: requests of ``context`` tokens at a time."""

    context: int
    concurrency: int


class Advice(Frozen):
    """One change and what it gives: ``gain_bytes`` of head-room per GPU, at ``cost``.

    ``flags`` are of ``ullage fit``, ``typed`` is in the engine's own words; ``key`` names the change in the catalogue.
    """

    change: str
    gain_bytes: int
    cost: str
    flags: str = ""
    typed: str = ""
    key: str = ""
    verdict: str = ""
    max_concurrency: int = 0
    max_context: int = 0


class FitResult(Frozen):
    """The answer of a fit, in values; :mod:`ullage.report` prints it.

    ``asked`` is the job as given, ``job`` the same with every default filled in.
    """

    asked: ServingJob
    job: ServingJob
    engine: EngineStart
    counts: Counts
    verdict: str
    reason: str
    context: int
    concurrency: int
    total_bytes: Amount
    reserve_bytes: int
    worst: RankClass
    need: Need
    pool: Amount
    max_context: int
    max_concurrency: Amount
    curve: tuple[Point, ...]
    next_command: str = ""
    advice: tuple[Advice, ...] = ()
    warnings: tuple[str, ...] = field(default=())

    @property
    def exit_code(self) -> int:
        """0 fits, 4 tight, 3 does not fit."""
        return EXIT_CODES[self.verdict]

    @property
    def ledger(self) -> Ledger:
        """The ledger of the fullest rank."""
        return self.worst.ledger


def parse_reserve(text: str, total_bytes: int) -> int:
    """Parse ``20%``, ``0`` or ``8GiB`` into bytes of a device of ``total_bytes``."""
    stated = text.strip()
    try:
        if stated.endswith("%"):
            share = float(stated[:-1])
            if not 0 <= share < 100:
                raise ValueError
            return int(total_bytes * share / 100)
        if stated.strip("0.").isdigit():
            raise ValueError  # bytes, per cent or GiB?
        return parse_size(stated)
    except (ValueError, InputError):
        raise InputError(
            _("{text!r} is not a reserve").format(text=text[:40]), where="--reserve", remedy=_("write 20% or 8GiB")
        ) from None


def reserve_of(text: str, total_bytes: int) -> int:
    """Return the reserve in bytes; one that no job could leave free is refused."""
    size = parse_reserve(text, total_bytes)
    if size >= total_bytes > 0:
        raise InputError(
            _("a reserve of {size} leaves nothing of {total}").format(
                size=format_bytes(size), total=format_bytes(total_bytes)
            ),
            where="--reserve",
            remedy=_("write 20% or 8GiB"),
        )
    return size


def device_total(job: ServingJob) -> Amount:
    """Return what the device reports as its total: as stated in the job, else the catalog's figure with its range."""
    if job.device_total_bytes is not None:
        return Amount(value=job.device_total_bytes, low=job.device_total_bytes, high=job.device_total_bytes)
    gpu = job.machine.gpu
    return Amount(value=gpu.total_bytes, low=gpu.total_low_bytes, high=gpu.total_high_bytes)


def replicas(job: ServingJob) -> int:
    """Return over how many equal caches requests are spread."""
    return max(1, job.parallel.data_parallel_size)


def fit_serving(
    job: ServingJob,
    *,
    context: int | None = None,
    concurrency: int | None = None,
    reserve: str = DEFAULT_RESERVE,
    advise: bool = True,
    calibrated: bool = True,
    starter: Callable[[ServingJob], EngineStart] = start,
) -> FitResult:
    """Judge a serving job.

    Args:
        job: what is to be served.
        context: tokens per request that are asked for; the job's own length when not given.
        concurrency: requests of that length at a time that are asked for; one when not given.
        reserve: memory to keep free, ``20%`` of the device or ``8GiB``.
        advise: also look for the cheapest changes, by running the engine's start again.
        calibrated: use what ``ullage calibrate`` measured on this kind of GPU, if anything.
        starter: the engine's start arithmetic (tests put a small one here).

    Raises:
        InputError: impossible settings.
    """
    _check_asked(context, concurrency)
    job = with_calibration(job) if calibrated else job
    engine = starter(job)
    if concurrency and engine.job.max_num_seqs and cdiv(concurrency, replicas(engine.job)) > engine.job.max_num_seqs:
        per_replica = cdiv(concurrency, replicas(engine.job))
        sentence = _("max_num_seqs raised to {count} for the concurrency asked").format(count=per_replica)
        job = replace(job, max_num_seqs=per_replica, assumed=(*job.assumed, sentence))
        engine = starter(job)
    result = judge(engine, asked=job, context=context, concurrency=concurrency or 1, reserve=reserve)
    if not advise:
        return result
    from ullage.advise import advice, next_command

    found = advice(result, reserve=reserve, starter=starter)
    result = replace(result, advice=found)
    return replace(result, next_command=next_command(result))


def _check_asked(context: int | None, concurrency: int | None) -> None:
    for name, value in (("--context", context), ("--concurrency", concurrency)):
        if value is not None and not 1 <= value <= MAX_CONTEXT:
            raise InputError(
                _("{value} cannot be used").format(value=value),
                where=name,
                remedy=_("give a number from 1 to {limit:,}").format(limit=MAX_CONTEXT),
            )


def judge(
    engine: EngineStart,
    *,
    asked: ServingJob,
    context: int | None,
    concurrency: int,
    reserve: str,
    counts: Counts | None = None,
) -> FitResult:
    """Return the verdict on a started engine, and the largest that it would hold."""
    job = engine.job
    tokens = context or job.max_model_len or job.model.max_position_embeddings or 4096
    total = device_total(job)
    reserve_bytes = reserve_of(reserve, int(total.value))
    per_replica = cdiv(concurrency, replicas(job))
    asked_kv = engine.kv.bytes_of_request(tokens) * per_replica
    needs = [Need(rest=_rest(ranks.ledger), kv_cache_bytes=asked_kv) for ranks in engine.ranks]
    at = max(range(len(needs)), key=lambda index: needs[index].value)
    pool = pool_for_requests(engine, needs[at], total)
    verdict, reason = _verdict(engine, needs[at], pool, total, reserve_bytes)
    longest = largest_context(engine, pool, per_replica)
    by_default = context is None and asked.max_model_len is None
    if verdict == "does_not_fit" and by_default and longest and _starts_anyway(engine):
        verdict = "tight"
        reason = _("it starts; its pool holds {longest:,} tokens of a request, the model declares {tokens:,}").format(
            longest=longest, tokens=tokens
        )
    return FitResult(
        asked=asked,
        job=job,
        engine=engine,
        counts=counts or count(job.model),
        verdict=verdict,
        reason=reason,
        context=tokens,
        concurrency=concurrency,
        total_bytes=total,
        reserve_bytes=reserve_bytes,
        worst=engine.ranks[at],
        need=needs[at],
        pool=pool,
        max_context=longest,
        max_concurrency=concurrency_at(engine, pool, tokens),
        curve=_curve(engine, pool, tokens),
        warnings=tuple(dict.fromkeys((*engine.warnings, *engine.ranks[at].ledger.warnings, *_too_long(job, tokens)))),
    )


def _too_long(job: ServingJob, tokens: int) -> tuple[str, ...]:
    """Warn of requests that are longer than what the model was made for.

    Source: vllm@0.33.0:vllm/config/model.py:_get_and_verify_max_len; sglang@0.5.23:srt/configs/model_config.py:
    ModelConfig._derive_context_length (both refuse unless an environment variable allows it).
    """
    declared = job.model.max_position_embeddings
    if not declared or tokens <= declared:
        return ()
    switch = {"vllm": "VLLM_ALLOW_LONG_MAX_MODEL_LEN=1", "sglang": "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN=1"}
    warning = _("{tokens:,} tokens are more than the {declared:,} that the model declares").format(
        tokens=tokens, declared=declared
    )
    if job.engine in switch:
        allowed = _("{engine} refuses them, unless its own limit is scaled or {switch} is set")
        warning += "; " + allowed.format(engine=job.engine, switch=switch[job.engine])
    return (warning,)


def pool_for_requests(engine: EngineStart, need: Need, total: Amount) -> Amount:
    """Return the bytes per GPU that requests may take: the engine's pool, or what a fixed pool could grow to."""
    if engine.job.engine in ELASTIC_POOLS:
        return engine.kv_cache_bytes
    return Amount(
        value=max(0.0, total.value - need.rest.value),
        low=max(0.0, total.low - need.rest.high),
        high=max(0.0, total.high - need.rest.low),
    )


def _rest(ledger: Ledger) -> Amount:
    """Return everything on the device but the KV pool."""
    terms = [term for term in ledger.terms() if term.name != "kv_cache"]
    return Amount(
        value=sum(term.bytes for term in terms),
        low=sum(term.low_bytes for term in terms),
        high=sum(term.high_bytes for term in terms),
    )


def _starts_anyway(engine: EngineStart) -> bool:
    """Return whether the engine starts although its pool is smaller than a request of the model's whole length.

    vLLM refuses that; SGLang's pool is what its fraction leaves, and longer requests are refused one by one.
    Source: sglang@0.5.23:srt/managers/tp_worker.py:TpModelWorker (max_req_len from the pool's size).
    """
    return engine.starts and not engine.doubt and engine.job.engine == "sglang"


def _verdict(engine: EngineStart, need: Need, pool: Amount, total: Amount, reserve_bytes: int) -> tuple[str, str]:
    """Return the verdict and the one sentence that says why (see ``docs/verdict.md``)."""
    load, asked = engine.load_peak_bytes or 0, need.kv_cache_bytes
    refusals = (
        (not engine.starts and not engine.doubt, engine.reason or _("the engine does not start")),
        (need.value > total.value, _("more is needed than the device has")),
        (pool.value < asked and not engine.doubt, _("the KV pool does not hold the requests asked for")),
        (load > total.high, _("loading the weights needs more than the device has")),
    )
    for refused, reason in refusals:
        if refused:
            return "does_not_fit", reason
    doubts = (
        (bool(engine.doubt), engine.doubt),
        (need.high > total.low, _("it fits only inside the margin of error")),
        (pool.low < asked, _("the KV pool holds it only at the better end of its range")),
        (load > total.low, _("loading the weights fits only inside the margin of error")),
        (need.value + reserve_bytes > total.value, _("it fits only inside the reserve")),
    )
    for doubted, reason in doubts:
        if doubted:
            return "tight", reason
    return "fits", _("it fits, with the reserve to spare")


# --------------------------------------------------------------------------------------------------- the largest thing


def concurrency_at(engine: EngineStart, pool: Amount, context: int) -> Amount:
    """Return how many requests of ``context`` tokens the pools of all replicas hold at a time."""
    cost = engine.kv.bytes_of_request(context)
    spread = replicas(engine.job)
    if cost <= 0:
        return Amount(value=math.inf, low=math.inf, high=math.inf)
    held = [max(0, int(size // cost)) * spread for size in (pool.value, pool.low, pool.high)]
    return Amount(value=held[0], low=held[1], high=held[2])


def largest_context(engine: EngineStart, pool: Amount, per_replica: int) -> int:
    """Return the longest request of which ``per_replica`` fit in a pool at a time, up to what the model declares."""
    job = engine.job
    limit = max(job.model.max_position_embeddings or 0, job.max_model_len or 0) or 2**24
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if engine.kv.bytes_of_request(middle) * per_replica <= pool.value:
            low = middle
        else:
            high = middle - 1
    return low


def _curve(engine: EngineStart, pool: Amount, asked: int) -> tuple[Point, ...]:
    """Return a few points: contexts by powers of four around the one asked, and how many requests of each fit."""
    limit = engine.job.max_model_len or engine.job.model.max_position_embeddings or asked
    contexts = {asked, limit} | {2**power for power in range(10, 22, 2) if 2**power < limit}
    points = []
    for context in sorted(contexts):
        held = concurrency_at(engine, pool, context).value
        if math.isfinite(held):
            points.append(Point(context=context, concurrency=int(held)))
    return tuple(points)


def as_int(value: float) -> int | None:
    """Return a whole number, or None for one without bound."""
    return int(value) if math.isfinite(value) else None


def job_summary(result: FitResult) -> dict[str, Any]:
    """Return the job as understood, as plain values: what was set or filled in, and what was assumed."""
    from ullage.spec.codec import encode

    job = result.job
    left_out = {"model", "machine", "draft_model", "assumed", "parallel"}
    found = {
        name: encode(value)
        for name, value in vars(job).items()
        if name not in left_out and value is not None and value != () and value != ""
    }
    gpu = job.machine.gpu
    return {
        "kind": "serve",
        "model": job.model.name,
        "gpu": gpu.name,
        "num_gpus": job.machine.num_gpus,
        "num_nodes": job.machine.num_nodes,
        **found,
        "parallel": {name: encode(value) for name, value in vars(job.parallel).items() if value is not None},
        "context": result.context,
        "concurrency": result.concurrency,
        "assumed": list(dict.fromkeys((*job.model.assumed, *job.assumed, *_gpu_assumed(gpu.name, gpu.source)))),
    }


def _gpu_assumed(name: str, source: str) -> tuple[str, ...]:
    if not source.startswith(("assumed: ", "derived: ")):
        return ()
    return (_("memory of {gpu}: {source}").format(gpu=name, source=source.split(": ", 1)[1]),)
