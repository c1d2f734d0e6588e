"""One optimizer step of one pipeline rank, moment by moment, and the ledgers of its peaks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ullage.account.activations.saved import SavedTensor
from ullage.engines.megatron import schedule
from ullage.engines.megatron.activations import kept, layer_saved, offloaded_bytes
from ullage.engines.megatron.blocks import placed_bytes
from ullage.engines.megatron.buffers import buffers
from ullage.engines.megatron.defaults import Settings
from ullage.engines.megatron.layout import Chunk, Groups
from ullage.engines.megatron.loss import batch_bytes, deferred_bytes, head_saved_bytes, logits_elements, loss_peak
from ullage.engines.megatron.mixture import rows
from ullage.engines.megatron.shape import Sizes
from ullage.engines.megatron.states import ALLOCATOR, States, states
from ullage.engines.training import TrainingRank
from ullage.ledger import Certainty, Ledger, Term, exact, ranged, total
from ullage.spec.model import Attention, DenseFFN, LatentAttention, Layer, MoEFFN
from ullage.spec.training import TrainingJob
from ullage.units import GiB, tensor_bytes

CHECKPOINT = "Megatron-LM@adc69db:megatron/core/transformer/transformer_block.py:TransformerBlock._checkpointed_forward"
SCHEDULES = "Megatron-LM@adc69db:megatron/core/pipeline_parallel/schedules.py"


@dataclass(frozen=True, kw_only=True)
class ChunkCost:
    """Bytes of one micro-batch in one chunk.

    Attributes:
        saved: term of what is kept from forward to backward.
        forward_bytes, backward_bytes: on top, while the chunk's fullest layer runs.
        rebuilt_bytes: what full recompute builds again for one group of layers.
    """

    saved: Term
    forward_bytes: int
    backward_bytes: int
    rebuilt_bytes: int
    head: bool


@dataclass(frozen=True, kw_only=True)
class Peak:
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
    after = _ledger(job, first_rank, "after step", (*held.terms, *persistent))
    resident = _resident(job, settings, sizes, parts, persistent)
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
    found.append(_ledger(job, first_rank, "optimizer step", (*held.terms, *persistent, *_step_terms(held))))
    stage = job.parallel.tensor_parallel_size * groups.data
    return TrainingRank(
        rank=first_rank,
        num_ranks=stage,
        pp_rank=parts[0].pp_rank,
        moments=tuple(found),
        after_step=after,
        host_bytes=held.host_bytes,
    )


def _between(held: States) -> tuple[Term, ...]:
    """States while passes run: the optimizer's own copies of gradients were dropped before the first."""
    if not held.step_only_bytes:
        return held.terms
    return tuple(
        replace(term, bytes=term.bytes - held.step_only_bytes, low_bytes=term.low_bytes - held.step_only_bytes,
                high_bytes=term.high_bytes - held.step_only_bytes)
        if term.name == "gradients" else term
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


def _step_terms(held: States) -> tuple[Term, ...]:
    return ()


def chunk_cost(job: TrainingJob, settings: Settings, sizes: Sizes, chunk: Chunk) -> ChunkCost:
    """Add up a chunk's layers under the job's recompute."""
    model, recompute = job.model, job.recompute
    full_layers = [_full_bytes(job, settings, sizes, model.layers[index]) for index in chunk.layers]
    mtp = [_full_bytes(job, settings, sizes, module.layer) for module in model.mtp] if chunk.mtp else []
    parts: list[Term] = []
    rebuilt = 0
    stream = tensor_bytes(sizes.stream_tokens * model.hidden_size, job.precision.compute)
    if recompute.kind == "full":
        number = len(chunk.layers)
        every = max(1, recompute.every)
        checked = number if recompute.num_layers is None else min(number, recompute.num_layers)
        parts.append(
            exact("checkpoints", -(-checked // every) * stream, formula=f"{-(-checked // every)} x n*h", source=CHECKPOINT)
        )
        rebuilt = max((sum(full_layers[at : at + every]) for at in range(0, checked, every)), default=0)
        rest = chunk.layers[checked:]
    else:
        rest = chunk.layers
    parts += _layer_terms(job, settings, sizes, [model.layers[index] for index in rest])
    parts.append(_placed(job, settings, sizes, [model.layers[index] for index in rest]))
    if mtp:
        parts += _mtp_terms(job, settings, sizes)
    if chunk.head:
        parts.append(exact("head_saved", head_saved_bytes(job, sizes), formula="2*n*h"))
    if chunk.embedding and settings.hidden_dropout:
        mask = sizes.stream_tokens * model.hidden_size
        parts.append(exact("embedding_dropout_mask", mask, formula="n*h"))
    transient = [_transient(job, settings, sizes, model.layers[index]) for index in chunk.layers] or [(0, 0)]
    return ChunkCost(
        saved=total("activations", parts),
        forward_bytes=max(forward for forward, _back in transient),
        backward_bytes=max(backward for _forward, backward in transient),
        rebuilt_bytes=rebuilt,
        head=chunk.head,
    )


def _full_bytes(job: TrainingJob, settings: Settings, sizes: Sizes, layer: Layer) -> int:
    return sum(tensor.bytes for tensor in kept(job, layer_saved(job, settings, sizes, layer)))


def _layer_terms(job: TrainingJob, settings: Settings, sizes: Sizes, layers: Iterable[Layer]) -> list[Term]:
    """One term per kind of tensor, over all layers."""
    sums: dict[str, list[int]] = {}
    about: dict[str, SavedTensor] = {}
    counts: dict[int, tuple[Layer, int]] = {}
    for layer in layers:
        counts[id(layer)] = (layer, counts.get(id(layer), (layer, 0))[1] + 1)
    for layer, times in counts.values():
        for tensor in kept(job, layer_saved(job, settings, sizes, layer)):
            about.setdefault(tensor.name, tensor)
            sums.setdefault(tensor.name, []).append(tensor.bytes * times)
    return [_table_term(job, settings, about[name], sum(parts)) for name, parts in sums.items()]


def _placed(job: TrainingJob, settings: Settings, sizes: Sizes, layers: list[Layer]) -> Term:
    """What the allocator adds to kept activations: rests of up to 1 MiB that stay with their blocks.

    Formula: tensors in forward order in a fresh pool; low 0, high twice as much.
    """
    order: list[int] = []
    known: dict[int, list[int]] = {}
    for layer in layers:
        if id(layer) not in known:
            known[id(layer)] = [tensor.bytes for tensor in kept(job, layer_saved(job, settings, sizes, layer))]
        order += known[id(layer)]
    rest = placed_bytes(order) - sum(order)
    return ranged("activation_rounding", rest, low=0, high=2 * rest, formula="rests of blocks", source=ALLOCATOR)


def _table_term(job: TrainingJob, settings: Settings, tensor: SavedTensor, num_bytes: int) -> Term:
    """A row of the table: exact, but for rows of experts under free routing and for a kernel that was guessed."""
    if tensor.name.startswith("experts.") and settings.capacity_factor is None:
        return ranged(tensor.name, num_bytes, low=num_bytes * 2 // 3, high=num_bytes * 3 // 2,
                      formula=tensor.formula, source=tensor.source)
    if tensor.name == "flash.output" and not settings.attention_sure:
        return ranged(tensor.name, num_bytes, low=0, high=num_bytes, formula=tensor.formula, source=tensor.source)
    if tensor.name == "core_attention.output" and settings.attention == "fused" and not settings.attention_sure:
        return ranged(tensor.name, num_bytes, low=num_bytes, high=2 * num_bytes,
                      formula=tensor.formula, source=tensor.source)
    return exact(tensor.name, num_bytes, formula=tensor.formula, source=tensor.source)


def _mtp_terms(job: TrainingJob, settings: Settings, sizes: Sizes) -> list[Term]:
    """Multi-token prediction: its layers, norms and projection inputs, and the softmax of its loss until backward.

    Formula: per module layer + 4*n*h (both norms, the joined halves) + 2*n*h head; 4*T*V/t fp32 softmax.
    Source: Megatron-LM@adc69db:megatron/core/transformer/multi_token_prediction.py:MultiTokenPredictionLayer.
    """
    stream = tensor_bytes(sizes.stream_tokens * job.model.hidden_size, job.precision.compute)
    number = max(1, settings.count("mtp-num-layers", len(job.model.mtp)))
    layer = _full_bytes(job, settings, sizes, job.model.mtp[0].layer)
    softmax = (2 if settings.fused_loss == "te" else 4) * logits_elements(job, sizes)
    return [
        exact("mtp.layers", number * (layer + 6 * stream), formula=f"{number} x (layer + 6*n*h)"),
        exact("mtp.softmax", number * softmax, formula=f"{number} x 4*T*V/t"),
    ]


def _transient(job: TrainingJob, settings: Settings, sizes: Sizes, layer: Layer) -> tuple[int, int]:
    """Bytes on top of what is kept while a layer runs forward and backward.

    Formula: forward 2*n*h + the widest output; mixtures 2*m*h for rows under way. Backward 2*n*h + the gradient of the
        widest activation; mixtures 2*m*h more. Unfused attention: one score matrix forward, two backward. Offloaded
        tensors of two layers are on the device at a time.
    """
    width = tensor_bytes(1, job.precision.compute)
    away = 2 * offloaded_bytes(job, layer_saved(job, settings, sizes, layer))
    stream = width * sizes.stream_tokens * job.model.hidden_size
    forward, backward = 2 * stream, 2 * stream
    for block in layer.ffns:
        if isinstance(block, DenseFFN):
            inner = width * sizes.tokens * block.intermediate_size // sizes.tensor
            forward, backward = max(forward, stream), backward + inner
        elif isinstance(block, MoEFFN):
            moved = width * rows(job, settings, sizes, block) * job.model.hidden_size
            forward, backward = forward + 2 * moved, backward + 2 * moved
    scores = _scores(settings, sizes, layer)
    return max(forward, width * scores) + away, max(backward, 2 * width * scores) + away


def _scores(settings: Settings, sizes: Sizes, layer: Layer) -> int:
    """Elements of a layer's score matrix where attention writes one out."""
    if settings.attention in ("flash", "fused"):
        return 0
    heads = [part.num_heads for part in layer.mixers if isinstance(part, (Attention, LatentAttention))]
    return max((sizes.scores(number) for number in heads), default=0)


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
        group=settings.count("microbatch-group-size-per-virtual-pipeline-stage", parallel.pipeline_parallel_size),
    )
    live = [0] * virtual
    best: dict[str, Peak] = {}
    for one in order:
        cost = costs[one.virtual]
        if one.forward:
            live[one.virtual] += 1
        for moment, extra in _moments(job, settings, sizes, cost, forward=one.forward):
            size = sum(n * c.saved.bytes for n, c in zip(live, costs)) + sum(term.bytes for term in extra)
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
        found = [("forward", (_modelled("forward_transient", cost.forward_bytes),))]
        if cost.head:
            found.append(("loss", (loss_peak(job, settings, sizes),)))
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
    for number, cost in zip(peak.in_flight, costs):
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
        reserved_overhead=_fragmentation(allocated),
        outside=_outside(job),
    )


def _fragmentation(allocated: Term) -> Term:
    """Reserved beyond allocated: 6 % of reserved by SimuMax's rule, 0 to 12 %.

    Source: SimuMax@v1.2:simumax/core/perf_llm.py (peak / 0.94).
    """
    return ranged(
        "fragmentation",
        allocated.bytes * 6 // 94,
        low=0,
        high=allocated.high_bytes * 12 // 88,
        formula="peak / 0.94 - peak",
        source="SimuMax@v1.2:simumax/core/perf_llm.py",
    )


def _outside(job: TrainingJob) -> Term:
    """CUDA context, NCCL communicators and libraries: 1 to 6 GiB.

    Source: Pith-Train@23db182:tools/memory_estimator/__main__.py:estimate_non_pytorch_bytes (5.84 GiB with compiled
    kernels and FSDP meshes, of which context 0.52 and one communicator 0.39).
    """
    parallel = job.parallel
    dims = sum(
        size > 1
        for size in (
            parallel.data_parallel_size,
            parallel.tensor_parallel_size,
            parallel.pipeline_parallel_size,
            parallel.context_parallel_size,
            parallel.expert_parallel_size,
        )
    )
    expected = int(0.52 * GiB + 0.39 * GiB * (1 + dims)) if job.machine.num_gpus > 1 else int(0.52 * GiB)
    return total(
        "outside",
        (
            ranged(
                "context_and_nccl",
                expected,
                low=expected // 2,
                high=expected + 4 * GiB,
                formula=f"0.52 + 0.39 x {1 + dims} GiB",
                source="Pith-Train@23db182:tools/memory_estimator",
                certainty=Certainty.MODELLED,
            ),
        ),
    )



