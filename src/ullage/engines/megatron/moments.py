"""One optimizer step of one pipeline rank, moment by moment, and the ledgers of its peaks."""

from __future__ import annotations

from dataclasses import replace

from ullage.engines.megatron import schedule
from ullage.engines.megatron.buffers import buffers
from ullage.engines.megatron.costs import CHECKPOINT, ChunkCost, chunk_cost
from ullage.engines.megatron.defaults import Settings
from ullage.engines.megatron.layout import Chunk
from ullage.engines.megatron.loss import batch_bytes, deferred_bytes, head_backward, loss_peak
from ullage.engines.megatron.outside import fragmentation
from ullage.engines.megatron.shape import Sizes
from ullage.engines.megatron.states import States, gathered, states
from ullage.engines.megatron.tables import Tables, layer_runs
from ullage.engines.training import TrainingRank
from ullage.frozen import Frozen
from ullage.ledger import Ledger, Term, exact, ranged, total
from ullage.numeric import larger, some
from ullage.spec.training import TrainingJob
from ullage.units import tensor_bytes

SCHEDULES = "Megatron-LM@adc69db:megatron/core/pipeline_parallel/schedules.py"
BATCH = "Megatron-LM@adc69db:megatron/training/utils.py:get_batch_on_this_tp_rank"


class Peak(Frozen):
    """The fullest moment of the passes: micro-batches in flight per chunk, the chunk at work, bytes on top."""

    in_flight: tuple[int, ...]
    extra: tuple[Term, ...]
    bytes: int
    moment: str


class RankParts(Frozen):
    """What equal ranks share, whatever their place in the pipeline: states, buffers, and costs chunk by chunk."""

    held: States
    persistent: tuple[Term, ...]
    resident: tuple[Term, ...]
    costs: tuple[ChunkCost, ...]


def rank_parts(tables: Tables, parts: tuple[Chunk, ...]) -> RankParts:
    """Work out the states, buffers and costs of a rank that holds ``parts``."""
    job, settings, sizes = tables.job, tables.settings, tables.sizes
    kinds = tuple(tables.held(chunk) for chunk in parts)
    persistent = (*buffers(job, settings, parts, sizes, kinds), _pools(tables, parts))
    return RankParts(
        held=states(job, settings, parts, kinds, tables.groups),
        persistent=persistent,
        resident=(*resident_terms(job, settings, sizes, parts, persistent), gathered(job, kinds)),
        costs=tuple(chunk_cost(tables, chunk) for chunk in parts),
    )


def composition(job: TrainingJob, parts: tuple[Chunk, ...]) -> tuple[object, ...]:
    """What decides :class:`RankParts`: equal for ranks that hold the same kinds of layers in the same order."""
    return tuple((chunk.pp_rank == 0, *contents(job, chunk)) for chunk in parts)


def contents(job: TrainingJob, chunk: Chunk) -> tuple[object, ...]:
    """What a chunk holds: equal for chunks that cost the same."""
    kinds = [(id(layer), times) for layer, times in layer_runs(job, chunk.layers)]
    return (chunk.embedding, chunk.head, chunk.mtp, *kinds)


def rank_of(tables: Tables, parts: tuple[Chunk, ...], shared: RankParts, *, first_rank: int) -> TrainingRank:
    """Walk a step of one class of ranks."""
    job, held = tables.job, shared.held
    after = _ledger(tables, first_rank, "after step", (*held.terms, *shared.persistent))
    between = (*_between(held), *shared.resident)
    found = [
        _ledger(
            tables,
            first_rank,
            peak.moment,
            (*between, *_activations(tables, shared.costs, peak), *peak.extra),
        )
        for peak in _peaks(tables, parts, shared.costs)
    ]
    found.append(replace(after, moment="optimizer step"))
    stage = job.parallel.tensor_parallel_size * tables.groups.data
    return TrainingRank(
        rank=first_rank,
        num_ranks=stage,
        pp_rank=parts[0].pp_rank,
        moments=tuple(found),
        after_step=after,
        host_bytes=held.host_bytes,
    )


def _pools(tables: Tables, parts: tuple[Chunk, ...]) -> Term:
    """Pools that CUDA graphs and fine-grained offload keep: from nothing to one micro-batch of what passes through.

    Known error: neither is followed tensor by tensor.
    Source: Megatron-LM@d98e8a6:megatron/core/transformer/cuda_graphs.py,
    megatron/core/pipeline_parallel/fine_grained_activation_offload.py.
    """
    settings = tables.settings
    if settings.flags.get("cuda-graph-impl", "none") == "none" and not settings.on(
        "fine-grained-activation-offloading"
    ):
        return exact("graph_and_offload_pools", 0)
    most = away = 0
    for layer, times in (run for chunk in parts for run in layer_runs(tables.job, chunk.layers)):
        cost = tables.layer(layer)
        most, away = most + times * cost.bytes, larger(away, cost.away_bytes)
    return ranged("graph_and_offload_pools", 0, low=0, high=larger(most, away), formula="0 .. one micro-batch")


def _between(held: States) -> tuple[Term, ...]:
    """States while passes run: the optimizer's own copies of gradients were dropped before the first."""
    dropped = held.step_only_bytes
    if not some(dropped):
        return held.terms
    return tuple(
        replace(
            term,
            bytes=term.bytes - dropped,
            low_bytes=term.low_bytes - dropped,
            high_bytes=term.high_bytes - dropped,
        )
        if term.name == "gradients"
        else term
        for term in held.terms
    )


