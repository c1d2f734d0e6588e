"""The start in order, in bytes: free memory before loading, after it, the pool, what is left for running."""

from __future__ import annotations

from ullage.account.calibrated import serving_context
from ullage.engines.sglang import graphs
from ullage.engines.sglang import pool as pools
from ullage.engines.sglang.defaults import Settings
from ullage.engines.sglang.layout import Stage
from ullage.engines.sglang.load import Loaded
from ullage.engines.sglang.poolspec import Pool
from ullage.engines.sglang.states import States, states_of
from ullage.frozen import Frozen
from ullage.spec import model as spec
from ullage.units import MiB

_NVLINK_BYTES_PER_S = 100e9  # a GPU-to-GPU link faster than PCIe 5 x16 (64 GB/s each way) is NVLink or its like


class Case(Frozen):
    """One corner of the range: amounts in bytes that the budget starts from."""

    total: int
    context: int
    distributed: int
    loaded: int


class Budget(Frozen):
    """A rank's memory through the start; all in bytes, ``tokens`` and ``max_requests`` are counts."""

    case: Case
    before: int
    after: int
    rest: int
    states: States
    pool: Pool
    tokens: int
    max_requests: int
    pool_bytes: int
    table: int
    rounding: int
    draft_late: int

    @property
    def after_pool(self) -> int:
        """Free memory at "Memory pool end"."""
        return self.after - self.states.num_bytes - self.pool_bytes - self.table - self.rounding


def cases(settings: Settings, loaded: Loaded) -> tuple[Case, Case, Case]:
    """Return the expected case, the one with the least memory left and the one with the most."""
    context = serving_context(settings.job.machine.gpu) or graphs.runtime("cuda_context")
    distributed = distributed_bytes(settings)
    if settings.job.device_free_bytes is not None:
        return _stated_free(settings, loaded, settings.job.device_free_bytes, context[0] + distributed[0])
    usage = _usage(settings, loaded)
    totals = _totals(settings)
    return (
        Case(total=totals[0], context=context[0], distributed=distributed[0], loaded=usage[0]),
        Case(total=totals[1], context=context[2], distributed=distributed[2], loaded=usage[2]),
        Case(total=totals[2], context=context[1], distributed=distributed[1], loaded=usage[1]),
    )


def _usage(settings: Settings, loaded: Loaded) -> tuple[int, int, int]:
    value, low, high = loaded.usage()
    early = loaded.draft.bytes if settings.release.rule("draft")["before_pool"] else 0
    return value + early, low + early, high + early


def _totals(settings: Settings) -> tuple[int, int, int]:
    """Return the device's total: (expected, low, high). No process is given all that ``nvidia-smi`` shows."""
    stated, gpu = settings.job.device_total_bytes, settings.job.machine.gpu
    if stated is not None:
        return stated, stated, stated
    return gpu.total_bytes, gpu.total_low_bytes, min(gpu.total_high_bytes, gpu.total_bytes + 256 * MiB)


def _stated_free(settings: Settings, loaded: Loaded, free: int, usual: int) -> tuple[Case, Case, Case]:
    """Return the cases of a job that states its free memory.

    It is taken as SGLang prints it ("Load weight begin. avail mem"), context and communication already counted; the
    least favourable case is a figure read before the process started.
    """
    usage = _usage(settings, loaded)
    total = max(_totals(settings)[0], free)
    taken = total - free
    wires = min(distributed_bytes(settings)[0], taken)
    expected = Case(total=total, context=taken - wires, distributed=wires, loaded=usage[0])
    return (
        expected,
        Case(total=total, context=taken - wires + usual, distributed=wires, loaded=usage[2]),
        Case(total=total, context=taken - wires, distributed=wires, loaded=usage[1]),
    )


def distributed_bytes(settings: Settings) -> tuple[int, int, int]:
    """Return what ``torch.distributed`` and NCCL take: (bytes, low, high); nothing for one rank.

    Formula: ranks of a node x buffers per peer.
    Source: catalog/engines/sglang.json:runtime.
    Known error: follows NCCL's version, topology and NVLS; the range.
    """
    ranks = settings.tp * settings.pp
    if ranks == 1:
        return 0, 0, 0
    link = settings.job.machine.gpu.link_bytes_per_s or 0
    value, low, high = graphs.runtime("nccl_nvlink" if link > _NVLINK_BYTES_PER_S else "nccl_pcie")
    peers = min(ranks, settings.job.machine.gpu.gpus_per_node)
    return value * peers, low * peers, high * peers


