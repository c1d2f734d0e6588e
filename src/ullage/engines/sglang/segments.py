"""What PyTorch's caching allocator asks of the driver for a list of long-lived tensors.

SGLang sizes its pool by the driver's free memory, so the rounding of every weight and cache buffer counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from ullage.account.parameters import Role
from ullage.account.sharding import LocalParameter, RankShare, frame_share, layer_share
from ullage.account.weights import format_of
from ullage.spec import model as spec
from ullage.units import KiB, MiB, round_up

#: Source: pytorch@2.8:c10/core/AllocatorConfig.h and c10/cuda/CUDACachingAllocator.cpp: requests up to 1 MiB share
#: segments of 2 MiB, those below 10 MiB segments of 20 MiB, larger ones are rounded up to 2 MiB.
_SMALL, _SMALL_SEGMENT = MiB, 2 * MiB
_LARGE, _LARGE_SEGMENT = 10 * MiB, 20 * MiB
_ROUND = 2 * MiB
_BLOCK = 512


def reserved_bytes(sizes: Iterable[int]) -> int:
    """Return the segments that tensors of ``sizes`` bytes, allocated in this order and kept, occupy.

    Formula: sizes rounded to 512 B; then the segment rule above; the rest of a segment serves later tensors.
    Source: pytorch@2.8:c10/cuda/CUDACachingAllocator.cpp:DeviceCachingAllocator::malloc.
    Known error: rests of rounded large segments are not reused here (they are below 2 MiB).
    """
    total = 0
    rests: dict[bool, list[int]] = {True: [], False: []}
    for size in sizes:
        need = round_up(max(size, 1), _BLOCK)
        if need >= _LARGE:
            total += round_up(need, _ROUND)
            continue
        small = need <= _SMALL
        free = rests[small]
        best = min((rest for rest in free if rest >= need), default=None)
        if best is None:
            best = _SMALL_SEGMENT if small else _LARGE_SEGMENT
            total += best
        else:
            free.remove(best)
        left = best - need
        if left >= (_BLOCK if small else _SMALL + 1):
            free.append(left)
            if len(free) > 64:
                free.remove(min(free))
    return total


def rounding_of(sizes: Iterable[int]) -> int:
    """Return what the segments of ``sizes`` hold beyond the bytes themselves."""
    kept = list(sizes)
    return reserved_bytes(kept) - sum(kept)


#: Projections that SGLang holds as one tensor, by the last part of their names.
#: Source: sglang@0.5.23:srt/layers/linear.py:QKVParallelLinear, MergedColumnParallelLinear;
#: srt/models/deepseek_v2.py:DeepseekV2AttentionMLA (fused_qkv_a_proj_with_mqa).
_FUSED = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
    "q_a_proj": "qkv_a",
    "kv_a_proj_with_mqa": "qkv_a",
}


@lru_cache(maxsize=1024)
def _layer_sizes(
    layer: spec.Layer, hidden_size: int, share: RankShare, dtype: str, rules: spec.Quantization | None
) -> tuple[int, ...]:
    return _fused_sizes(layer_share(layer, hidden_size, share), dtype, rules)


def _fused_sizes(held: Iterable[LocalParameter], dtype: str, rules: spec.Quantization | None) -> tuple[int, ...]:
    groups: dict[str, int] = {}
    for local in held:
        module, _dot, kind = local.parameter.name.rpartition(".")
        parent, _dot, last = module.rpartition(".")
        expert = local.parameter.role is Role.EXPERT
        fused = _FUSED.get(last, last)
        if expert:
            parent, fused = parent.replace(".{e}", ""), {"gate_up": "w13", "w1": "w13", "w3": "w13"}.get(fused, fused)
        name = f"{parent}.{fused}.{kind}"
        format_ = format_of(local.parameter, dtype=dtype, quantization=rules)
        groups[name] = groups.get(name, 0) + local.copies * format_.stored_bytes(local.shape)
    return tuple(groups.values())


def weight_sizes(model: spec.Model, share: RankShare, dtype: str, rules: spec.Quantization | None) -> list[int]:
    """Return the bytes of the tensors that a rank holds, fused as SGLang fuses them, in the order of loading."""
    frame = [
        LocalParameter(parameter=held.placed.parameter, component=held.component, shape=held.shape, copies=held.copies)
        for held in frame_share(model, share)
    ]
    sizes = list(_fused_sizes(frame, dtype, rules))
    for layer in model.layers[slice(*share.layers)]:
        sizes += _layer_sizes(layer, model.hidden_size, share, dtype, rules)
    return [size for size in sizes if size >= 4 * KiB]
