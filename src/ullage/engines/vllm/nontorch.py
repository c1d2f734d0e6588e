"""Memory that torch's allocator does not see: the CUDA context, NCCL and custom all-reduce, all-to-all buffers.

Which part of it a version calls ``non_torch`` depends on when it takes its first snapshot of free memory: V0 up to 0.6
and V1 of 0.8 count the context; from 0.9 on the context stands before the snapshot; from 0.11.0 on NCCL's first
buffers do too, and only what grows later is left.
"""

from __future__ import annotations

from ullage.account.calibrated import calibrated, serving_context
from ullage.engines.vllm.defaults import Setup
from ullage.engines.vllm.layout import expert_parallel_size, num_experts
from ullage.ledger import Term, exact, ranged
from ullage.units import GiB, MiB, round_up


def context(setup: Setup) -> Term:
    """Return the CUDA context with the modules that a start loads.

    Source: the engine's own line "Free memory on device (free/total)" of published starts: 0.61 GiB below the total on
        an H100, 0.41 GiB on an A100; NVIDIA CUDA C programming guide, lazy loading.
    Known error: the driver's version and the number of multiprocessors decide; half as much on small cards.
    """
    modelled = ranged(
        "cuda_context",
        (620 if _data_centre(setup) else 420) * MiB,
        low=200 * MiB,
        high=900 * MiB,
        formula="driver context and kernels",
        source="difference of nvidia-smi and torch in public reports",
    )
    gpu = setup.job.machine.gpu
    return calibrated(modelled, gpu, serving_context(gpu))


def _ranks(setup: Setup) -> int:
    parallel = setup.job.parallel
    return parallel.tensor_parallel_size * parallel.pipeline_parallel_size


def _data_centre(setup: Setup) -> bool:
    """Tell Hopper and Blackwell data-centre cards: larger contexts, and NVLink SHARP behind NVSwitch."""
    return (setup.job.machine.gpu.compute_capability or (0, 0))[0] in (9, 10)


def _several_ranks(setup: Setup) -> bool:
    return _ranks(setup) > 1 or setup.job.parallel.data_parallel_size > 1


def nccl_at_init(setup: Setup) -> Term:
    """Return what communicators take when they are made, before the first collective.

    Formula: multicast (NVLS) buffers and the symmetric pool of a Hopper or Blackwell node about 0.9 GiB; elsewhere
        the custom all-reduce buffers of 8 MiB, signals and channel records, about 24 MiB for each rank.
    Source: NCCL user guide, NCCL_NVLS_ENABLE, NCCL_BUFFSIZE;
        vllm@0.33.0:vllm/distributed/device_communicators/custom_all_reduce.py (max_size 8 MiB).
    Known error: topology and NCCL version decide; free memory of two H100 falls from 78.57 to 77.64 GiB in public logs.
    """
    if not _several_ranks(setup):
        return exact("nccl_at_init", 0, formula="one rank")
    ranks = _ranks(setup)
    low, expected, high = (256, 920, 1536 + 64 * ranks) if _data_centre(setup) else (16, 24 * ranks, 512 + 64 * ranks)
    return ranged(
        "nccl_at_init",
        expected * MiB,
        low=low * MiB,
        high=high * MiB,
        formula="communicators, multicast and custom all-reduce buffers",
        source="vllm@0.33.0:vllm/distributed/device_communicators/custom_all_reduce.py",
    )


#: A connection's receive buffers: LL (512 threads x 8 lines x 8 steps x 16 B), LL128 (640 x 120 x 8 x 8 B), Simple.
CONNECTION_BYTES = 512 * 8 * 8 * 16 + 640 * 120 * 8 * 8 + 4 * MiB
#: Channels of collectives over NVSwitch; those of multicast on Hopper and on Blackwell.
CHANNELS, NVLS_CHANNELS_HOPPER, NVLS_CHANNELS_BLACKWELL = 24, 16, 24