def rest_of(settings: Settings, case: Case) -> tuple[int, int, int]:
    """Return (free before loading, free after loading, what the fraction leaves for cache and states).

    Formula: rest = after - before x (1 - f) - multimodal reserve.
    Source: sglang@0.5.23:srt/mem_cache/kv_cache_configurator.py:_profile_available_bytes; the same since
        sglang@0.4.1.post7:srt/model_executor/model_runner.py:profile_max_num_token.
    """
    before = case.total - case.context - case.distributed
    after = before - case.loaded
    reserve = settings.release.rule("multimodal")["reserve_mib"] * MiB if settings.traits.multimodal else 0
    return before, after, int(after - before * (1 - settings.mem_fraction) - reserve)


def budget_of(
    settings: Settings, stage: Stage, loaded: Loaded, case: Case, *, most_tokens: int | None = None
) -> Budget:
    """Run one stage's start for one case. ``most_tokens`` caps the pool (pipeline stages take the smallest)."""
    layers: tuple[spec.Layer, ...] = settings.job.model.layers[slice(*stage.share.layers)]
    before, after, rest = rest_of(settings, case)
    states = states_of(settings, layers, rest)
    left = rest - states.num_bytes
    pool = pools.pool_of(settings, layers, left)
    tokens = pool.tokens(left) if pool.cell > 0 else settings.context
    tokens = _headroom(settings, tokens)
    for cap in (most_tokens, settings.flags.integer("max_total_tokens")):
        if cap is not None:
            tokens = min(tokens, cap) // pool.page * pool.page
    if settings.job.kv_cache_memory_bytes is not None:
        tokens = min(tokens, pool.tokens(settings.job.kv_cache_memory_bytes))
    requests = max_requests(settings, states, tokens)
    table = (
        (requests + settings.release.rule("request_table_extra_row"))
        * (settings.context + 4 + settings.draft_tokens)
        * 4
    )
    in_pool = settings.release.rule("draft")["pool"] == "in_cell"
    return Budget(
        case=case,
        before=before,
        after=after,
        rest=rest,
        states=states,
        pool=pool,
        tokens=tokens,
        max_requests=requests,
        pool_bytes=pool.num_bytes(tokens),
        table=table if tokens else 0,
        rounding=pool.rounding(tokens),
        draft_late=pool.draft_bytes(tokens) + (0 if in_pool else loaded.draft.bytes),
    )


def _headroom(settings: Settings, tokens: int) -> int:
    """Add the tokens that older releases allow drafts beyond the budget.

    Formula: T + R (steps x branches + drafts) + 100.
    Source: sglang@0.5.3:srt/model_executor/model_runner.py:init_memory_pool (draft_runner_cache_size).
    """
    if not settings.draft_tokens or not tokens or settings.release.rule("draft")["pool"] != "headroom":
        return tokens
    requests = settings.max_running or min(max(tokens * 512 // settings.context, 2048), 4096)
    branches = settings.flags.integer("speculative_eagle_topk") or 1
    tokens += requests * (settings.draft_steps * branches + settings.draft_tokens) + 100
    return tokens // settings.page * settings.page


def max_requests(settings: Settings, states: States, tokens: int) -> int:
    """Return the requests an attention rank runs at a time.

    Formula: clamp(512 T / context, 2048, 4096), or what was given; at most T / 2, and what the state slots allow.
    Source: sglang@0.5.23:srt/mem_cache/kv_cache_configurator.py:resolve_max_num_reqs.
    """
    requests = settings.max_running
    if requests is None:
        requests = max(min(tokens * 512 // settings.context, 4096), 2048)
        if settings.release.key >= (0, 5, 12, 0):
            requests = min(requests, tokens // 2)
    if states.max_requests is not None:
        requests = min(requests, states.max_requests)
    return requests
