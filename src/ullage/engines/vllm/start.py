"""The start of a vLLM engine: profile, subtract, divide into blocks, say so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ullage.engines.serving import Amount, EngineStart, KvCost, RankClass
from ullage.engines.vllm import backend, graphs, nontorch, report
from ullage.engines.vllm.defaults import Setup, resolve
from ullage.engines.vllm.groups import Grouping, grouping
from ullage.engines.vllm.layout import Stage, stages
from ullage.engines.vllm.loaded import loaded_weights
from ullage.engines.vllm.pool import Pool, block_bytes, pool
from ullage.engines.vllm.profile import activation_peak
from ullage.engines.vllm.workspace import at_load
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.ledger import Ledger, Term, exact, ranged, total
from ullage.spec.serving import ServingJob
from ullage.units import GiB, cdiv


class Profiled(Frozen):
    """One stage after its profiling run.

    ``buffers`` and ``code`` are what loading leaves beside the weights: buffers of sparse attention, and on ROCm what
    the driver took, which is counted once more in ``non_torch``. ``workspace`` is what attention allocates after it.
    """

    stage: Stage
    weights: Term
    buffers: Term
    code: Term
    activation: Term
    non_torch: Term
    graphs: Term
    estimate: Term
    workspace: Term
    available: tuple[int, int, int]

    @property
    def loaded(self) -> Term:
        """What "Model loading took" counts."""
        return total("weights", (self.weights, self.buffers, self.code))

    @property
    def taken(self) -> Term:
        """What is taken off the budget: what was loaded, activation peak, non-torch memory, the graphs' estimate."""
        return total("taken", (self.loaded, self.activation, self.non_torch, self.estimate))


def requested(setup: Setup) -> tuple[int, int, int]:
    """Return (low, expected, high) of the budget: total x gpu_memory_utilization.

    Source: vllm@0.33.0:vllm/v1/worker/utils.py:request_memory.
    """
    fraction = setup.job.memory_fraction or 0.0
    low, expected, high = setup.total_bytes
    return int(low * fraction), int(expected * fraction), int(high * fraction)


def profiled(setup: Setup, stage: Stage) -> Profiled:
    """Profile one stage.

    Formula: available = requested - weights - non_torch - activation peak - graph estimate.
    Source: vllm@0.33.0:vllm/v1/worker/gpu_worker.py:Worker.determine_available_memory.
    """
    parts = {
        "weights": loaded_weights(setup, stage),
        "buffers": at_load(setup, stage),
        "code": nontorch.loaded_code(setup),
        "activation": activation_peak(setup, stage),
        "non_torch": total("non_torch", nontorch.non_torch_parts(setup)),
        "graphs": graphs.cuda_graphs(setup, stage),
        "estimate": graphs.estimate(setup, stage),
        "workspace": backend.workspace(setup, stage),
    }
    one = Profiled(stage=stage, available=(0, 0, 0), **parts)
    taken, (low, expected, high) = one.taken, requested(setup)
    given = setup.job.kv_cache_memory_bytes
    available = (
        (given, given, given) if given else (low - taken.high_bytes, expected - taken.bytes, high - taken.low_bytes)
    )
    return replace(one, available=available)


def _pools(setup: Setup, profiles: Sequence[Profiled], groups: Grouping) -> tuple[Pool, Pool, Pool]:
    """Return the pool at the low, expected and high end of what is available."""
    found = [
        pool(setup, [one.stage for one in profiles], groups, [one.available[index] for one in profiles])
        for index in range(3)
    ]
    return found[0], found[1], found[2]


