"""The start of an SGLang server, from a job to what it prints."""

from __future__ import annotations

import math
from dataclasses import replace

from ullage.engines.serving import Amount, EngineStart, KvCost, RankClass
from ullage.engines.sglang import budget as budgets
from ullage.engines.sglang import graphs
from ullage.engines.sglang.activations import activation_term
from ullage.engines.sglang.budget import Budget
from ullage.engines.sglang.defaults import Settings, settings_of
from ullage.engines.sglang.layout import Stage, stages
from ullage.engines.sglang.load import load
from ullage.engines.sglang.report import StageStart, figures_of, ledger_of, log_lines
from ullage.i18n import _
from ullage.spec.serving import ServingJob
from ullage.units import cdiv, format_bytes


def start(job: ServingJob) -> EngineStart:
    """Run the start arithmetic of SGLang for ``job``.

    Raises:
        InputError: a value that cannot be used.
        LayoutError: a layout that cannot be.
    """
    settings = settings_of(job)
    found = _balanced(settings, [_stage_start(settings, stage) for stage in stages(settings)])
    first = found[0]
    reason, doubt = _outcome(settings, found)
    ranks = [
        RankClass(
            pp_rank=entry.stage.pp_rank,
            num_ranks=entry.stage.num_ranks,
            ledger=ledger_of(entry, settings, entry.stage.pp_rank * settings.tp),
        )
        for entry in sorted(found, key=lambda entry: entry.slack)
    ]
    tokens = first.amount("tokens")
    concurrency, longest = _capacity(settings, first)
    figures = figures_of(first, settings)
    figures["max_concurrency"] = concurrency
    return EngineStart(
        job=_filled_in(settings),
        ranks=tuple(ranks),
        starts=not reason,
        reason=reason,
        doubt=doubt,
        figures=figures,
        log_lines=log_lines(first, settings),
        kv=_kv_cost(settings, found),
        kv_cache_bytes=first.amount("pool_bytes"),
        kv_cache_tokens=tokens,
        max_concurrency=concurrency,
        max_context=longest,
        load_peak_bytes=max(entry.expected.case.total - entry.expected.after for entry in found),
        warnings=_warnings(settings, found),
    )


def _stage_start(settings: Settings, stage: Stage, most: tuple[int, int, int] | None = None) -> StageStart:
    loaded = load(settings, stage)
    layers = settings.job.model.layers[slice(*stage.share.layers)]
    budget = [
        budgets.budget_of(settings, stage, loaded, case, most_tokens=most[index] if most else None)
        for index, case in enumerate(budgets.cases(settings, loaded))
    ]
    tables = settings.graph_max * settings.context * 4
    return StageStart(
        stage=stage,
        loaded=loaded,
        expected=budget[0],
        low=budget[1],
        high=budget[2],
        graphs=graphs.graph_bytes(len(layers), settings.graph_sizes, tables, experts=settings.traits.num_experts > 0),
        activations=activation_term(settings, layers),
    )


def _balanced(settings: Settings, found: list[StageStart]) -> list[StageStart]:
    """Let every pipeline stage take the smallest pool.

    Source: sglang@0.5.23:srt/mem_cache/kv_cache_configurator.py:_apply_token_constraints.
    """
    if len(found) == 1:
        return found
    caching = [entry for entry in found if entry.expected.pool.cell > 0] or found
    most = (
        min(entry.expected.tokens for entry in caching),
        min(entry.low.tokens for entry in caching),
        min(entry.high.tokens for entry in caching),
    )
    return [_stage_start(settings, entry.stage, most) for entry in found]


def _outcome(settings: Settings, found: list[StageStart]) -> tuple[str, str]:
    """Return (why the start fails by the expected figures, why it may come out the other way), each may be empty."""
    expected = _refusal(settings, [(entry.expected, entry.graphs[1]) for entry in found])
    if expected:
        best = _refusal(settings, [(entry.high, entry.graphs[1]) for entry in found])
        return expected, "" if best else _("it may start at the better end of the range: {why}").format(why=expected)
    worst = _refusal(settings, [(entry.low, entry.graphs[0]) for entry in found])
    return "", worst and _("it may fail at the worse end of the range: {why}").format(why=worst)