def nvswitch_buffers(setup: Setup) -> int:
    """Return what the collectives of one node behind NVSwitch connect.

    Formula: C x (1 + min(2, n - 1)) x (LL + LL128 + Simple) + (n > 2) x n x 2 x K x 1 MiB.
    Symbols: C channels, n ranks: one neighbour in the ring, up to two in the tree (a chain within a node); K multicast
        channels, each with 8 steps of 128 KiB for reduce and for broadcast and for every rank.
    Source: nccl@2.27.5:src/init.cc (DEFAULT_BUFFSIZE and others), src/transport/nvls.cc:ncclNvlsBufferSetup,
        ncclNvlsInit (no multicast for two GPUs up to 2.27), src/transport/p2p.cc:p2pRecvSetup; channels as its own
        lines say ("24 coll channels, 16 nvls channels") on H100.
    Known error: senders' records and rounding to 2 MiB add to it; what no message size chooses is not connected.
    """
    ranks, major = max(2, _ranks(setup)), (setup.job.machine.gpu.compute_capability or (9, 0))[0]
    multicast = NVLS_CHANNELS_BLACKWELL if major == 10 else NVLS_CHANNELS_HOPPER
    return CHANNELS * (1 + min(2, ranks - 1)) * CONNECTION_BYTES + (ranks > 2) * ranks * 2 * multicast * MiB


def _several_nodes(setup: Setup) -> bool:
    """Tell whether ranks talk over a network; boxes with unified memory have one GPU each."""
    machine = setup.job.machine
    backend = setup.flag("distributed_executor_backend").lower()
    return machine.num_nodes > 1 or "nodes" in backend or (machine.gpu.unified and machine.num_gpus > 1)


def nccl_in_use(setup: Setup) -> Term:
    """Return what NCCL connects at the first collectives: channel buffers for each peer, more between nodes.

    Formula: behind NVSwitch :func:`nvswitch_buffers`; elsewhere few channels, about 24 MiB for each rank.
    Source: NCCL user guide, NCCL_BUFFSIZE, NCCL_MAX_NCHANNELS, NCCL_RUNTIME_CONNECT.
    Known error: a factor of three; between nodes 0.25 to 2.5 GiB.
    """
    if not _several_ranks(setup):
        return exact("nccl_in_use", 0, formula="one rank")
    ranks = _ranks(setup)
    if _several_nodes(setup):
        low, expected, high = 192 * MiB, 768 * MiB, 2048 * MiB
    elif _data_centre(setup):
        low, expected, high = 64 * MiB, nvswitch_buffers(setup), (1024 + 128 * ranks) * MiB
    else:
        low, expected, high = 16 * MiB, 24 * ranks * MiB, (768 + 128 * ranks) * MiB
    return ranged(
        "nccl_in_use",
        expected,
        low=low,
        high=high,
        formula="channel buffers connected at the first collectives",
        source="nccl@2.27.5:src/init.cc, src/transport/nvls.cc:ncclNvlsBufferSetup",
    )


