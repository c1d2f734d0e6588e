"""A start as ledgers, as figures under the names of engine logs, and as the lines SGLang prints."""

from __future__ import annotations

from ullage.account.calibrated import calibrated, serving_context
from ullage.engines.serving import Amount
from ullage.engines.sglang.budget import Budget
from ullage.engines.sglang.defaults import Settings
from ullage.engines.sglang.layout import Stage
from ullage.engines.sglang.load import Loaded
from ullage.frozen import Frozen
from ullage.ledger import Ledger, Term, exact, ranged, total
from ullage.units import GiB

_POOL_SOURCE = "sglang@0.5.23:srt/mem_cache/kv_cache_configurator.py"


class StageStart(Frozen):
    """A stage's start in its three cases: expected, least memory left, most memory left."""

    stage: Stage
    loaded: Loaded
    expected: Budget
    low: Budget
    high: Budget
    graphs: tuple[int, int, int]
    activations: Term

    @property
    def slack(self) -> int:
        """Bytes that stay free when everything, activations included, is there."""
        return self.expected.after_pool - self.expected.draft_late - self.graphs[0] - self.activations.bytes

    def amount(self, name: str) -> Amount:
        """Return a figure of the budget with its range over the cases."""
        values = [float(getattr(case, name)) for case in (self.expected, self.low, self.high)]
        return Amount(value=values[0], low=min(values), high=max(values))


