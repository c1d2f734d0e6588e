"""Which settings PyTorch knows, since when, and what they take.

Source: the headers of the released packages, c10/cuda/CUDAAllocatorConfig.h and c10/core/AllocatorConfig.h, of 2.2.2,
2.3.1, 2.4.1, 2.5.1, 2.6.0, 2.7.1, 2.8.0, 2.9.1, 2.10.0, 2.11.0, 2.12.0, 2.13.0 and 2.14.0; ranges: what
torch 2.13.0's ``torch._C._accelerator_setAllocatorSettings`` takes and refuses. Keys that 2.2.2 has are given from 2.0
or, where the release notes say so, from a later version.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Value kinds.
MEGABYTES, BOOLEAN, FRACTION, DIVISIONS, COUNT, WORD, RESERVE = (
    "megabytes",
    "boolean",
    "fraction",
    "divisions",
    "count",
    "word",
    "reserve",
)
OLDEST, NEWEST = (2, 0), (2, 15)
DEFAULT_VERSION = (2, 13)


@dataclass(frozen=True, kw_only=True)
class Key:
    """One setting.

    Attributes:
        kind: what its value is.
        since: first version that takes it.
        until: last version that takes it, ``None`` while it lives.
        simulated: whether it changes what the simulator does.
        words: the values of a ``word``.
    """

    kind: str
    since: tuple[int, int] = (2, 0)
    until: tuple[int, int] | None = None
    simulated: bool = False
    words: tuple[str, ...] = ()


KEYS: dict[str, Key] = {
    "max_split_size_mb": Key(kind=MEGABYTES, simulated=True),
    "roundup_power2_divisions": Key(kind=DIVISIONS, simulated=True),
    "garbage_collection_threshold": Key(kind=FRACTION, simulated=True),
    "backend": Key(kind=WORD, words=("native", "cudaMallocAsync")),
    "roundup_bypass_threshold_mb": Key(kind=MEGABYTES, until=(2, 0)),
    "expandable_segments": Key(kind=BOOLEAN, since=(2, 1), simulated=True),
    "release_lock_on_cudamalloc": Key(kind=BOOLEAN, since=(2, 2)),
    "pinned_use_cuda_host_register": Key(kind=BOOLEAN, since=(2, 2)),
    "pinned_num_register_threads": Key(kind=COUNT, since=(2, 2)),
    "max_non_split_rounding_mb": Key(kind=MEGABYTES, since=(2, 6), simulated=True),
    "pinned_use_background_threads": Key(kind=BOOLEAN, since=(2, 6)),
    "release_lock_on_hipmalloc": Key(kind=BOOLEAN, since=(2, 2)),
    "pinned_use_hip_host_register": Key(kind=BOOLEAN, since=(2, 2)),
    "graph_capture_record_stream_reuse": Key(kind=BOOLEAN, since=(2, 9)),
    "per_process_memory_fraction": Key(kind=FRACTION, since=(2, 10), simulated=True),
    "pinned_reserve_segment_size_mb": Key(kind=MEGABYTES, since=(2, 10)),
    "large_segment_size_mb": Key(kind=MEGABYTES, since=(2, 11), simulated=True),
    "throw_on_cudamalloc_oom": Key(kind=BOOLEAN, since=(2, 12), simulated=True),
    "pinned_free_catch_all": Key(kind=BOOLEAN, since=(2, 12)),
    "pinned_max_round_threshold_mb": Key(kind=MEGABYTES, since=(2, 13)),
    "pinned_max_cached_size_mb": Key(kind=MEGABYTES, since=(2, 13)),
    "expandable_segments_reserve": Key(kind=RESERVE, since=(2, 15)),
    "expandable_segments_reserve_by_class": Key(kind=RESERVE, since=(2, 15)),
}
#: Names that people write, and the setting that they most likely mean.
MEANT = {
    "block_size": "max_split_size_mb",
    "size": "max_split_size_mb",
    "max_split_size": "max_split_size_mb",
    "max_block_size": "max_split_size_mb",
    "split_size": "max_split_size_mb",
    "segment_size": "large_segment_size_mb",
    "large_segment_size": "large_segment_size_mb",
    "gc_threshold": "garbage_collection_threshold",
    "expandable_segment": "expandable_segments",
    "memory_fraction": "per_process_memory_fraction",
}
