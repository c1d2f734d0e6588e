"""What lies outside PyTorch's allocated bytes: fragmentation, context, communicators."""

from __future__ import annotations

from ullage.ledger import Certainty, Term, ranged, total
from ullage.numeric import shown, whole
from ullage.spec.training import TrainingJob
from ullage.units import GiB


def fragmentation(job: TrainingJob, allocated: Term) -> Term:
    """Reserved beyond allocated: 6 % of reserved by SimuMax's rule, 0 to 12 %; expandable segments 0 to 6 %.

    Source: SimuMax@v1.2:simumax/core/perf_llm.py (peak / 0.94).
    """
    if "expandable_segments:True" in job.alloc_conf:
        return ranged(
            "fragmentation",
            0,
            low=0,
            high=allocated.high_bytes * 6 // 94,
            formula="expandable segments",
            source="pytorch@2.9:c10/cuda/CUDACachingAllocator.cpp:ExpandableSegment",
        )
    return ranged(
        "fragmentation",
        allocated.bytes * 6 // 94,
        low=0,
        high=allocated.high_bytes * 12 // 88,
        formula="peak / 0.94 - peak",
        source="SimuMax@v1.2:simumax/core/perf_llm.py",
    )


def outside(job: TrainingJob) -> Term:
    """CUDA context, NCCL communicators and libraries: 1 to 6 GiB.

    Source: Pith-Train@23db182:tools/memory_estimator/__main__.py:estimate_non_pytorch_bytes (5.84 GiB with compiled
    kernels and FSDP meshes, of which context 0.52 and one communicator 0.39).
    """
    parallel = job.parallel
    dims = sum(
        1 * (size > 1)
        for size in (
            parallel.data_parallel_size,
            parallel.tensor_parallel_size,
            parallel.pipeline_parallel_size,
            parallel.context_parallel_size,
            parallel.expert_parallel_size,
        )
    )
    expected = whole(0.52 * GiB + 0.39 * GiB * (1 + dims)) if job.machine.num_gpus > 1 else int(0.52 * GiB)
    return total(
        "outside",
        (
            ranged(
                "context_and_nccl",
                expected,
                low=expected // 2,
                high=expected + 4 * GiB,
                formula=f"0.52 + 0.39 x {shown(1 + dims)} GiB",
                source="Pith-Train@23db182:tools/memory_estimator",
                certainty=Certainty.MODELLED,
            ),
        ),
    )