def resident_terms(
    job: TrainingJob, settings: Settings, sizes: Sizes, parts: tuple[Chunk, ...], persistent: tuple[Term, ...]
) -> tuple[Term, ...]:
    """Buffers while passes run: the batch, and one input and gradient under way between stages."""
    kept_terms = [term for term in persistent if term.name != "stage_inputs"]
    stream = tensor_bytes(sizes.stream_tokens * job.model.hidden_size, job.precision.compute)
    if any(chunk.receives for chunk in parts):
        source = "Megatron-LM@adc69db:megatron/core/pipeline_parallel/p2p_communication.py"
        kept_terms.append(_modelled("stage_transfer", 2 * stream, formula="2 x s*b*h", source=source))
    if any(chunk.embedding or chunk.head for chunk in parts):
        kept_terms.append(exact("batch", batch_bytes(job, settings, sizes), formula="68*b*s/c + b*s*s/c", source=BATCH))
    if any(chunk.head for chunk in parts):
        kept_terms.append(exact("deferred_head_gradients", deferred_bytes(job, settings, sizes)))
    return tuple(kept_terms)


def loads_of(job: TrainingJob, settings: Settings, rank: int, virtual: int) -> tuple[schedule.Load, ...]:
    """The moments of the job's schedule that can be the fullest of a pipeline rank with ``virtual`` chunks."""
    return schedule.loads(
        schedule=job.parallel.schedule or "1f1b",
        pipeline=job.parallel.pipeline_parallel_size,
        virtual=virtual,
        rank=rank,
        num_micro_batches=job.grad_accum,
        group=pass_group(job, settings),
        ahead=passes_ahead(settings),
    )


def passes_ahead(settings: Settings) -> int:
    """One forward pass more before the first backward where experts' exchange is hidden behind the other pass.

    Source: Megatron-LM@d98e8a6:megatron/core/pipeline_parallel/schedules.py:get_pp_rank_microbatches.
    Known error: without a pipeline the next forward pass runs beside backward, layer by layer: of it only the
        transient is counted (``overlapped_forward``).
    """
    return 1 if settings.on("overlap-moe-expert-parallel-comm") else 0


def pass_group(job: TrainingJob, settings: Settings) -> int:
    """Micro-batches after which interleaved chunks take turns."""
    pipeline = job.parallel.pipeline_parallel_size
    return max(1, settings.count("microbatch-group-size-per-virtual-pipeline-stage", pipeline))


def _peaks(tables: Tables, parts: tuple[Chunk, ...], costs: tuple[ChunkCost, ...]) -> list[Peak]:
    """The fullest forward, loss and backward of the rank's schedule."""
    job, settings = tables.job, tables.settings
    work = {
        (forward, at): moments_of(tables, cost, forward=forward)
        for forward in (True, False)
        for at, cost in enumerate(costs)
    }
    best: dict[str, Peak] = {}
    for load in loads_of(job, settings, parts[0].pp_rank, len(parts)):
        kept_bytes = sum(n * c.saved.bytes for n, c in zip(load.live, costs, strict=True))
        for moment, extra in work[load.forward, load.virtual]:
            size = kept_bytes + sum(term.bytes for term in extra)
            if moment not in best or size > best[moment].bytes:
                best[moment] = Peak(in_flight=load.live, extra=extra, bytes=size, moment=moment)
    return list(best.values())


def moments_of(tables: Tables, cost: ChunkCost, *, forward: bool) -> list[tuple[str, tuple[Term, ...]]]:
    """What a pass of a chunk needs on top of what is kept, moment by moment."""
    job, settings, sizes = tables.job, tables.settings, tables.sizes
    if forward:
        found: list[tuple[str, tuple[Term, ...]]] = [("forward", (_modelled("forward_transient", cost.forward_bytes),))]
        if cost.head:
            found.append(("loss", (loss_peak(job, settings, sizes),)))
            found.append(("head backward", (head_backward(job, sizes),)))
        return found
    terms = [_modelled("backward_transient", cost.backward_bytes)]
    if passes_ahead(settings):
        terms.append(_modelled("overlapped_forward", cost.forward_bytes))
    if some(cost.rebuilt_bytes):
        terms.append(exact("recomputed_layer", cost.rebuilt_bytes, formula="one checkpointed group", source=CHECKPOINT))
    return [("backward", tuple(terms))]


def _modelled(name: str, num_bytes: int, *, formula: str = "", source: str = "") -> Term:
    return ranged(
        name,
        num_bytes,
        low=num_bytes // 2,
        high=num_bytes * 2,
        formula=formula or "the chunk's fullest layer while it runs; half to twice as much",
        source=source or "Megatron-LM@adc69db:megatron/core/transformer/transformer_layer.py",
    )


def _activations(tables: Tables, costs: tuple[ChunkCost, ...], peak: Peak) -> tuple[Term, ...]:
    """Kept activations of all micro-batches in flight."""
    found = []
    for number, cost in zip(peak.in_flight, costs, strict=True):
        if number:
            key = (id(cost), number)
            if key not in tables.scaled:
                tables.scaled[key] = _scaled(cost.saved, number)
            found.append(tables.scaled[key])
    return tuple(found)


def _scaled(term: Term, number: int) -> Term:
    if number == 1:
        return term
    return Term(
        name=term.name,
        bytes=term.bytes * number,
        low_bytes=term.low_bytes * number,
        high_bytes=term.high_bytes * number,
        certainty=term.certainty,
        formula=f"{number} micro-batches in flight",
        source=SCHEDULES,
        children=tuple(_scaled(child, number) for child in term.children),
    )


def _ledger(tables: Tables, rank: int, moment: str, terms: tuple[Term, ...]) -> Ledger:
    allocated = total("allocated", tuple(term for term in terms if some(term.bytes) or some(term.high_bytes)))
    return Ledger(
        rank=rank,
        moment=moment,
        allocated=allocated,
        reserved_overhead=fragmentation(tables.job, allocated),
        outside=tables.outside,
    )
