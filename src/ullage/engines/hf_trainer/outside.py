"""What the caching allocator holds beyond what is in use, and what it does not see."""

from __future__ import annotations

from ullage.engines.hf_trainer.defaults import compiles
from ullage.ledger import Term, ranged, total
from ullage.spec.training import TrainingJob
from ullage.units import MiB

#: Blocks of one fp32 tensor of logits that lie free beside those in use: a shifted copy has other sizes than the
#: logits, so that the freed blocks do not fit the next step; without one, none is expected. Expected and at most, of
#: published pairs of reserved and allocated memory (docs/training.md).
LOGITS_BLOCKS = (1, 2)
#: Rounding and remainders of segments, of what is allocated: expected and at most.
SEGMENT_SHARE = (0.03, 0.12)
#: Gathered parameters have a stream, and so a pool, of their own.
SHARDED_SHARE = (0.12, 0.35)
EXPANDABLE_SHARE = (0.01, 0.03)


def reserved_overhead(job: TrainingJob, allocated: Term, *, shift_copies: bool) -> Term:
    """Return reserved minus allocated.

    Formula: share of the allocated bytes for rounding to segments, + free blocks of the size of fp32 logits where a
        loss makes them; never more than the card leaves.
    Source: torch@2.13.0:c10/cuda/CUDACachingAllocator.cpp (2 MiB and 20 MiB segments); published pairs in
        docs/training.md.
    Known error: fragmentation depends on the order of requests; the range is wide on purpose.
    """
    expandable = "expandable_segments:true" in job.alloc_conf.lower()
    share = EXPANDABLE_SHARE if expandable else SHARDED_SHARE if job.parallel.fsdp else SEGMENT_SHARE
    logits = 0
    if not expandable and job.loss in ("plain", "fused", None):
        width = 2 if compiles(job) else 4  # a compiled loss makes no fp32 logits
        logits = job.micro_batch_size * job.seq_len * job.model.vocab_size * width
    expected = round(allocated.bytes * share[0]) + LOGITS_BLOCKS[0] * logits * shift_copies
    high = round(allocated.high_bytes * share[1]) + LOGITS_BLOCKS[1] * logits
    room = max(0, job.machine.gpu.total_bytes - allocated.bytes - outside(job).bytes)
    return ranged(
        "reserved_overhead",
        min(expected, room) if room else 0,
        low=0,
        high=min(high, max(room, expected)) if room else high,
        formula="rounding to segments + free blocks of logits",
        source="torch@2.13.0:c10/cuda/CUDACachingAllocator.cpp",
    )


def outside(job: TrainingJob) -> Term:
    """Return what lies outside the allocator: the CUDA context, and NCCL where several GPUs run.

    Source: difference of nvidia-smi and torch in public reports (0.4 GiB on an A100, 0.6 GiB on an H100).
    """
    seen = "difference of nvidia-smi and torch in public reports"
    words = "driver context and kernels"
    children = [ranged("cuda_context", 480 * MiB, low=200 * MiB, high=900 * MiB, formula=words, source=seen)]
    if job.machine.num_gpus > 1:
        wires = ranged("nccl", 600 * MiB, low=100 * MiB, high=2048 * MiB, formula="channels and buffers", source=seen)
        children.append(wires)
    return total("outside", children)
