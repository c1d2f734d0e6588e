"""One optimizer step of one pipeline rank, moment by moment, and the ledgers of its peaks."""

from __future__ import annotations

from dataclasses import replace

from ullage.engines.megatron import schedule
from ullage.engines.megatron.activations import kept, layer_saved, offloaded_bytes
from ullage.engines.megatron.buffers import buffers
from ullage.engines.megatron.costs import CHECKPOINT, ChunkCost, chunk_cost
from ullage.engines.megatron.defaults import Settings
from ullage.engines.megatron.layout import Chunk, Groups
from ullage.engines.megatron.loss import batch_bytes, deferred_bytes, head_backward, loss_peak
from ullage.engines.megatron.outside import fragmentation, outside
from ullage.engines.megatron.shape import Sizes
from ullage.engines.megatron.states import States, gathered, states
from ullage.engines.training import TrainingRank
from ullage.frozen import Frozen
from ullage.ledger import Ledger, Term, exact, ranged, total
from ullage.spec.training import TrainingJob
from ullage.units import tensor_bytes

SCHEDULES = "Megatron-LM@adc69db:megatron/core/pipeline_parallel/schedules.py"


class Peak(Frozen):
    """The fullest moment of the passes: micro-batches in flight per chunk, the chunk at work, bytes on top."""

    in_flight: tuple[int, ...]
    extra: tuple[Term, ...]
    bytes: int
    moment: str


def rank_of(
    job: TrainingJob, settings: Settings, parts: tuple[Chunk, ...], groups: Groups, sizes: Sizes, *, first_rank: int
) -> TrainingRank:
    """Walk a step of one class of ranks."""
    held = states(job, settings, parts, groups)
    persistent = buffers(job, settings, parts, sizes, held.tensors)
    persistent += (_pools(job, settings, sizes, parts),)
    after = _ledger(job, first_rank, "after step", (*held.terms, *persistent))
    resident = (*_resident(job, settings, sizes, parts, persistent), gathered(job, parts, groups))
    costs = tuple(chunk_cost(job, settings, sizes, chunk) for chunk in parts)
    found = [
        _ledger(
            job,
            first_rank,
            peak.moment,
            (*_between(held), *resident, *_activations(costs, peak), *peak.extra),
        )
        for peak in _peaks(job, settings, sizes, parts, costs)
    ]
    found.append(_ledger(job, first_rank, "optimizer step", (*held.terms, *persistent)))
    stage = job.parallel.tensor_parallel_size * groups.data
    return TrainingRank(
        rank=first_rank,
        num_ranks=stage,
        pp_rank=parts[0].pp_rank,
        moments=tuple(found),
        after_step=after,
        host_bytes=held.host_bytes,
    )


def _pools(job: TrainingJob, settings: Settings, sizes: Sizes, parts: tuple[Chunk, ...]) -> Term:
    """Pools that CUDA graphs and fine-grained offload keep: from nothing to one micro-batch of what passes through.

    Known error: neither is followed tensor by tensor.
    Source: Megatron-LM@d98e8a6:megatron/core/transformer/cuda_graphs.py,
    megatron/core/pipeline_parallel/fine_grained_activation_offload.py.
    """
    if settings.flags.get("cuda-graph-impl", "none") == "none" and not settings.on(
        "fine-grained-activation-offloading"
    ):
        return exact("graph_and_offload_pools", 0)
    kinds = [job.model.layers[index] for chunk in parts for index in chunk.layers]
    most = sum(tensor.bytes for layer in kinds for tensor in kept(job, layer_saved(job, settings, sizes, layer)))
    away = max((offloaded_bytes(job, layer_saved(job, settings, sizes, layer)) for layer in kinds), default=0)
    return ranged("graph_and_offload_pools", 0, low=0, high=max(most, away), formula="0 .. one micro-batch")


def _between(held: States) -> tuple[Term, ...]:
    """States while passes run: the optimizer's own copies of gradients were dropped before the first."""
    if not held.step_only_bytes:
        return held.terms
    return tuple(
        replace(
            term,
            bytes=term.bytes - held.step_only_bytes,
            low_bytes=term.low_bytes - held.step_only_bytes,
            high_bytes=term.high_bytes - held.step_only_bytes,
        )
        if term.name == "gradients"
        else term
        for term in held.terms
    )


