"""The cache: bytes of each layer, on its layer's device.

Source: ik_llama.cpp@58f08e43:src/llama.cpp:llama_kv_cache_init; llama.cpp@b7000:src/llama-kv-cache.cpp:llama_kv_cache,
    src/llama-kv-cache-iswa.cpp, src/llama-memory-recurrent.cpp.
"""

from __future__ import annotations

from ullage.account import state
from ullage.account.gguf_types import ggml_type
from ullage.engines.llamacpp.settings import Settings
from ullage.frozen import Frozen
from ullage.spec.model import Attention, CompressedAttention, LatentAttention, Layer, Mixer, Model
from ullage.units import round_up


class LayerCache(Frozen):
    """``bytes_per_cell`` x ``num_cells`` for attention; ``fixed_bytes`` for states. ``window``: a small cache."""

    bytes_per_cell: int
    num_cells: int
    fixed_bytes: int
    window: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of the layer."""
        return self.bytes_per_cell * self.num_cells + self.fixed_bytes


def cell_bytes(part: Mixer, settings: Settings) -> int:
    """Return the bytes of one token's cell in one layer.

    Formula: K x D in the key type + K x Dv in the value type. Latent attention: (r + d) in the key type, plus r in the
        value type where the values are kept apart (ik: mode 1 without flash attention; mainline until January 2026);
        expanded: N x (Dn + d) + N x Dv. ik's modes 2 and 3 without flash attention hold the latent in the value type.
    Symbols: r kv_lora_rank, d qk_rope_head_dim, Dn qk_nope_head_dim.
    """
    key, value = ggml_type(settings.cache_type_k), ggml_type(settings.cache_type_v)
    if isinstance(part, LatentAttention):
        rank, rope = part.kv_lora_rank, part.qk_rope_head_dim
        form = settings.latent_cache
        if form == "by_mode":
            form = {0: "expanded", 1: "key" if settings.flash_attention else "key_and_value"}.get(settings.mla, "key")
            if settings.mla > 1 and not settings.flash_attention:
                key = value
        if form == "expanded":
            heads = part.num_heads
            return key.tensor_bytes((heads * (part.qk_nope_head_dim + rope),)) + value.tensor_bytes(
                (heads * part.v_head_dim,)
            )
        return key.tensor_bytes((rank + rope,)) + (value.tensor_bytes((rank,)) if form == "key_and_value" else 0)
    if isinstance(part, Attention) and not part.shared_kv and not part.cross:
        return key.tensor_bytes((part.num_kv_heads * part.head_dim,)) + value.tensor_bytes(
            (part.num_kv_heads * (part.v_head_dim or part.head_dim),)
        )
    if isinstance(part, CompressedAttention):
        return key.tensor_bytes((part.head_dim,)) // max(part.compress_ratio, 1)
    return 0


def window_cells(window: int, settings: Settings) -> int:
    """Return the cells of a sliding-window cache.

    Formula: min(n_ctx, pad(window x sequences + n_ubatch, 256)), sequences = 1 unless the cache is unified.
    Source: llama.cpp@b7000:src/llama-kv-cache-iswa.cpp:llama_kv_cache_iswa (size_swa).
    """
    sequences = settings.parallel if settings.kv_unified else 1
    streams = 1 if settings.kv_unified else settings.parallel
    cells = round_up(window * sequences + settings.n_ubatch, 256)
    return min(settings.n_ctx, cells * streams)


def layer_cache(layer: Layer, settings: Settings) -> LayerCache:
    """Return what a layer caches."""
    cells, each, fixed, windowed = settings.n_ctx, 0, 0, False
    for mixer in layer.mixers:
        size = cell_bytes(mixer, settings)
        if size == 0:
            fixed += _state_bytes(mixer) * settings.parallel
            continue
        each += size
        window = getattr(mixer, "window", None) or getattr(mixer, "chunk", None)
        if window and settings.window_cache:
            cells, windowed = window_cells(window, settings), True
    return LayerCache(bytes_per_cell=each, num_cells=cells, fixed_bytes=fixed, window=windowed)


def _state_bytes(mixer: Mixer) -> int:
    """Return state and convolution columns of one sequence, all in F32 as llama.cpp keeps them."""
    return sum(4 * tensor.num_elements for tensor in state.state_tensors(mixer))


def caches(model: Model, settings: Settings) -> tuple[LayerCache, ...]:
    """Return every layer's cache; equal layers are computed once."""
    seen: dict[int, LayerCache] = {}
    found = []
    for layer in model.layers:
        if id(layer) not in seen:
            seen[id(layer)] = layer_cache(layer, settings)
        found.append(seen[id(layer)])
    return tuple(found)