def all_to_all(setup: Setup) -> Term:
    """Return the low-latency DeepEP buffers, when that backend is asked for.

    Formula: 4 x E x T x (2H + 4H/128) bytes, T at most VLLM_MOE_DP_CHUNK_SIZE tokens a rank (256).
    Source: vllm@0.33.0:vllm/distributed/device_communicators/all2all.py:DeepEPLLAll2AllManager;
        DeepEP csrc/config.hpp:get_low_latency_rdma_size_hint.
    """
    name = setup.flag("all2all_backend") + setup.flag("VLLM_ALL2ALL_BACKEND")
    experts = num_experts(setup.job.model) + setup.job.redundant_experts
    if "low_latency" not in name or expert_parallel_size(setup) == 1 or not experts:
        return exact("all_to_all", 0, formula="no low-latency all-to-all")
    hidden, tokens = setup.job.model.hidden_size, 256
    size = round_up(4 * experts * tokens * (2 * hidden + 4 * hidden // 128), 2 * MiB)
    return ranged(
        "all_to_all",
        size,
        low=size // 2,
        high=2 * size,
        formula=f"4 x {experts} experts x {tokens} tokens x row",
        source="DeepEP csrc/config.hpp:get_low_latency_rdma_size_hint",
    )


def growth(setup: Setup) -> Term:
    """Return what the driver and libraries take between the first snapshot and the end of the profiling run.

    Kernels load lazily: cuBLAS and cuBLASLt handles, attention kernels, Triton modules, from 0.20 on FlashInfer's.
    Source: NVIDIA CUDA C programming guide, lazy loading; amounts by published logs, as the catalogue says.
    Known error: a factor of two.
    """
    name = "module_growth_data_centre_mib" if _data_centre(setup) else "module_growth_mib"
    expected = int(setup.version.setting(name))
    return ranged(
        "module_growth",
        expected * MiB,
        low=0,
        high=(512 if setup.version.at_least("0.20.0") else 256) * MiB,
        formula="modules loaded after the first snapshot",
        source="NVIDIA CUDA C programming guide, lazy loading",
    )


def loaded_code(setup: Setup) -> Term:
    """Return what the driver takes while weights are loaded on ROCm: code objects, scratch, a runtime heap.

    Versions up to 0.20 take the weights' figure there from a difference of free memory, so that this stands in it; it
    is counted once more as growth since the first snapshot.

    Source: vllm@0.14.0:vllm/platforms/rocm.py:get_current_memory_usage, vllm/utils/mem_utils.py:memory_profiling.
    Known error: 0.20, 0.26 and 0.55 GiB above the tensors in published starts; cached segments count too.
    """
    rocm = setup.job.machine.gpu.vendor == "amd" or setup.flag("platform") == "rocm"
    if not rocm or not setup.version.setting("rocm_load_by_free_memory"):
        return exact("loaded_code", 0, formula="torch's own count")
    return ranged(
        "loaded_code",
        256 * MiB,
        low=0,
        high=768 * MiB,
        formula="code objects and cached segments, by a difference of free memory",
        source="vllm@0.14.0:vllm/platforms/rocm.py:get_current_memory_usage",
    )


def context_counted(setup: Setup) -> bool:
    """Tell whether this version counts the CUDA context as ``non_torch``: it takes no snapshot after the context is up.

    Source: vllm@0.6.4:vllm/worker/worker.py:determine_num_available_blocks (total - free - torch; likewise V1 of 0.8),
        vllm@0.7.3:vllm/worker/worker.py:init_device (baseline snapshot), vllm@0.9.2:vllm/v1/worker/gpu_worker.py.
    """
    return not setup.version.at_least("0.7.0" if setup.version.engine == "V0" else "0.9.0")


def host_side(setup: Setup) -> Term:
    """Return what the engine's processes take of a memory that GPU and host share; free memory is one for both.

    Source: vllm@0.33.0:vllm/utils/mem_utils.py:MemorySnapshot.measure (psutil's available memory on integrated GPUs);
        published starts on GB10, non-torch memory: one box 2.2 GiB, two boxes 4.5 and 5.7, four boxes 0.1 GiB.
    Known error: page cache of the checkpoint's files counts on versions that read cudaMemGetInfo.
    """
    return ranged(
        "host_processes",
        2 * GiB,
        low=0,
        high=16 * GiB,
        formula="Python processes, pinned and cached pages",
        source="vllm@0.33.0:vllm/utils/mem_utils.py:MemorySnapshot.measure",
    )


def system_in_use(setup: Setup) -> Term:
    """Return what the system holds of a memory that GPU and host share before the engine starts.

    Source: GB10 with 121.69 GiB: 0.85 of it starts and the default 0.92 does not (vllm-project/recipes#632); 0.87
        starts for some (at most 15.8 GiB held), others find 101.3 to 102.2 GiB free
        (MiaAI-Lab/GLM-5.3-Flash-EXL3-2x-DGX-Sparks#47).
    Known error: the desktop, the page cache and other processes decide.
    """
    return ranged(
        "system_in_use",
        13 * GiB,
        low=4 * GiB,
        high=21 * GiB,
        formula="operating system, desktop, page cache",
        source="vllm-project/recipes#632; MiaAI-Lab/GLM-5.3-Flash-EXL3-2x-DGX-Sparks#47",
    )


def non_torch_parts(setup: Setup) -> tuple[Term, ...]:
    """Return what this version's ``non_torch`` is made of."""
    parts = [growth(setup), loaded_code(setup), all_to_all(setup)]
    if context_counted(setup):
        parts.append(context(setup))
    if setup.job.machine.gpu.unified:
        parts.append(host_side(setup))
    if not setup.version.setting("snapshot_after_nccl"):
        parts.append(nccl_at_init(setup))
    parts.append(nccl_in_use(setup))
    return tuple(part for part in parts if part.high_bytes)


def before_snapshot(setup: Setup) -> tuple[Term, ...]:
    """Return what is on the card, is not ``non_torch`` by this version's count, and is the engine's all the same."""
    parts = [] if context_counted(setup) else [context(setup)]
    if setup.version.setting("snapshot_after_nccl"):
        parts.append(nccl_at_init(setup))
    if setup.job.machine.gpu.unified and setup.job.device_free_bytes is None:
        parts.append(system_in_use(setup))
    return tuple(part for part in parts if part.high_bytes)