def ledger_of(start: StageStart, settings: Settings, rank: int) -> Ledger:
    """Return the ledger of a rank in the steady state: a full pool, and a chunk going through."""
    loaded, budget = start.loaded, start.expected
    pool, tokens = budget.pool, start.amount("pool_bytes")
    kv_cache = ranged(
        "kv_cache",
        budget.pool_bytes,
        low=int(tokens.low),
        high=int(tokens.high),
        formula=f"{budget.tokens:,} tokens x {pool.formula}",
        source=pool.source or _POOL_SOURCE,
    )
    allocated = [loaded.weights, loaded.absorbed, loaded.rope, loaded.draft, kv_cache]
    if budget.states.num_bytes:
        others = [case.states.num_bytes for case in (start.low, start.high)]
        formula = f"{budget.states.slots:,} slots x {budget.states.slot_bytes:,} B"
        allocated.append(
            ranged(
                "recurrent_states",
                budget.states.num_bytes,
                low=min(others),
                high=max(others),
                formula=formula,
                source=_POOL_SOURCE + ":_handle_max_mamba_cache",
            )
        )
    draft_cache = pool.draft_bytes(budget.tokens)
    if draft_cache:
        allocated.append(exact("draft_kv_cache", draft_cache, formula="draft layers x row x tokens"))
    formula = f"{budget.max_requests:,} requests x (context + 4) x 4"
    allocated.append(exact("request_table", budget.table, formula=formula, source=_POOL_SOURCE + ":ReqToTokenPool"))
    allocated.append(start.activations)
    rounding = ranged("pool_segments", budget.rounding, low=budget.rounding // 2, high=budget.rounding * 2)
    return Ledger(
        rank=rank,
        allocated=total("allocated", allocated),
        reserved_overhead=total("reserved_overhead", (loaded.rounding, rounding)),
        outside=total("outside", _outside(start, settings)),
    )


def _outside(start: StageStart, settings: Settings) -> list[Term]:
    source = "catalog/engines/sglang.json:runtime"
    contexts = [case.case.context for case in (start.expected, start.low, start.high)]
    wires = [case.case.distributed for case in (start.expected, start.low, start.high)]
    value, low, high = start.graphs
    context = ranged(
        "cuda_context",
        contexts[0],
        low=min(contexts),
        high=max(contexts),
        formula="driver context and kernels",
        source=source,
    )
    gpu = settings.job.machine.gpu
    measured = serving_context(gpu) if settings.job.device_free_bytes is None else None
    return [
        calibrated(context, gpu, measured),
        ranged("nccl", wires[0], low=min(wires), high=max(wires), formula="channels and buffers", source=source),
        start.loaded.modules,
        ranged("cuda_graphs", value, low=low, high=high, formula="layers x sizes x nodes + tables", source=source),
    ]


def figures_of(start: StageStart, settings: Settings) -> dict[str, Amount]:
    """Return the figures of the stage whose log line 0 prints, in bytes (tokens in tokens)."""
    usage = start.loaded.usage()
    graphs = start.graphs
    found = {
        "available_before_weights": start.amount("before"),
        "weights": Amount(value=usage[0], low=usage[1], high=usage[2]),
        "available_after_weights": start.amount("after"),
        "kv_cache": start.amount("pool_bytes"),
        "kv_cache_tokens": start.amount("tokens"),
        "available_after_pool": start.amount("after_pool"),
        "activation_peak": _amount(start.activations),
        "device_used": _device_used(start, settings),
    }
    if settings.tp * settings.pp > 1:
        wires = [case.case.distributed for case in (start.expected, start.low, start.high)]
        found["non_torch"] = Amount(value=wires[0], low=min(wires), high=max(wires))
    if graphs[0]:
        found["cuda_graphs"] = Amount(value=graphs[0], low=graphs[1], high=graphs[2])
    return found


def _device_used(start: StageStart, settings: Settings) -> Amount:
    """Return what ``nvidia-smi`` shows when the server has run.

    The high end holds the memory that the driver keeps to itself, which older versions of the tool count as used.
    """
    graphs, gpu = start.graphs, settings.job.machine.gpu
    used = [
        case.case.total - (case.after_pool - case.draft_late - graph)
        for case, graph in ((start.expected, graphs[0]), (start.low, graphs[2]), (start.high, graphs[1]))
    ]
    kept_back = max(gpu.total_high_bytes - gpu.total_bytes, 0)
    peak = start.activations
    return Amount(value=used[0] + peak.bytes, low=min(used), high=max(used) + peak.high_bytes + kept_back)


def _amount(term: Term) -> Amount:
    return Amount(value=term.bytes, low=term.low_bytes, high=term.high_bytes)


def log_lines(start: StageStart, settings: Settings) -> tuple[str, ...]:
    """Return what rank 0 prints. SGLang writes GB for GiB.

    Source: sglang@0.5.23:srt/model_executor/model_runner.py; srt/mem_cache/memory_pool.py:_finalize_allocation_log.
    """
    budget, model = start.expected, settings.job.model
    usage = start.loaded.usage()[0]
    lines = [
        f"Load weight begin. avail mem={_gb(budget.before)} GB",
        f"Load weight end. type={model.architecture}, dtype=torch.{settings.model_dtype}, "
        f"avail mem={_gb(budget.after)} GB, mem usage={_gb(usage)} GB.",
    ]
    if budget.states.num_bytes:
        slots, size = budget.states.slots, _gb(budget.states.num_bytes)
        lines.append(f"Mamba Cache is allocated. max_mamba_cache_size: {slots}, state size: {size}GB")
    if settings.traits.mla:
        lines.append(f"KV Cache is allocated. #tokens: {budget.tokens}, KV size: {_gb(budget.pool_bytes)} GB")
    else:
        half = _gb(budget.pool_bytes // 2)
        lines.append(f"KV Cache is allocated. #tokens: {budget.tokens}, K size: {half} GB, V size: {half} GB")
    lines.append(f"Memory pool end. avail mem={_gb(budget.after_pool)} GB")
    left = budget.after_pool - budget.draft_late - start.graphs[0]
    if settings.graph_sizes:
        lines.append(f"Capture cuda graph end. mem usage={_gb(start.graphs[0])} GB. avail mem={_gb(left)} GB.")
    lines.append(
        f"max_total_num_tokens={budget.tokens}, chunked_prefill_size={settings.chunk}, "
        f"max_prefill_tokens={settings.flags.integer('max_prefill_tokens') or 16384}, "
        f"max_running_requests={budget.max_requests}, context_len={settings.context}, available_gpu_mem={_gb(left)} GB"
    )
    return tuple(lines)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / GiB:.2f}"