def _resident(
    job: TrainingJob, settings: Settings, sizes: Sizes, parts: tuple[Chunk, ...], persistent: tuple[Term, ...]
) -> tuple[Term, ...]:
    """Buffers while passes run: the batch, and one input and gradient under way between stages."""
    kept_terms = [term for term in persistent if term.name != "stage_inputs"]
    stream = tensor_bytes(sizes.stream_tokens * job.model.hidden_size, job.precision.compute)
    if any(chunk.receives for chunk in parts):
        kept_terms.append(_modelled("stage_transfer", 2 * stream))
    if any(chunk.embedding or chunk.head for chunk in parts):
        kept_terms.append(exact("batch", batch_bytes(job, settings, sizes), formula="68*b*s/c + b*s*s/c"))
    if any(chunk.head for chunk in parts):
        kept_terms.append(exact("deferred_head_gradients", deferred_bytes(job, settings, sizes)))
    return tuple(kept_terms)


def _peaks(
    job: TrainingJob, settings: Settings, sizes: Sizes, parts: tuple[Chunk, ...], costs: tuple[ChunkCost, ...]
) -> list[Peak]:
    """The fullest forward, loss and backward of the rank's schedule."""
    parallel = job.parallel
    virtual = len(parts)
    order = schedule.passes(
        schedule=_schedule(job),
        pipeline=parallel.pipeline_parallel_size,
        virtual=virtual,
        rank=parts[0].pp_rank,
        num_micro_batches=job.grad_accum,
        group=max(
            1, settings.count("microbatch-group-size-per-virtual-pipeline-stage", parallel.pipeline_parallel_size)
        ),
    )
    live = [0] * virtual
    best: dict[str, Peak] = {}
    for one in order:
        cost = costs[one.virtual]
        if one.forward:
            live[one.virtual] += 1
        for moment, extra in _moments(job, settings, sizes, cost, forward=one.forward):
            size = sum(n * c.saved.bytes for n, c in zip(live, costs, strict=True)) + sum(term.bytes for term in extra)
            if moment not in best or size > best[moment].bytes:
                best[moment] = Peak(in_flight=tuple(live), extra=extra, bytes=size, moment=moment)
        if not one.forward:
            live[one.virtual] -= 1
    return list(best.values())


def _schedule(job: TrainingJob) -> str:
    return job.parallel.schedule or "1f1b"


def _moments(
    job: TrainingJob, settings: Settings, sizes: Sizes, cost: ChunkCost, *, forward: bool
) -> list[tuple[str, tuple[Term, ...]]]:
    if forward:
        found: list[tuple[str, tuple[Term, ...]]] = [("forward", (_modelled("forward_transient", cost.forward_bytes),))]
        if cost.head:
            found.append(("loss", (loss_peak(job, settings, sizes),)))
            found.append(("head backward", (head_backward(job, sizes),)))
        return found
    terms = [_modelled("backward_transient", cost.backward_bytes)]
    if cost.rebuilt_bytes:
        terms.append(exact("recomputed_layer", cost.rebuilt_bytes, formula="one checkpointed group", source=CHECKPOINT))
    return [("backward", tuple(terms))]


def _modelled(name: str, num_bytes: int) -> Term:
    return ranged(name, num_bytes, low=num_bytes // 2, high=num_bytes * 2)


def _activations(costs: tuple[ChunkCost, ...], peak: Peak) -> tuple[Term, ...]:
    """Kept activations of all micro-batches in flight."""
    found = []
    for number, cost in zip(peak.in_flight, costs, strict=True):
        if number:
            found.append(_scaled(cost.saved, number))
    return tuple(found)


def _scaled(term: Term, number: int) -> Term:
    if number == 1:
        return term
    return replace(
        term,
        bytes=term.bytes * number,
        low_bytes=term.low_bytes * number,
        high_bytes=term.high_bytes * number,
        formula=f"{number} micro-batches in flight",
        source=SCHEDULES,
        children=tuple(_scaled(child, number) for child in term.children),
    )


def _ledger(job: TrainingJob, rank: int, moment: str, terms: tuple[Term, ...]) -> Ledger:
    allocated = total("allocated", tuple(term for term in terms if term.bytes or term.high_bytes))
    return Ledger(
        rank=rank,
        moment=moment,
        allocated=allocated,
        reserved_overhead=fragmentation(job, allocated),
        outside=outside(job),
    )
