"""CUDA graphs: which batches are captured, and what they cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ullage.catalog import load
from ullage.engines.sglang.flags import Flags
from ullage.engines.sglang.versions import CATALOG, Release, resolve
from ullage.frozen import Frozen
from ullage.spec.serving import ServingJob
from ullage.units import MiB

if TYPE_CHECKING:
    from ullage.engines.sglang.fraction import Demand

_NO_PIECEWISE = frozenset(
    ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM", "DeepseekV4ForCausalLM", "Qwen3NextForCausalLM")
)


class Card(Frozen):
    """What the graph defaults go by: memory as ``nvidia-smi`` shows it, and the tensor-parallel size."""

    mib: float
    tp: int


def capture(
    job: ServingJob, flags: Flags, release: Release, card: Card, running: int | None
) -> tuple[int, tuple[int, ...]]:
    """Return (largest decode batch, captured sizes); no sizes where graphs are off.

    ``running``: the request limit, where there is one; larger batches are never captured.
    Source: sglang@0.4.10:srt/model_executor/cuda_graph_runner.py:get_batch_sizes_to_capture;
        sglang@0.5.23:srt/arg_groups/cuda_graph_hook.py:generate_decode_cuda_graph_batch_sizes.
    """
    largest = job.cuda_graph_max_batch_size or _default_max(release, card.mib, card.tp)
    if job.cuda_graph_sizes:
        sizes = tuple(sorted(set(job.cuda_graph_sizes)))
        largest = sizes[-1]
    else:
        if running and not job.cuda_graph_max_batch_size and release.rule("graphs_capped_by_requests"):
            largest = min(largest, running)
        speculative = bool(job.speculative or flags.text("speculative_algorithm"))
        sizes = _sizes(release.rule("cuda_graph_sizes"), largest, speculative)
    if job.enforce_eager or flags.on("disable_cuda_graph") or flags.on("disable_decode_cuda_graph"):
        return largest, ()
    return largest, tuple(size for size in sizes if running is None or size <= running)


def _default_max(release: Release, capacity_mib: float, tp: int) -> int:
    for below, small, large in release.rule("cuda_graph_max_bs"):
        if below is None or capacity_mib < below:
            return int(small if tp < 4 else large)
    raise AssertionError("the last row of the table has no limit")


def _sizes(kind: str, largest: int, speculative: bool) -> tuple[int, ...]:
    if kind == "sparse":
        usual = [1, 2, 4, 8, *range(16, 161, 8), *range(160, 257, 8), *range(256, 513, 16)]
        drafts = [*range(1, 9), *range(10, 33, 2), *range(40, 161, 16), *range(160, 513, 16)]
    else:
        usual = [1, 2, 4, 8, 12, *range(16, 257, 8), *range(272, 512, 16), *range(512, largest + 1, 32)]
        drafts = [*range(1, 9), *range(10, 33, 2), *range(40, 65, 4), *range(72, 257, 8), *range(272, largest + 1, 16)]
    found = {size for size in (drafts if speculative else usual) if size <= largest}
    return tuple(sorted(found | {largest}))


def prefill_sizes(demand: Demand) -> tuple[int, ...]:
    """Return the token counts whose prefill is captured by default; none in the layouts that switch it off.

    Source: sglang@0.5.12:srt/server_args.py:_handle_piecewise_cuda_graph;
        sglang@0.5.23:srt/arg_groups/cuda_graph_hook.py:disable_breakable_cudagraph_if_incompatible,
        generate_prefill_cuda_graph_batch_sizes.
    """
    release = resolve(demand.job.engine_version)
    kind = release.rule("prefill_graph")
    if kind == "off" or _prefill_off(demand, kind):
        return ()
    limit = demand.chunk
    if demand.traits.mla:
        limit = min(limit, int(release.rule("prefill_graph_mla_max_tokens")))
    sizes = [
        *range(4, 33, 4),
        *range(48, 257, 16),
        *range(288, 513, 32),
        *range(576, 1025, 64),
        *range(1280, 4097, 256),
        *range(4608, limit + 1, 512),
    ]
    return tuple(size for size in sizes if size <= limit)


def _prefill_off(demand: Demand, kind: str) -> bool:
    job, flags, traits = demand.job, demand.flags, demand.traits
    asked_off = job.enforce_eager or any(
        flags.on(name) for name in ("disable_cuda_graph", "disable_prefill_cuda_graph", "disable_piecewise_cuda_graph")
    )
    if asked_off or demand.pp > 1 or traits.multimodal or job.parallel.decode_context_parallel_size > 1:
        return True
    if flags.on("enable_two_batch_overlap"):
        return True
    if kind == "piecewise":
        return (
            demand.attention_dp > 1
            or bool(flags.all_to_all)
            or job.model.architecture in _NO_PIECEWISE
            or traits.dsa
            or traits.v4
            or flags.on("enable_lora")
            or flags.on("enable_hierarchical_cache")
            or job.cpu_offload_bytes > 0
            or flags.text("disaggregation_mode", "null") != "null"
        )
    capability = job.machine.gpu.compute_capability or (9, 0)
    latent_on_blackwell = traits.mla and not traits.dsa and capability[0] == 10
    return traits.v4 or latent_on_blackwell or flags.all_to_all not in ("", "deepep", "megamoe", "flashinfer")


def runtime(name: str) -> tuple[int, int, int]:
    """Return (bytes, low, high) of a runtime amount of the catalog."""
    entry: dict[str, Any] = next(entry for entry in load(CATALOG)["runtime"] if entry["name"] == name)
    return int(entry["value"] * MiB), int(entry["low"] * MiB), int(entry["high"] * MiB)


def graph_bytes(num_layers: int, sizes: tuple[int, ...], tables: int, *, experts: bool) -> tuple[int, int, int]:
    """Return (bytes, low, high) of the decode graphs: nodes per layer and size, and the fixed index tables.

    Formula: L x n x g + largest x context x 4 for the tables.
    Symbols: L layers, n captured sizes, g memory of one layer's nodes in one graph.
    Source: engine start logs and the driver notes named in the catalog.
    Known error: g differs by the driver by more than an order of magnitude, hence the range.
    """
    if not sizes:
        return 0, 0, 0
    kind = "graph_per_expert_layer" if experts else "graph_per_dense_layer"
    value, low, high = (amount * num_layers * len(sizes) for amount in runtime(kind))
    return value + tables, low, high + 2 * tables