def _refusal(settings: Settings, found: list[tuple[Budget, int]]) -> str:
    """Return SGLang's words where the start does not come through; ``found``: a budget and its graphs per stage."""
    for budget, captured in found:
        if budget.after < 0:
            return _("CUDA out of memory while loading: {need} of weights, {free} free").format(
                need=format_bytes(budget.case.loaded), free=format_bytes(budget.before)
            )
        if budget.tokens <= 0:
            least = 1 - budget.after / budget.before
            return _(
                "Not enough memory. Please try to increase --mem-fraction-static. Current value: {value:.3f}; the least"
                " that leaves anything for the cache is {least:.4f}"
            ).format(value=settings.mem_fraction, least=least)
        left = budget.after_pool - budget.draft_late
        if left < captured:
            return _(
                "Capture cuda graph failed: {left} left beside the pool; lower --mem-fraction-static or"
                " --cuda-graph-max-bs"
            ).format(left=format_bytes(left))
    return ""


def _warnings(settings: Settings, found: list[StageStart]) -> tuple[str, ...]:
    said = []
    tightest = min(found, key=lambda entry: entry.slack)
    needs = tightest.activations
    room = tightest.slack + needs.bytes
    if room < needs.bytes:
        sentence = _(
            "a prefill chunk of {tokens} tokens needs about {needs}, {room} are left beside the pool: it may run out of"
            " memory while serving; lower --mem-fraction-static or --chunked-prefill-size"
        )
        said.append(
            sentence.format(tokens=settings.chunk, needs=format_bytes(needs.bytes), room=format_bytes(max(room, 0)))
        )
    pool = found[0].expected.pool
    if pool.cell < pool.real:
        sentence = _("SGLang {version} counts {cell:,.0f} B a token and allocates {real:,.0f}: the pool eats the slack")
        said.append(sentence.format(version=settings.release.version, cell=float(pool.cell), real=float(pool.real)))
    if settings.job.parallel.decode_context_parallel_size > 1:
        said.append(_("decode context parallelism: tokens are those of one rank's share of every row"))
    return tuple(said)


def _capacity(settings: Settings, first: StageStart) -> tuple[Amount, Amount]:
    """Return (requests of the whole context at a time over all replicas, longest single request)."""
    replicas = settings.attention_dp * settings.copies
    pages = cdiv(settings.context, settings.page) * settings.page
    requests, longest = [], []
    limit = max(settings.context, settings.job.model.max_position_embeddings)
    for case in (first.expected, first.low, first.high):
        at_once = case.tokens / pages if case.pool.cell > 0 else case.max_requests
        requests.append(min(at_once, case.max_requests) * replicas)
        longest.append(float(min(case.tokens, limit)))
    return (
        Amount(value=requests[0], low=min(requests), high=max(requests)),
        Amount(value=longest[0], low=min(longest), high=max(longest)),
    )


def _kv_cost(settings: Settings, found: list[StageStart]) -> KvCost:
    """Return the cost of a request on the stage where it is dearest."""
    dearest = max(found, key=lambda entry: entry.expected.pool.request(settings.context))
    pool, states = dearest.expected.pool, dearest.expected.states
    fixed = states.slot_bytes

    def bytes_of_request(tokens: int) -> int:
        return pool.request(tokens) + fixed

    windows = math.ceil(sum(window.tokens * window.bytes_per_token for window in pool.windows))
    return KvCost(
        bytes_per_token=math.ceil(pool.slope),
        fixed_bytes_per_request=windows + pool.request_bytes + fixed,
        bytes_of_request=bytes_of_request,
    )


def _filled_in(settings: Settings) -> ServingJob:
    """Return the job with the defaults that were taken, and the sentences that say so."""
    job = settings.job
    assumed = [*job.assumed, *settings.assumed]
    if job.max_num_batched_tokens is None:
        assumed.append(_("chunked_prefill_size: {value} taken by the card's size").format(value=settings.chunk))
    if job.max_model_len is None:
        assumed.append(_("context: the model's {value} tokens").format(value=settings.context))
    return replace(
        job,
        memory_fraction=settings.mem_fraction,
        max_num_batched_tokens=settings.chunk,
        max_model_len=settings.context,
        kv_cache_dtype=settings.row_format,
        block_size=settings.page,
        cuda_graph_sizes=settings.graph_sizes,
        cuda_graph_max_batch_size=settings.graph_max,
        assumed=tuple(assumed),
    )
