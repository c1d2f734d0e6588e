"""What a recording says by itself, without any simulation: the settings in force, and the peaks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ullage.allocator.constants import NUM_ROUNDUP_INTERVALS, UNLIMITED_BYTES
from ullage.allocator.events import (
    ALLOC,
    FREE_REQUESTED,
    OOM,
    SEGMENT_ALLOC,
    SEGMENT_FREE,
    SEGMENT_MAP,
    SEGMENT_UNMAP,
    Recording,
    SegmentLayout,
)
from ullage.allocator.rounding import round_size
from ullage.allocator.settings import AllocatorSettings, parse_settings
from ullage.errors import InputError
from ullage.i18n import _

#: torch_npu adds this many bytes to every request before it rounds.
#: Source: Ascend/pytorch@2.8:torch_npu/csrc/core/npu/NPUCachingAllocator.cpp:round_size.
NPU_PADDING_BYTES = 32
#: Where torch_npu puts blocks of 2 MiB and more in expandable segments (kAlignRoundLarge; source as above, malloc).
NPU_ALIGNMENT_BYTES = 16_384


@dataclass(kw_only=True)
class RecordedPeaks:
    """Peaks counted from the events alone; allocated bytes are rounded requests, so unsplit rests may be missing."""

    peak_reserved_bytes: int
    peak_allocated_bytes: int
    final_reserved_bytes: int
    num_segments_allocated: int = 0
    num_maps: int = 0


def recorded_peaks(final: Sequence[SegmentLayout], recording: Recording, settings: AllocatorSettings) -> RecordedPeaks:
    """Walk back from the final state."""
    reserved = sum(segment.size_bytes for segment in final)
    known = {block.address: block.size_bytes for one in final for block in one.blocks}
    allocated = sum(block.size_bytes for one in final for block in one.blocks if not block.awaiting)
    peaks = RecordedPeaks(peak_reserved_bytes=reserved, peak_allocated_bytes=allocated, final_reserved_bytes=reserved)
    for at in range(len(recording) - 1, -1, -1):
        kind, size, address = recording.kinds[at], recording.sizes[at], recording.addresses[at]
        if kind == ALLOC:
            allocated -= known.pop(address, 0) or _rounded(size, settings)
        elif kind == FREE_REQUESTED:
            known.setdefault(address, _rounded(size, settings))
            allocated += known[address]
            peaks.peak_allocated_bytes = max(peaks.peak_allocated_bytes, allocated)
        elif kind in (SEGMENT_ALLOC, SEGMENT_MAP):
            reserved -= size
            peaks.num_segments_allocated += kind == SEGMENT_ALLOC
            peaks.num_maps += kind == SEGMENT_MAP
        elif kind in (SEGMENT_FREE, SEGMENT_UNMAP):
            reserved += size
            peaks.peak_reserved_bytes = max(peaks.peak_reserved_bytes, reserved)
    return peaks


def recorded_capacity(final: Sequence[SegmentLayout], recording: Recording) -> int:
    """Return what the driver had for the allocator when it refused: what was reserved, and what it said was left.

    Formula: max over the refused requests of reserved + device_free.
    Source: pytorch@2.11:c10/cuda/CUDACachingAllocator.cpp:malloc, the trace entry OOM.
    Known error: what is left may be in pieces that no segment fits.
    """
    reserved, found = sum(segment.size_bytes for segment in final), 0
    for at in range(len(recording) - 1, -1, -1):
        kind = recording.kinds[at]
        if kind == OOM:
            found = max(found, reserved + recording.addresses[at])
        elif kind in (SEGMENT_ALLOC, SEGMENT_MAP):
            reserved -= recording.sizes[at]
        elif kind in (SEGMENT_FREE, SEGMENT_UNMAP):
            reserved += recording.sizes[at]
    return found


def _rounded(size: int, settings: AllocatorSettings) -> int:
    return round_size(size + settings.padding_bytes, settings.divisions)


def recorded_settings(
    values: Mapping[str, Any], segments: Sequence[SegmentLayout], of_all_devices: Sequence[SegmentLayout] = ()
) -> tuple[AllocatorSettings, list[str]]:
    """Return the settings under which a snapshot was recorded, and what had to be assumed.

    Source: pytorch@2.14:torch/csrc/cuda/memory_snapshot.cpp (keys of allocator_settings). large_segment_size and
    max_non_split_rounding are not among them; they are taken from the recorded text.
    """
    notes = []
    settings = AllocatorSettings()
    text = values.get("PYTORCH_CUDA_ALLOC_CONF")
    if not values:
        notes.append(
            _("the snapshot does not say under which allocator settings it was taken; the defaults are assumed")
        )
    elif isinstance(text, str) and text:
        try:
            settings = parse_settings(text)
        except InputError as error:
            notes.append(
                _("the recorded settings {text!r} are not understood: {why}").format(text=text[:80], why=error.what)
            )
    split = values.get("max_split_size")
    if type(split) is int:
        settings = replace(settings, max_split_size_bytes=split if 0 < split < UNLIMITED_BYTES else UNLIMITED_BYTES)
    if isinstance(values.get("expandable_segments"), bool):
        settings = replace(settings, expandable_segments=values["expandable_segments"])
    table = values.get("roundup_power2_divisions")
    if isinstance(table, dict):
        divisions = tuple(table.get(str(2**power), 0) for power in range(NUM_ROUNDUP_INTERVALS))
        if all(type(one) is int and 0 <= one < 2**32 for one in divisions):
            settings = replace(settings, divisions=divisions if any(one > 1 for one in divisions) else ())
    if any(segment.expandable for segment in segments) and not settings.expandable_segments:
        notes.append(_("the snapshot has expandable segments: expandable_segments:True is assumed"))
        settings = replace(settings, expandable_segments=True, text=settings.text or "expandable_segments:True")
    return _padded(settings, of_all_devices or segments, notes)


def _padded(
    settings: AllocatorSettings, segments: Sequence[SegmentLayout], notes: list[str]
) -> tuple[AllocatorSettings, list[str]]:
    """Recognise allocators that pad requests, by the small blocks in use: none is as CUDA would have cut it."""
    pairs = [
        (block.requested_bytes, block.size_bytes) for segment in segments if segment.small for block in segment.blocks
    ]
    padded = all(size == round_size(asked + NPU_PADDING_BYTES, settings.divisions) for asked, size in pairs)
    differs = any(size != round_size(asked, settings.divisions) for asked, size in pairs)
    if pairs and padded and differs:
        notes.append(
            _("every small block is as the Ascend allocator cuts it: {count} bytes are added to each request").format(
                count=NPU_PADDING_BYTES
            )
        )
        settings = replace(settings, padding_bytes=NPU_PADDING_BYTES, alignment_bytes=NPU_ALIGNMENT_BYTES)
    return settings, notes
