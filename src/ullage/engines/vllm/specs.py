"""The cache spec of every layer: what one block of it holds, and how many blocks a request takes.

A spec mirrors vLLM's ``KVCacheSpec``: full attention (latents and indexer keys too), sliding window, chunked local
attention, and state layers, whose page does not depend on the block.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from ullage.account import kv_cache
from ullage.account.sharding import units_per_rank
from ullage.account.state import state_tensors
from ullage.engines.vllm.defaults import Setup, has_state
from ullage.engines.vllm.layout import loads_mtp
from ullage.frozen import Frozen
from ullage.spec import model as spec
from ullage.units import cdiv, dtype_bytes, round_up

Kind = Literal["full", "latent", "window", "chunk", "state"]


class CacheSpec(Frozen):
    """One layer's cache.

    Attributes:
        kind: what grows how; specs of one kind, block and page can share a group.
        block_tokens: tokens of a block; page_bytes: bytes of a block of this layer.
        window: tokens kept, for windows and chunks.
        states: pages of a request, for state layers.
        v4: part of V4's packed layout.
    """

    kind: Kind
    block_tokens: int
    page_bytes: int
    window: int = 0
    states: int = 0
    v4: bool = False

    def pages(self, length: int, *, in_flight: int, dcp: int = 1) -> int:
        """Return the pages that a request of ``length`` tokens needs at most.

        Formula: full: ceil(ceil(length / dcp) / block); window: ceil(min(window - 1 + in flight, length) / block) + 1;
            chunk: ceil(min(chunk + in flight, length) / block); state: fixed.
        Source: vllm@0.33.0:vllm/v1/kv_cache_interface.py:FullAttentionSpec, SlidingWindowSpec,
            ChunkedLocalAttentionSpec, MambaSpec: max_memory_usage_bytes.
        """
        if self.kind == "state":
            return self.states
        if self.kind == "window":
            return cdiv(min(self.window - 1 + in_flight, length), self.block_tokens) + 1
        if self.kind == "chunk":
            return cdiv(min(self.window + in_flight, length), self.block_tokens)
        return cdiv(cdiv(length, dcp), self.block_tokens)


def in_flight_tokens(setup: Setup) -> int:
    """Return the tokens that may be scheduled and not settled: batches in flight x tokens of a batch.

    Source: vllm@0.33.0:vllm/config/vllm.py:max_in_flight_tokens; one batch up to 0.25.
    """
    batches = int(setup.version.setting("in_flight_batches"))
    if batches > 1:
        asynchronous = setup.truth("async_scheduling", True)
        batches = max(setup.job.parallel.pipeline_parallel_size, 2 if asynchronous else 1)
    return batches * setup.tokens


def _element(setup: Setup) -> str:
    return setup.job.kv_cache_dtype or "bfloat16"


def _attention_page(setup: Setup, part: spec.Attention, block: int) -> int:
    """Bytes of a block of one attention layer on one rank; quantised formats carry their scales.

    Formula: block x heads x (D + Dv) x e; nvfp4: 1/2 + 1/16 byte a value; per-token-head: 4 B more for each head.
    Source: vllm@0.33.0:vllm/v1/kv_cache_interface.py:AttentionSpec; vllm/utils/torch_utils.py:nvfp4_kv_cache_full_dim.
    """
    dtype, tp = _element(setup), setup.job.parallel.tensor_parallel_size
    heads = units_per_rank(part.num_kv_heads, tp, where=part.prefix)
    width = part.head_dim + (part.v_head_dim or part.head_dim)
    if dtype.startswith("nvfp4"):
        return block * heads * (width // 2 + width // 16)
    if dtype.endswith("_per_token_head"):
        return block * heads * (width // (2 if dtype.startswith("int4") else 1) + 8)
    return int(block * kv_cache.attention_row(part, dtype, attention_tp=tp).row_bytes)


def _state_page(setup: Setup, part: spec.Mixer) -> int:
    dtype = setup.flag("mamba_cache_dtype") or setup.job.weights_dtype or "bfloat16"
    recurrent = setup.flag("mamba_ssm_cache_dtype") or dtype
    drafts = setup.job.num_speculative_tokens or 0
    total = 0
    for tensor in state_tensors(part, setup.job.parallel.tensor_parallel_size, num_speculative_tokens=drafts):
        asked = recurrent if tensor.name == "recurrent" else dtype
        name = tensor.dtype or ("bfloat16" if asked == "auto" else asked)
        total += int(tensor.num_elements * dtype_bytes(name))
    return total


def _checkpoints(setup: Setup, part: spec.Mixer) -> int:
    """Return the pages in which a long prefill leaves its state at a block's end, without being split there.

    Source: vllm@0.32.0:vllm/model_executor/layers/mamba/mamba_mixer2.py:get_kv_cache_spec; vllm@0.33.0:
        vllm/model_executor/layers/mamba/gdn/qwen_gdn_linear_attn.py:get_kv_cache_spec (FlashInfer's prefill kernel:
        Hopper, and Blackwell with keys of 128).
    """
    if isinstance(part, spec.Mamba2):
        return int(setup.version.at_least("0.32.0"))
    if isinstance(part, spec.GatedDeltaNet) and setup.version.at_least("0.33.0"):
        major = (setup.job.machine.gpu.compute_capability or (0, 0))[0]
        return int(major == 9 or (major in (10, 12) and part.k_head_dim == 128))
    return 0


def _states(setup: Setup, part: spec.Mixer) -> int:
    """Return the state pages of a request: one and one per draft token; where prefixes are cached one more.

    Source: vllm@0.29.0:vllm/v1/kv_cache_interface.py:MambaSpec.max_memory_usage_bytes (``align`` where prefixes are
        cached: 2, drafts, checkpoints of a prefill; else 1 and drafts). Up to 0.28 some models (Falcon-H1, Granite 4,
        Jamba, Nemotron-H, Zamba 2) cached a state for every block instead, which is not counted.
    """
    held = 2 + _checkpoints(setup, part) if setup.prefix_caching else 1
    return held + (setup.job.num_speculative_tokens or 0)


def _expanded(part: spec.LatentAttention) -> spec.Attention:
    """Return the multi-head attention that versions before MLA support cached, values padded to the keys' size.

    Source: vllm@0.5.4:vllm/model_executor/models/deepseek_v2.py:DeepseekV2Attention (head_dim 256 for both).
    """
    size = round_up(part.qk_nope_head_dim + part.qk_rope_head_dim, 256)
    return spec.Attention(num_heads=part.num_heads, num_kv_heads=part.num_heads, head_dim=size)


def _latent(setup: Setup, part: spec.LatentAttention, block: int) -> list[CacheSpec]:
    if not setup.version.setting("mla"):
        page = _attention_page(setup, _expanded(part), block)
        return [CacheSpec(kind="full", block_tokens=block, page_bytes=page)]
    page = int(block * kv_cache.latent_row(part, _element(setup)).row_bytes)
    found = [CacheSpec(kind="latent", block_tokens=block, page_bytes=page)]
    if part.indexer is not None:
        row = kv_cache.indexer_row(part.indexer)
        found.append(CacheSpec(kind="latent", block_tokens=block, page_bytes=int(block * row.row_bytes)))
    return found


def _v4_page(rows: int, row_bytes: int) -> int:
    """A V4 page is rounded up to 576 bytes.

    Source: vllm@0.33.0:vllm/models/deepseek_v4/attention.py:get_kv_cache_spec.
    """
    return round_up(rows * row_bytes, 576)


def _v4_state(ratio: int, width: int) -> CacheSpec:
    """Return the ring of a compressor: float32 keys and scores of the open group (two groups for ratio 4).

    Formula: block of 4 rows x 2 x 2D x 4 B for ratio 4, of 8 rows x 2D x 4 B for ratio 128; window 8 or 128.
    Source: vllm@0.33.0:vllm/models/deepseek_v4/compressor.py:CompressorStateCache.
    """
    overlap = 2 if ratio == 4 else 1
    block = 4 if ratio == 4 else 8
    page = round_up(block * overlap * 2 * width * 4, 576)
    return CacheSpec(kind="window", block_tokens=block, page_bytes=page, window=overlap * ratio, v4=True)


def _compressed(setup: Setup, part: spec.CompressedAttention, block: int) -> list[CacheSpec]:
    """Return V4's caches of one layer: raw window, compressed entries, indexer keys, compressor rings.

    Source: vllm@0.33.0:vllm/models/deepseek_v4/attention.py, compressor.py;
        vllm/v1/attention/backends/mla/sparse_swa.py:DeepseekV4SWACache (blocks of 64).
    """
    row = int(kv_cache.compressed_entry(part, _element(setup)).row_bytes)
    found = [CacheSpec(kind="window", block_tokens=64, page_bytes=_v4_page(64, row), window=part.window, v4=True)]
    ratio = part.compress_ratio
    if ratio:
        rows = max(1, block // ratio)
        found.append(CacheSpec(kind="latent", block_tokens=block, page_bytes=_v4_page(rows, row), v4=True))
        found.append(_v4_state(ratio, part.head_dim))
        if part.indexer is not None:
            key = int(kv_cache.indexer_row(part.indexer).row_bytes)
            found.append(CacheSpec(kind="latent", block_tokens=block, page_bytes=_v4_page(rows, key), v4=True))
            found.append(_v4_state(ratio, part.indexer.head_dim))
    return found


def _aligned_block(setup: Setup) -> int:
    """Return the block size of a model with state layers: raised until an attention page holds a state.

    Formula: 16 x ceil(state page / (16 x attention bytes per token)), at least the block size.
    Source: vllm@0.33.0:vllm/platforms/interface.py:_align_hybrid_block_size;
        vllm@0.11.0:vllm/model_executor/models/config.py:HybridAttentionMambaModelConfig.
    """
    block = setup.job.block_size or 16
    if not has_state(setup.job.model):
        return block
    per_token, state = 0, 0
    for layer in setup.job.model.layers:
        for mixer in layer.mixers:
            if isinstance(mixer, spec.Attention):
                per_token = max(per_token, _attention_page(setup, mixer, 1))
            elif isinstance(mixer, spec.LatentAttention):
                per_token = max(per_token, _latent(setup, mixer, 1)[0].page_bytes)
            else:
                state = max(state, _state_page(setup, mixer))
    kernel = (
        64 if any(isinstance(m, spec.LatentAttention) for layer in setup.job.model.layers for m in layer.mixers) else 16
    )
    return max(block, kernel * cdiv(state, kernel * per_token)) if per_token else block


def _mixer_specs(setup: Setup, mixer: spec.Mixer, block: int) -> list[CacheSpec]:
    if isinstance(mixer, spec.Attention):
        if mixer.shared_kv:
            return []
        page = _attention_page(setup, mixer, block)
        if mixer.window or mixer.chunk:
            kind: Kind = "window" if mixer.window else "chunk"
            return [CacheSpec(kind=kind, block_tokens=block, page_bytes=page, window=mixer.window or mixer.chunk or 0)]
        index = int(block * kv_cache.index_key_row(mixer).row_bytes)
        pages = [page, index] if index else [page]
        return [CacheSpec(kind="full", block_tokens=block, page_bytes=size) for size in pages]
    if isinstance(mixer, spec.LatentAttention):
        return _latent(setup, mixer, block)
    if isinstance(mixer, spec.CompressedAttention):
        return _compressed(setup, mixer, block)
    return [
        CacheSpec(kind="state", block_tokens=block, page_bytes=_state_page(setup, mixer), states=_states(setup, mixer))
    ]


def _padded_states(specs: list[CacheSpec]) -> list[CacheSpec]:
    """Pad state pages to the attention page: all groups must have equal pages."""
    attention = max((one.page_bytes for one in specs if one.kind != "state"), default=0)
    return [replace(one, page_bytes=max(one.page_bytes, attention)) if one.kind == "state" else one for one in specs]


def layer_specs(setup: Setup) -> tuple[tuple[int, CacheSpec], ...]:
    """Return (layer, spec) for every cache of the model, drafts at the end.

    Raises:
        LayoutError: KV heads or state heads that do not divide over the ranks.
    """
    model = setup.job.model
    block = _aligned_block(setup)
    known: dict[int, list[CacheSpec]] = {}
    found: list[tuple[int, CacheSpec]] = []
    layers = [*enumerate(model.layers)]
    if loads_mtp(setup):
        layers += [(len(model.layers) + index, module.layer) for index, module in enumerate(model.mtp)]
    if setup.job.draft_model is not None:
        layers += [(len(model.layers) + index, layer) for index, layer in enumerate(setup.job.draft_model.layers)]
    for index, layer in layers:
        for mixer in layer.mixers:
            if id(mixer) not in known:
                known[id(mixer)] = _mixer_specs(setup, mixer, block)
            found += [(index, one) for one in known[id(mixer)]]
    padded = _padded_states([one for _index, one in found])
    return tuple((index, one) for (index, _one), one in zip(found, padded, strict=True))


def lcm_page(specs: list[CacheSpec]) -> int:
    """Return the largest page, to which the others are scaled or padded."""
    return max((one.page_bytes for one in specs), default=0) or math.prod([1])
