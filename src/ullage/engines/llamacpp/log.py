"""What the engine prints at its start, in its words."""

from __future__ import annotations

from ullage.engines.llamacpp.kv import LayerCache
from ullage.engines.llamacpp.schedule import HOST
from ullage.engines.llamacpp.settings import Settings
from ullage.engines.serving import Amount
from ullage.units import MiB

Row = tuple[int, Amount, Amount, Amount]


def lines(settings: Settings, rows: list[Row], layers: tuple[LayerCache, ...]) -> tuple[str, ...]:
    """Return the buffer lines of the start-up log.

    Source: ik_llama.cpp@58f08e43:src/llama.cpp (llm_load_tensors, llama_kv_cache_init, llama_new_context_with_model);
        llama.cpp@b7000:src/llama-model.cpp, llama-kv-cache.cpp, llama-context.cpp.
    """
    old = settings.ik or settings.day < "2025-03"
    load, cache, context = (
        ("llm_load_tensors", "llama_kv_cache_init", "llama_new_context_with_model")
        if old
        else ("load_tensors", "llama_kv_cache", "llama_context")
    )
    what = "buffer size" if old else "model buffer size"
    found = []
    for number, weights, _cache, _compute in rows:
        found.append(f"{load}: {_name(number):>10} {what} = {weights.value / MiB:8.2f} MiB")
    for number, _weights, kv, _compute in rows:
        if kv.value:
            found.append(f"{cache}: {_name(number):>10} KV buffer size = {kv.value / MiB:8.2f} MiB")
    self_size = sum(layer.num_bytes for layer in layers) / MiB
    if old:
        found.append(f"{context}: KV self size  = {self_size:7.2f} MiB")
    else:
        cells = f"{settings.n_ctx:6d} cells, {len(layers):3d} layers, {settings.parallel:2d} seqs"
        found.append(f"{cache}: size = {self_size:7.2f} MiB ({cells})")
    for number, _weights, _kv, compute in rows:
        found.append(f"{context}: {_name(number):>10} compute buffer size = {compute.value / MiB:8.2f} MiB")
    return tuple(found)


def _name(number: int) -> str:
    return "CPU" if number == HOST else f"CUDA{number}"
