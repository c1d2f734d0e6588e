"""What every serving engine answers, and what it answers with.

An engine room offers one function ``start(job) -> EngineStart``: it fills in the defaults of the job's engine
version, builds one ledger per class of equal ranks at the engine's steady state, and says what the engine will say.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.ledger import Ledger
from ullage.spec.serving import ServingJob


class Amount(Frozen):
    """A figure with its honest range, in the unit its name says."""

    value: float
    low: float
    high: float


class RankClass(Frozen):
    """A class of equal ranks: ``ledger.rank`` is the first of them, ``num_ranks`` how many they are."""

    pp_rank: int
    num_ranks: int
    ledger: Ledger


class KvCost(Frozen):
    """What requests cost in KV cache, on the rank that fills first: ``fixed + slope x tokens``, per GPU.

    ``kv_bytes_per_token`` is the slope of one more token of one long request over all layers of the rank, and
    ``fixed_bytes_per_request`` the part that does not grow (states, windows, rings).
    ``bytes_of_request(tokens)`` is the exact cost with the engine's blocks and rounding.
    """

    bytes_per_token: int
    fixed_bytes_per_request: int
    bytes_of_request: Callable[[int], int]


class EngineStart(Frozen):
    """What happens when the engine starts.

    Attributes:
        job: the job with every default filled in; ``job.assumed`` says which.
        ranks: one per class of equal ranks, the tightest first.
        starts: the engine gets through its start, by the expected figures; ``reason`` says why not.
        doubt: why it may come out the other way inside the range of the figures; empty when the answer is sure.
        figures: the engine's own log figures by the names of the truth files (``weights``, ``kv_cache``,
            ``activation_peak``, ``non_torch``, ``cuda_graphs``, ``kv_cache_tokens``, ``max_concurrency``,
            ``num_gpu_blocks``, ``available_after_weights``, ``device_used``, ...): bytes for memory, for the rank that
            the engine's own log speaks of.
        log_lines: what the engine will print, in its words.
        kv: what a request costs.
        kv_cache_bytes: the pool per GPU; kv_cache_tokens: full requests x context, as the engine counts.
        max_concurrency: requests of ``max_model_len`` at a time; max_context: the longest single request.
        load_peak_bytes: GPU memory while loading; host_load_peak_bytes: host memory while loading.
    """

    job: ServingJob
    ranks: tuple[RankClass, ...]
    starts: bool
    reason: str
    figures: dict[str, Amount]
    log_lines: tuple[str, ...]
    kv: KvCost
    kv_cache_bytes: Amount
    kv_cache_tokens: Amount
    max_concurrency: Amount
    max_context: Amount
    load_peak_bytes: int | None = None
    host_load_peak_bytes: int | None = None
    doubt: str = ""
    warnings: tuple[str, ...] = ()


#: engine name -> module with ``start`` and ``VERSIONS``; imported only when asked for.
SERVING_ENGINES = {
    "vllm": "ullage.engines.vllm",
    "sglang": "ullage.engines.sglang",
    "llamacpp": "ullage.engines.llamacpp",
    "ik_llama.cpp": "ullage.engines.llamacpp",
    "ollama": "ullage.engines.llamacpp",
}


def start(job: ServingJob) -> EngineStart:
    """Run the start arithmetic of the job's engine.

    Raises:
        InputError: the engine is not known, or the layout is impossible.
    """
    if job.engine not in SERVING_ENGINES:
        raise InputError(
            _("unknown engine {engine!r}").format(engine=job.engine),
            remedy=_("known are {known}").format(known=", ".join(SERVING_ENGINES)),
        )
    module = import_module(SERVING_ENGINES[job.engine])
    result: EngineStart = module.start(job)
    return result