def _ledger(setup: Setup, one: Profiled, pools: tuple[Pool, Pool, Pool], size: int, rank: int) -> Ledger:
    """Return the steady state of a rank. The pool's range mirrors the profile's: one grows as the other shrinks."""
    low, expected, high = (max(0, each.num_blocks) * size for each in pools)
    cache = ranged(
        "kv_cache",
        expected,
        low=min(low, expected),
        high=max(high, expected),
        formula=f"{pools[1].num_blocks:,} blocks x {size:,} B",
        source="vllm@0.33.0:vllm/v1/core/kv_cache_planning.py:get_kv_cache_configs",
    )
    outside = (*one.non_torch.children, *nontorch.before_snapshot(setup), one.graphs)
    return Ledger(
        rank=rank,
        allocated=total(
            "allocated",
            [term for term in (one.weights, one.buffers, cache, one.activation, one.workspace) if term.high_bytes],
        ),
        reserved_overhead=ranged("allocator_slack", 0, low=0, high=GiB // 2, formula="cached segments beyond the peak"),
        outside=total("outside", [term for term in outside if term.high_bytes]),
        warnings=setup.warnings,
    )


def _device_used(setup: Setup, one: Profiled, cache: int) -> Amount:
    """Return what nvidia-smi shows after the start: budget filled, plus context and graphs beyond it."""
    known = one.weights.bytes + one.buffers.bytes + one.activation.bytes + one.non_torch.bytes + cache
    before = total("before", nontorch.before_snapshot(setup)) if nontorch.before_snapshot(setup) else exact("before", 0)
    value = known + one.graphs.bytes + one.workspace.bytes + before.bytes
    low = value - one.graphs.bytes - one.activation.bytes - before.bytes // 2
    ceiling = setup.total_bytes[2]
    high = value + one.graphs.high_bytes - one.graphs.bytes + before.high_bytes - before.bytes
    return Amount(value=min(value, ceiling), low=min(low, ceiling), high=min(max(high, value), ceiling))


def _kv_cost(setup: Setup, groups: Grouping, size: int) -> KvCost:
    """Return what a request costs on the fullest rank: exact by blocks, and slope and fixed part at the asymptote.

    The exact cost is what the engine plans with: windows hold all tokens in flight of a prefill. The fixed part is
    what a request that decodes keeps: windows with one token in flight.
    """

    def cost(tokens: int, of: Grouping = groups) -> int:
        return of.request_blocks(tokens) * size if tokens > 0 else 0

    growing = [group.spec.block_tokens for group in groups.groups if group.spec.kind in ("full", "latent")]
    step = math.lcm(*growing, 1) * groups.dcp
    far = cdiv(max(setup.job.max_model_len or 1, 1 << 22), step) * step
    slope = (cost(far + step) - cost(far)) / step
    fixed = max(0, int(cost(far, replace(groups, in_flight=1)) - slope * far))
    return KvCost(bytes_per_token=round(slope) if growing else 0, fixed_bytes_per_request=fixed, bytes_of_request=cost)


def _free_refusal(setup: Setup, case: int) -> str:
    """V1 from 0.9 on refuses when less is free than requested: context and early NCCL buffers stand outside.

    Source: vllm@0.33.0:vllm/v1/worker/utils.py:request_memory.
    """
    if setup.version.engine == "V0" or not setup.version.at_least("0.9.0"):
        return ""
    size, need, taken = setup.total_bytes[case], requested(setup)[case], nontorch.before_snapshot(setup)
    before = sum((term.high_bytes, term.bytes, term.low_bytes)[case] for term in taken)
    free = setup.job.device_free_bytes if setup.job.device_free_bytes is not None else size - before
    if free >= need:
        return ""
    return _(
        "Free memory on device ({free:.2f} GiB) on startup is less than desired GPU memory utilization "
        "({need:.2f} GiB)."
    ).format(free=free / GiB, need=need / GiB)


def _load_refusal(setup: Setup, profiles: Sequence[Profiled], case: int) -> str:
    size = setup.total_bytes[case]
    for one in profiles:
        weights = (one.loaded.high_bytes, one.loaded.bytes, one.loaded.low_bytes)[case]
        if weights > size:
            return _(
                "CUDA out of memory while loading: weights of {weights:.2f} GiB on a device of {size:.2f} GiB."
            ).format(weights=weights / GiB, size=size / GiB)
    return ""


def _outcome(setup: Setup, profiles: Sequence[Profiled], pools: tuple[Pool, Pool, Pool]) -> tuple[str, str]:
    """Return (why the start fails by the expected figures, why it may come out the other way), each may be empty.

    The worst case takes the upper end of every part, the best case the lower end.
    """
    worst, expected, best = (
        _load_refusal(setup, profiles, case) or _free_refusal(setup, case) or pools[case].reason for case in range(3)
    )
    if expected:
        return expected, "" if best else _("it may start at the better end of the range: {why}").format(why=expected)
    return "", worst and _("it may fail at the worse end of the range: {why}").format(why=worst)


def _load_peak(setup: Setup, one: Profiled) -> int:
    """Return GPU memory at the widest moment of loading: the weights, and one layer twice while it is repacked.

    Source: vllm@0.33.0:vllm/model_executor/model_loader/utils.py:process_weights_after_loading (layer by layer).
    """
    layers = max(1, one.stage.share.layers[1] - one.stage.share.layers[0])
    context = sum(term.bytes for term in nontorch.before_snapshot(setup))
    return one.loaded.bytes + one.weights.bytes // layers + one.non_torch.bytes + context


def _ranks(
    setup: Setup, profiles: Sequence[Profiled], pools: tuple[Pool, Pool, Pool], sizes: Sequence[int]
) -> list[RankClass]:
    """Return one class of equal ranks for each pipeline stage."""
    tp = setup.job.parallel.tensor_parallel_size
    return [
        RankClass(
            pp_rank=each.stage.pp_rank,
            num_ranks=each.stage.num_ranks,
            ledger=_ledger(setup, each, pools, size, each.stage.pp_rank * tp),
        )
        for each, size in zip(profiles, sizes, strict=True)
    ]


def start(job: ServingJob) -> EngineStart:
    """Run the start arithmetic of vLLM for ``job`` (see the package).

    Raises:
        InputError: a value that the engine refuses; LayoutError: a layout that the model does not divide into.
    """
    setup = resolve(job)
    groups = grouping(setup)
    profiles = [profiled(setup, stage) for stage in stages(setup)]
    pools = _pools(setup, profiles, groups)
    sizes = block_bytes([one.stage for one in profiles], groups)
    if setup.auto_length and pools[1].max_model_len:
        setup = replace(setup, job=replace(setup.job, max_model_len=pools[1].max_model_len))
    tightest = min(range(len(profiles)), key=lambda index: profiles[index].available[1] / max(1, sizes[index]))
    one, size = profiles[tightest], sizes[tightest]
    reason, doubt = _outcome(setup, profiles, pools)
    ranks = _ranks(setup, profiles, pools, sizes)
    ranks.insert(0, ranks.pop(tightest))
    figures = report.figures(
        setup, one, pools, _device_used(setup, one, pools[1].num_blocks * size), requested(setup)[1]
    )
    return EngineStart(
        job=setup.job,
        ranks=tuple(ranks),
        starts=not reason,
        reason=reason,
        doubt=doubt,
        figures=figures,
        log_lines=report.log_lines(setup, one, pools[1], reason),
        kv=_kv_cost(setup, groups, size),
        kv_cache_bytes=figures["kv_cache"],
        kv_cache_tokens=figures["kv_cache_tokens"],
        max_concurrency=figures["max_concurrency"],
        max_context=report.amount([each.max_context for each in pools]),
        load_peak_bytes=_load_peak(setup, one),
        host_load_peak_bytes=setup.job.cpu_offload_bytes + 5 * 10**9,
        warnings=setup.warnings,
    )
