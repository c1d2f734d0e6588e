"""CUDA graphs: which sizes are captured, what their pool takes, and the estimate that newer versions subtract.

Graph memory is the least predictable figure of a start: the log prints a difference of free memory, in which the
allocator gives back cached segments, so that it may even be negative. Ranges are wide on purpose.
"""

from __future__ import annotations

from ullage.engines.vllm.backend import whole_graphs_of_drafts, workspace
from ullage.engines.vllm.defaults import Setup
from ullage.engines.vllm.graph_mode import FULL, FULL_AND_PIECEWISE, NONE, PIECEWISE, graph_mode
from ullage.engines.vllm.layout import Stage
from ullage.engines.vllm.runner import second_runner
from ullage.ledger import Term, exact, ranged
from ullage.spec import model as spec
from ullage.units import GiB, KiB, MiB

#: Driver memory of one instantiated graph of one layer's kernels, and its range: kernel nodes, parameters, launch
#: records. vLLM itself reckons at least 1 MiB for a whole captured size (profile_cudagraph_memory).
PIECE_BYTES, PIECE_LOW_BYTES, PIECE_HIGH_BYTES = 256 * KiB, 32 * KiB, 1408 * KiB


def sizes(setup: Setup) -> tuple[int, ...]:
    """Return the captured batch sizes, ascending; empty when nothing is captured.

    Source: vllm@0.33.0:vllm/config/vllm.py:_set_cudagraph_sizes; vllm@0.10.2:vllm/config/__init__.py (1, 2, 4, then
        eights to 512); vllm@0.6.4:vllm/worker/model_runner.py (eights to max_num_seqs, 256 at most).
    """
    job, rule = setup.job, str(setup.version.setting("graph_sizes"))
    if graph_mode(setup) == NONE:
        return ()
    if job.cuda_graph_sizes:
        return tuple(sorted(size for size in job.cuda_graph_sizes if size <= setup.tokens))
    seqs, query = job.max_num_seqs or 1, 1 + (job.num_speculative_tokens or 0)
    if setup.version.engine == "V0":
        largest = min(seqs, 256)
        return tuple(size for size in (1, 2, 4, *range(8, 257, 8)) if size <= largest)
    largest = job.cuda_graph_max_batch_size or _largest(setup, rule, seqs, query)
    if rule == "eights_to_512":
        found = [1, 2, 4, *range(8, largest + 1, 8)]
    else:
        found = [size for size in (1, 2, 4) if size <= largest]
        found += [*range(8, min(largest + 1, 256), 8), *range(256, largest + 1, 16)]
    return tuple(size for size in found if size <= setup.tokens)


def _largest(setup: Setup, rule: str, seqs: int, query: int) -> int:
    if rule == "eights_to_512":
        return 512
    major = (setup.job.machine.gpu.compute_capability or (0, 0))[0]
    ceiling = 1024 if major == 10 and setup.version.at_least("0.28.0") else 512
    return min(seqs * query * 2, ceiling)


def num_full(setup: Setup, captured: tuple[int, ...]) -> int:
    """Return how many sizes are also captured as one whole graph (decode batches)."""
    mode = graph_mode(setup)
    if mode == FULL:
        return len(captured)
    query = 1 + (setup.job.num_speculative_tokens or 0)
    if query > 1 and not whole_graphs_of_drafts(setup):
        return 0
    return sum(size <= (setup.job.max_num_seqs or 1) * query for size in captured) if mode != PIECEWISE else 0


