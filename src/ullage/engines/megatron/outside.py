"""What lies outside PyTorch's allocated bytes: fragmentation, context, communicators."""

from __future__ import annotations

from ullage.ledger import Certainty, Term, ranged, total
from ullage.numeric import larger, shown, smaller, whole
from ullage.spec.model import MoEFFN
from ullage.spec.training import TrainingJob
from ullage.units import GiB, MiB


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


#: What a communicator takes of two ranks and of more, behind NVLink; multicast buffers for each rank from Hopper on.
#: Source: NVIDIA/nccl issue 964 (544 and 688 MiB on A100, one collective each); nccl@2.27.5:src/transport/nvls.cc:
#: ncclNvlsBufferSetup (16 channels, reduce and broadcast, 8 steps of 128 KiB for each rank).
PAIR_BYTES, RING_AND_TREE_BYTES, MULTICAST_BYTES = 544 * MiB, 688 * MiB, 32 * MiB
CONTEXT_BYTES = int(0.52 * GiB)


def outside(job: TrainingJob) -> Term:
    """CUDA context, and NCCL's buffers for every group of ranks that Megatron-LM makes and uses.

    Source: Pith-Train@23db182:tools/memory_estimator/__main__.py:estimate_non_pytorch_bytes (context 0.52 GiB).
    """
    context = ranged(
        "context",
        CONTEXT_BYTES,
        low=CONTEXT_BYTES // 2,
        high=CONTEXT_BYTES + GiB // 2,
        formula="driver context and kernels, on any GPU",
        source="Pith-Train@23db182:tools/memory_estimator",
        certainty=Certainty.MODELLED,
    )
    if job.machine.num_gpus == 1:
        return total("outside", (context,))
    sizes = communicators(job)
    expected = sum(communicator_bytes(size, job) for size in sizes)
    nccl = ranged(
        "nccl",
        whole(expected),
        low=whole(expected) // 2,
        high=whole(expected) * 3 // 2 + GiB,
        formula=f"communicators of {', '.join(str(shown(size)) for size in sizes)} ranks",
        source="NVIDIA/nccl issue 964",
        certainty=Certainty.MODELLED,
    )
    return total("outside", (context, nccl))


def communicators(job: TrainingJob) -> tuple[int, ...]:
    """Sizes of the groups whose ranks talk in a step; a group is a communicator of its own, whatever its ranks.

    All ranks (barriers, loss) and again for the distributed optimizer's norm; data parallel with context and without;
    context, tensor, pipeline and its ends; tensor with pipeline; of experts their own, with tensor, and their data
    parallel, and tensor with data for the balance of routers.
    Source: Megatron-LM@core_v0.16.0:megatron/core/parallel_state.py:initialize_model_parallel, optimizer/__init__.py,
        transformer/moe/token_dispatcher.py, transformer/moe/router.py.
    Known error: a Megatron of TP 2, PP 2, DP 2 on eight H100 frees about 7 GB, with experts 9.5, when its communicators
        are suspended (verl-project/verl pull request 6408); these are 5.1 and 7.7 GB.
    """
    parallel = job.parallel
    tensor, pipeline, context = (
        parallel.tensor_parallel_size,
        parallel.pipeline_parallel_size,
        parallel.context_parallel_size,
    )
    data, world = parallel.data_parallel_size, job.machine.num_gpus
    found = [world, data, data * context, context, tensor, pipeline, tensor * pipeline]
    if parallel.zero_stage:
        found.append(world)
    if job.model.tied_embeddings:
        found.append(smaller(pipeline, 2))
    if any(isinstance(block, MoEFFN) for layer in job.model.layers for block in layer.ffns):
        experts, width = parallel.expert_parallel_size, parallel.expert_tensor_parallel_size
        width = 1 if width is None else width  # an array has no truth value
        spread = larger(1, data * context * tensor // (experts * width))
        found += [experts, experts * width, spread, tensor * data * context]
    return tuple(found)


def communicator_bytes(num_ranks: int, job: TrainingJob) -> int:
    """Bytes of one communicator: none for a rank by itself."""
    multicast = MULTICAST_BYTES if (job.machine.gpu.compute_capability or (8, 0)) >= (9, 0) else 0
    node = smaller(num_ranks, job.machine.gpus_per_node)
    more = (RING_AND_TREE_BYTES - PAIR_BYTES) + node * multicast
    return (num_ranks > 1) * PAIR_BYTES + (num_ranks > 2) * more
