"""The block pool: blocks, tokens, concurrency, and whether one request fits."""

from __future__ import annotations

from collections.abc import Sequence

from ullage.engines.vllm.defaults import Setup
from ullage.engines.vllm.groups import Grouping
from ullage.engines.vllm.layout import Stage
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.units import GiB


class Pool(Frozen):
    """What a given amount of memory makes.

    Attributes:
        num_blocks: of the smallest stage, which all stages use.
        tokens, concurrency: as the log prints them.
        max_context: the longest single request.
        reason: why the engine refuses to start, empty if it does not.
    """

    num_blocks: int
    tokens: int
    concurrency: float
    max_context: int
    max_model_len: int
    reason: str


def block_bytes(stages: Sequence[Stage], grouping: Grouping) -> list[int]:
    """Return the bytes of a block on each stage."""
    return [grouping.block_bytes(*stage.share.layers) for stage in stages]


def longest(grouping: Grouping, blocks: int, ceiling: int) -> int:
    """Return the longest request that ``blocks`` hold, up to ``ceiling``; 0 if not even one token.

    Source: vllm@0.33.0:vllm/v1/core/kv_cache_planning.py:_estimate_max_model_len_from_groups (binary search).
    """
    if grouping.request_blocks(1) > blocks:
        return 0
    low, high = 1, max(1, ceiling)
    while low < high:
        middle = (low + high + 1) // 2
        if grouping.request_blocks(middle) <= blocks:
            low = middle
        else:
            high = middle - 1
    return low


def pool(setup: Setup, stages: Sequence[Stage], grouping: Grouping, available: Sequence[int]) -> Pool:
    """Turn each stage's available bytes into a pool.

    Formula: blocks = min over stages of available // bytes of a block; concurrency = blocks / blocks of a request of
        max_model_len; tokens = concurrency x max_model_len from 0.21 on, blocks // groups x block before.
    Source: vllm@0.33.0:vllm/v1/core/kv_cache_planning.py:get_kv_cache_configs, kv_cache_utils.py:get_kv_cache_capacity;
        vllm@0.11.0:vllm/v1/core/kv_cache_utils.py:get_kv_cache_config_from_groups; vllm@0.6.4:vllm/worker/worker.py.
    """
    length = setup.job.max_model_len or 1
    sizes = block_bytes(stages, grouping)
    if not any(sizes):
        return Pool(num_blocks=1, tokens=0, concurrency=0.0, max_context=length, max_model_len=length, reason="")
    override = setup.flag("num_gpu_blocks_override")
    counts = [max(0, memory) // size for memory, size in zip(available, sizes, strict=True) if size]
    blocks = int(override) if override.isdigit() else min(counts)
    usable = max(0, blocks - int(setup.version.setting("null_block")))
    context = longest(grouping, usable, max(length, setup.job.model.max_position_embeddings, 1 << 24))
    if setup.auto_length:
        length = min(length, context)
    held = usable
    if setup.version.setting("check_all_layers"):
        held = max(0, min(available)) // grouping.block_bytes(0, grouping.num_layers)
    reason = _refusal(setup, grouping, min(available), blocks, held, length)
    needed = grouping.log_blocks(max(1, length), by_first_page=setup.version.setting("log_blocks") == "by_first_page")
    concurrency = blocks / needed if needed else 0.0
    tokens = blocks // max(1, len(grouping.groups)) * grouping.block_tokens * grouping.dcp
    if setup.version.engine == "V0" or not setup.version.at_least("0.9.0"):
        concurrency = blocks * grouping.block_tokens / max(1, length)
    if setup.version.setting("tokens_rule") == "concurrency":
        tokens = int(concurrency * length)
    return Pool(
        num_blocks=blocks,
        tokens=tokens,
        concurrency=concurrency,
        max_context=context,
        max_model_len=length,
        reason=reason,
    )


def _refusal(setup: Setup, grouping: Grouping, available: int, blocks: int, usable: int, length: int) -> str:
    """Return the engine's refusal in its words, or nothing.

    Source: vllm@0.33.0:vllm/v1/core/kv_cache_planning.py:_check_enough_kv_cache_memory;
        vllm@0.6.4:vllm/worker/worker.py:raise_if_cache_size_invalid.
    """
    if available <= 0 or blocks <= 0:
        return _("No available memory for the cache blocks. Try increasing `gpu_memory_utilization`.")
    needed = grouping.request_blocks(max(1, length))
    if setup.version.engine == "V0":
        held = blocks * grouping.block_tokens
        if length <= held:
            return ""
        return _(
            "The model's max seq len ({length}) is larger than the maximum number of tokens that can be stored in "
            "KV cache ({held})."
        ).format(length=length, held=held)
    if length >= 1 and needed <= usable:
        return ""
    each = grouping.block_bytes(0, grouping.num_layers)
    return _(
        "To serve at least one request with the model's max seq len ({length}), {needed:.2f} GiB KV cache is needed, "
        "which is larger than the available KV cache memory ({available:.2f} GiB). The estimated maximum model length "
        "is {estimate}."
    ).format(
        length=length, needed=needed * each / GiB, available=available / GiB, estimate=longest(grouping, usable, length)
    )