def cuda_graphs(setup: Setup, stage: Stage) -> Term:
    """Return what capturing takes by the log's count: free memory before less free memory after.

    Formula: pieces x sizes x m + full sizes x layers x m / 4; pieces = layers + 1 (graphs are cut at attention).
    Symbols: m driver memory of one graph of a layer's kernels.
    Source: vllm@0.33.0:vllm/v1/worker/gpu_model_runner.py:capture_model, profile_cudagraph_memory.
    Known error: a factor of about three either way, and up to 1 GiB of cached segments given back meanwhile.
    """
    captured = sizes(setup)
    if not captured:
        return exact("cuda_graphs", 0, formula="nothing captured")
    layers = stage.share.layers[1] - stage.share.layers[0]
    piecewise = graph_mode(setup) in (PIECEWISE, FULL_AND_PIECEWISE)
    full = num_full(setup, captured)
    graphs = (layers + 1) * len(captured) if piecewise else 0
    expected = graphs * PIECE_BYTES + full * (layers * PIECE_BYTES // 4 if not piecewise else MiB)
    return ranged(
        "cuda_graphs",
        expected,
        low=(graphs * PIECE_LOW_BYTES + full * PIECE_LOW_BYTES),
        high=graphs * PIECE_HIGH_BYTES + full * layers * PIECE_BYTES + GiB // 2,
        formula=f"{graphs} graphs of pieces, {len(captured)} sizes up to {captured[-1]}, {full} full graphs",
        source="vllm@0.33.0:vllm/v1/worker/gpu_model_runner.py:capture_model",
    )


def estimate(setup: Setup, stage: Stage) -> Term:
    """Return the estimate that versions from 0.20.0 on take off the KV cache.

    Formula: first runner: first capture + (sizes - 1) x max(second, 1 MiB) for each mode; the first captures overlap.
        Second runner: nothing up to 0.28; then all that capturing takes (:func:`cuda_graphs`), whole graphs reckoned
        from two. FlashInfer's workspace is made while a whole graph is captured, and counts.
    Source: vllm@0.22.1:vllm/v1/worker/gpu_model_runner.py:profile_cudagraph_memory; vllm@0.28.0:
        vllm/v1/worker/gpu/model_runner.py:profile_cudagraph_memory; vllm@0.29.0:vllm/v1/worker/gpu/cudagraph_utils.py.
    Known error: see :func:`cuda_graphs`. Published estimates come to 0.09 to 0.16 MiB for each layer and captured
        shape, on average over both modes: 0.52 GiB for 86 shapes of 36 layers, 0.76 for 102 of 60, 0.20 for 136 of
        16; 0.6 MiB with all-to-all experts, or with a driver of 2023. With unified memory free memory is
        cudaMemGetInfo's, which page cache and host processes move too.
    """
    captured, second = sizes(setup), second_runner(setup)
    applied = setup.truth(
        "VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS", bool(setup.version.setting("subtract_cuda_graphs"))
    )
    amd = setup.job.machine.gpu.vendor == "amd" and not setup.version.at_least("0.26.0")
    if not captured or not applied or amd or (second and not setup.version.setting("second_runner_profiles_graphs")):
        return exact("cuda_graph_estimate", 0, formula="not subtracted by this version or job")
    full = num_full(setup, captured)
    attention = workspace(setup, stage).bytes
    buffer = attention if full else 0
    layers = stage.share.layers[1] - stage.share.layers[0]
    whole = max(MiB, layers * PIECE_BYTES // (4 if second else 2))
    pieces_too = graph_mode(setup) in (PIECEWISE, FULL_AND_PIECEWISE)
    descriptors = full + (len(captured) if pieces_too and not second else 0)
    host = 4 * GiB if setup.job.machine.gpu.unified else 0
    pieces = cuda_graphs(setup, stage) if second else exact("pieces", 0, formula="two of each mode are captured")
    return ranged(
        "cuda_graph_estimate",
        32 * MiB + buffer + descriptors * whole + pieces.bytes,
        low=buffer + descriptors * MiB + pieces.low_bytes,
        high=128 * MiB + attention + descriptors * 4 * whole + pieces.high_bytes + host,
        formula=f"32 MiB first capture + {descriptors} captured shapes x {whole / MiB:.1f} MiB + pieces "
        f"{pieces.bytes / MiB:.0f} MiB + attention's workspace {buffer / MiB:.0f} MiB",
        source="vllm@0.22.1:vllm/v1/worker/gpu_model_runner.py:profile_cudagraph_memory",
    )


def state_layers(model: spec.Model) -> int:
    """Return how many layers are neither full nor sliding attention: they cut graphs too."""
    attention = (spec.Attention, spec.LatentAttention, spec.CompressedAttention)
    return sum(not isinstance(mixer, attention) for layer in model.layers for mixer in layer.mixers)
