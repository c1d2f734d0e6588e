"""What the engine will say: figures by the names of its log, and the lines themselves in its words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ullage.engines.serving import Amount
from ullage.engines.vllm.backend import warmed_up
from ullage.engines.vllm.graphs import num_full, sizes
from ullage.ledger import Term, total
from ullage.units import GiB

if TYPE_CHECKING:
    from ullage.engines.vllm.defaults import Setup
    from ullage.engines.vllm.pool import Pool
    from ullage.engines.vllm.start import Profiled


def amount(values: Sequence[float]) -> Amount:
    """Return (low, expected, high) as an amount, widened to hold the expected value."""
    low, value, high = values
    return Amount(value=value, low=min(low, value), high=max(high, value))


def of_term(term: Term) -> Amount:
    """Return a term as an amount in bytes."""
    return Amount(value=term.bytes, low=term.low_bytes, high=term.high_bytes)


def captured(setup: Setup, one: Profiled) -> Amount:
    """Return what "Graph capturing took" says: a difference of free memory, against which cached segments count.

    Attention's workspace stands in it where nothing has warmed it up before.
    """
    graphs = of_term(one.graphs)
    if not graphs.value:
        return graphs
    held = one.workspace.bytes if num_full(setup, sizes(setup)) and not warmed_up(setup) else 0
    return Amount(value=graphs.value + held, low=graphs.low + held - 1.25 * GiB, high=graphs.high + held)


def figures(
    setup: Setup, one: Profiled, pools: tuple[Pool, Pool, Pool], device_used: Amount, budget: int
) -> dict[str, Amount]:
    """Return the log's figures for the rank that fills first."""
    graphs, peak = captured(setup, one), of_term(one.activation)
    if setup.version.setting("peak_holds_graphs"):
        peak = of_term(total("activation_peak", (one.activation, one.estimate)))
    return {
        "weights": of_term(one.loaded),
        "activation_peak": peak,
        "non_torch": of_term(one.non_torch),
        "cuda_graphs": graphs,
        "cuda_graph_estimate": of_term(one.estimate),
        "max_allocated": Amount(
            value=one.weights.bytes + one.buffers.bytes + one.activation.bytes,
            low=one.weights.low_bytes + one.buffers.low_bytes + one.activation.low_bytes,
            high=one.weights.high_bytes + one.buffers.high_bytes + one.activation.high_bytes,
        ),
        "requested": Amount(value=budget, low=budget, high=budget),
        "kv_cache": amount(one.available),
        "num_gpu_blocks": amount([each.num_blocks for each in pools]),
        "kv_cache_tokens": amount([each.tokens for each in pools]),
        "max_concurrency": amount([each.concurrency for each in pools]),
        "device_used": device_used,
        "total": amount(setup.total_bytes),
    }


def log_lines(setup: Setup, one: Profiled, pool: Pool, reason: str) -> tuple[str, ...]:
    """Return the lines that the version prints at its start.

    Source: vllm@0.33.0:vllm/v1/worker/gpu_worker.py, vllm/v1/core/kv_cache_utils.py;
        vllm@0.8.5:vllm/worker/worker.py; vllm@0.6.4:vllm/worker/worker.py.
    """
    gib = {
        name: term.bytes / GiB
        for name, term in (
            ("weights", one.loaded),
            ("peak", one.activation),
            ("other", one.non_torch),
        )
    }
    took = captured(setup, one).value / GiB
    kv = one.available[1] / GiB
    length = pool.max_model_len
    if setup.version.engine == "V0":
        lines = [
            f"Loading model weights took {gib['weights']:.4f} GiB",
            f"model weights take {gib['weights']:.2f}GiB; non_torch_memory takes {gib['other']:.2f}GiB; PyTorch "
            f"activation peak memory takes {gib['peak']:.2f}GiB; the rest of the memory reserved for KV Cache is "
            f"{kv:.2f}GiB.",
            f"# GPU blocks: {pool.num_blocks}",
            f"Maximum concurrency for {length} tokens per request: {pool.concurrency:.2f}x",
        ]
    else:
        lines = [f"Model loading took {gib['weights']:.2f} GiB", f"Available KV cache memory: {kv:.2f} GiB"]
        if one.estimate.bytes:
            lines.insert(1, f"Estimated CUDA graph memory: {one.estimate.bytes / GiB:.2f} GiB total")
        if not reason:
            lines += [
                f"GPU KV cache size: {pool.tokens:,} tokens",
                f"Maximum concurrency for {length:,} tokens per request: {pool.concurrency:.2f}x",
            ]
    if reason:
        return (*lines, f"ValueError: {reason}")
    if one.graphs.bytes:
        lines.append(f"Graph capturing finished, took {took:.2f} GiB")
    return tuple(lines)
