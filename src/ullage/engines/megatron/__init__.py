"""Megatron-LM: one optimizer step, rank class by rank class.

``step(job)`` resolves Megatron-LM's defaults, places layers on pipeline ranks, and walks each rank's schedule. Ranks of
one pipeline stage are equal (balanced routing); each stage is a class.
"""

from __future__ import annotations

from dataclasses import replace

from ullage.engines.megatron import layout
from ullage.engines.megatron.defaults import VERSIONS, resolve
from ullage.engines.megatron.moments import RankParts, composition, rank_of, rank_parts
from ullage.engines.megatron.shape import sizes_of
from ullage.engines.megatron.tables import Tables
from ullage.engines.training import TrainingStep
from ullage.i18n import _
from ullage.spec.model import LatentAttention, MoEFFN
from ullage.spec.training import TrainingJob
from ullage.units import round_up

__all__ = ["VERSIONS", "step"]

#: Source: Megatron-LM@adc69db:megatron/training/arguments.py (--make-vocab-size-divisible-by).
VOCABULARY_MULTIPLE = 128


def step(job: TrainingJob) -> TrainingStep:
    """Walk one step of the job.

    Raises:
        LayoutError: sizes that do not divide the model or the GPUs. UnknownArchitectureError: a part without a table.
    """
    job, assumed_tensor = _expert_tensor(job)
    job, padded = padded_vocabulary(job)
    settings, assumed = resolve(job)
    groups, sizes = layout.groups(job), sizes_of(job, settings)
    stages = layout.chunks(job, settings)
    tables = Tables(job, settings, sizes, groups)
    shared: dict[tuple[object, ...], RankParts] = {}
    per_stage = job.parallel.tensor_parallel_size * groups.data
    last_order = settings.on("use-tp-pp-dp-mapping")
    ranks = []
    for index, parts in enumerate(stages):
        first = index * (
            job.parallel.tensor_parallel_size * job.parallel.context_parallel_size if last_order else per_stage
        )
        key = composition(job, parts)
        if key not in shared:
            shared[key] = rank_parts(tables, parts)
        ranks.append(rank_of(tables, parts, shared[key], first_rank=first))
    ranks.sort(key=lambda rank: -rank.peak.device_used.bytes)
    filled = replace(job, assumed=(*job.assumed, *assumed_tensor, *padded, *assumed))
    return TrainingStep(job=filled, ranks=tuple(ranks), warnings=_warnings(job))


def _expert_tensor(job: TrainingJob) -> tuple[TrainingJob, tuple[str, ...]]:
    """Without a command line experts are taken as whole: recipes for many small experts divide them by EP alone.

    On a command line the default is the tensor-parallel size, which the reader fills in.
    """
    parallel = job.parallel
    if parallel.expert_tensor_parallel_size is not None or parallel.tensor_parallel_size == 1:
        return job, ()
    filled = replace(job, parallel=replace(parallel, expert_tensor_parallel_size=1))
    has_experts = any(isinstance(block, MoEFFN) for layer in job.model.layers for block in layer.ffns)
    return filled, (_("expert tensor parallel size: 1"),) if has_experts else ()


def _warnings(job: TrainingJob) -> tuple[str, ...]:
    """Name what the tables leave out."""
    mixers = [mixer for layer in job.model.layers for mixer in layer.mixers]
    if any(isinstance(mixer, LatentAttention) and mixer.indexer is not None for mixer in mixers):
        return (_("sparse attention: the indexer's projections and scores are not counted among activations"),)
    return ()


def padded_vocabulary(job: TrainingJob) -> tuple[TrainingJob, tuple[str, ...]]:
    """Pad a vocabulary that the tensor-parallel ranks do not divide, to a multiple of 128 rows on each.

    Source: Megatron-LM@adc69db:megatron/training/tokenizer/tokenizer.py:_vocab_size_with_padding.
    """
    ranks, rows = job.parallel.tensor_parallel_size, job.model.vocab_size
    if rows % ranks == 0:
        return job, ()
    padded = round_up(rows, VOCABULARY_MULTIPLE * ranks)
    said = _("vocabulary padded from {rows:,} to {padded:,} rows").format(rows=rows, padded=padded)
    return replace(job, model=replace(job.model, vocab_size=padded)), (said,)
