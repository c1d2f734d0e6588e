"""From a walked timeline to the ledgers of a rank."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ullage.account.timeline import Moment, Timeline
from ullage.engines.training import TrainingRank
from ullage.ledger import Ledger, Term, exact, ranged, total
from ullage.spec.machine import Gpu
from ullage.units import GiB, KiB, MiB

#: Terms that follow from shapes and layout alone.
EXACT = frozenset(("weights", "master_weights", "gradients", "optimizer_states", "buffers", "pipeline_buffers"))
_FORMULAS = {
    "weights": "shard of the parameters, in the dtype they are stored in",
    "gradients": "sharded gradients",
    "optimizer_states": "states of the optimizer",
    "activations": "tensors kept for the backward pass",
    "recompute": "tensors made again for the backward pass",
    "temporaries": "results that live for a few operations",
    "activation_gradients": "gradients of activations under way",
    "unsharded_gradients": "gradients of a unit's weights before reduction",
    "unsharded_parameters": "gathered parameters, U*p",
    "all_gather_output": "flat output of the all-gather, U*p",
    "all_gather_input": "this rank's part as sent, U*p/N",
    "reduce_scatter_input": "flat gradient as sent, U*r",
    "logits": "logits, their fp32 copy and log-softmax",
    "logits_gradient": "gradient of the logits",
    "accumulated_gradients": "whole gradients in the reduce dtype, added up over micro-batches, U*r",
    "pipeline_buffers": "activations and gradients received from other stages",
    "optimizer_temporaries": "temporaries of the optimizer step",
    "workspace": "cuBLAS workspaces",
}


@dataclass(frozen=True, kw_only=True)
class Doubt:
    """How far a walk may be off.

    Attributes:
        modelled: share of a modelled term by which it may be lower or higher.
        reserved: share of the allocated peak by which fragmentation may be higher than walked.
        setup_bytes: segments that loading and wrapping may leave beyond what is walked.
        held_bytes: what a training loop may still hold between steps (logits of the last one).
        shift_low_bytes, shift_high_bytes: further known uncertainty (a version or a setting that is not known).
    """

    modelled: float = 0.06
    reserved: float = 0.05
    shift_low_bytes: int = 0
    shift_high_bytes: int = 0
    setup_bytes: int = 0
    held_bytes: int = 0


def _term(category: str, num_bytes: int, doubt: Doubt, source: str) -> Term:
    formula = _FORMULAS.get(category, category)
    if category in EXACT:
        return exact(category, num_bytes, formula=formula, source=source)
    low, high = int(num_bytes * (1 - doubt.modelled)), int(num_bytes * (1 + doubt.modelled))
    return ranged(category, num_bytes, low=low, high=high, formula=formula, source=source)


def ledger_of(
    moment: Moment, timeline: Timeline, doubt: Doubt, outside: Term, source: str, workspace_bytes: int
) -> Ledger:
    """Return the ledger of a moment; reserved bytes are the most held up to the end of the walk."""
    terms = [_term(name, size, doubt, source) for name, size in moment.by_category.items() if size]
    if workspace_bytes:
        terms.append(
            exact(
                "workspace",
                workspace_bytes,
                formula=_FORMULAS["workspace"],
                source="torch@2.13.0:aten/src/ATen/cuda/CublasHandlePool.cpp:parseChosenWorkspaceSize",
            )
        )
    allocated, unapplied = total("allocated", terms), 0
    if doubt.shift_low_bytes or doubt.shift_high_bytes:
        uncertain = sum(term.low_bytes for term in terms if term.name not in EXACT)  # no setting takes more away
        unapplied = max(0, doubt.shift_low_bytes - uncertain)  # held at another moment, but reserved ever since
        terms.append(
            ranged(
                "unknown_settings",
                0,
                low=-min(doubt.shift_low_bytes, uncertain),
                high=doubt.shift_high_bytes,
                formula="settings not given",
            )
        )
        allocated = total("allocated", terms)
    peak = timeline.pools.peak_reserved + workspace_bytes
    overhead = max(0, peak - allocated.bytes)
    reserved = ranged(
        "reserved_overhead",
        overhead,
        low=max(0, int(overhead * 0.7) - 64 * MiB - unapplied),
        high=int(overhead + doubt.reserved * moment.peak_bytes) + 256 * MiB + doubt.setup_bytes,
        formula="pools of each stream laid out block by block",
        source="torch@2.13.0:c10/cuda/CUDACachingAllocator.cpp",
    )
    return Ledger(moment=moment.name, allocated=allocated, reserved_overhead=reserved, outside=outside)


def workspace_of(gpu: Gpu) -> int:
    """CuBLAS workspace, made with the first product: 32 MiB on Hopper and later, 8.125 MiB before.

    Source: torch@2.13.0:aten/src/ATen/cuda/CublasHandlePool.cpp:parseChosenWorkspaceSize.
    """
    return 32 * MiB if (gpu.compute_capability or (0, 0)) >= (9, 0) else 8 * MiB + 128 * KiB


def outside_of(num_gpus: int) -> Term:
    """CUDA context and NCCL of a training process.

    Formula: context 0.5 GiB; NCCL 0.4 GiB for the world and as much for a sharding group.
    Source: measured constants published by other tools for H100 (context 0.52, NCCL world 0.39, FSDP 0.96 GiB).
    Known error: differs by driver, GPU and the number of communicators; hence the range.
    """
    seen = "published by other tools for H100: context 0.52, NCCL 0.39 and 0.96 GiB"
    context = ranged(
        "cuda_context", GiB // 2, low=int(0.3 * GiB), high=int(0.8 * GiB), formula="0.5 GiB on any GPU", source=seen
    )
    if num_gpus == 1:
        return total("outside", (context,))
    nccl = ranged(
        "nccl",
        int(0.9 * GiB),
        low=int(0.3 * GiB),
        high=int(2.0 * GiB),
        formula="communicators of the world and of a sharding group",
        source=seen,
    )
    return total("outside", (context, nccl))


def rank_of(
    timeline: Timeline,
    doubt: Doubt,
    *,
    rank: int,
    num_ranks: int,
    pp_rank: int,
    num_gpus: int,
    source: str,
    workspace_bytes: int,
    host_bytes: int = 0,
) -> TrainingRank:
    """Return the rank of a walked timeline: the last step's moments."""
    starts = [index for index, moment in enumerate(timeline.moments) if moment.name == "after step"]
    first = starts[-2] + 1 if len(starts) > 1 else 1
    moments = timeline.moments[first:]
    best: dict[str, Moment] = {}
    for moment in moments:
        known = best.get(moment.name)
        if known is None or moment.peak_bytes > known.peak_bytes:
            best[moment.name] = moment
    outside = outside_of(num_gpus)
    last = replace(doubt, shift_high_bytes=doubt.shift_high_bytes + doubt.held_bytes)
    ledgers = {
        name: ledger_of(moment, timeline, last if name == "after step" else doubt, outside, source, workspace_bytes)
        for name, moment in best.items()
    }
    after = ledgers.pop("after step")
    return TrainingRank(
        rank=rank,
        num_ranks=num_ranks,
        pp_rank=pp_rank,
        moments=tuple(ledgers.values()),
        after_step=after,
        host_bytes=host_bytes,
    )
