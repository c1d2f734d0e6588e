"""Write a memory snapshot as ``torch.cuda.memory._dump_snapshot`` does: a pickle of protocol 4, event by event.

Source: pytorch@2.14:torch/cuda/memory.py:_snapshot and torch/csrc/cuda/Module.cpp:THCPModule_memorySnapshot (keys and
their order); pytorch issue 183842: PyTorch's web viewer reads protocol 4 and not 5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from ullage.allocator.constants import NUM_ROUNDUP_INTERVALS, UNLIMITED_BYTES
from ullage.allocator.events import ACTIONS, OOM, BlockLayout, SegmentLayout
from ullage.allocator.export import Recorded
from ullage.allocator.metrics import free_gaps
from ullage.allocator.settings import AllocatorSettings
from ullage.allocator.stacks import NO_STACK, Stacks
from ullage.files import replacing

#: A frame of the pickle ends when it holds this many bytes (cpython@3.14:Lib/pickle.py:_FRAME_SIZE_TARGET), a list is
#: filled in batches of so many items (_BATCHSIZE).
FRAME_BYTES, BATCH_ITEMS = 65_536, 1000

Value = bool | int | float | str | tuple[int, int] | Callable[[], None]


def write_snapshot(
    path: Path,
    devices: Mapping[int, Recorded],
    *,
    share_stacks: bool = True,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a snapshot; a temporary file takes the place of ``path`` when it is complete.

    Args:
        path: the file.
        devices: device -> what it recorded.
        share_stacks: write each distinct stack once; PyTorch writes a list of its own for each allocation.
        progress: called with the number of events written.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        _Writer(file, share_stacks=share_stacks, progress=progress).snapshot(devices)


class _Writer:
    """Opcodes of protocol 4; ``_count`` numbers what is memoized, as the unpickler does."""

    def __init__(self, file: BinaryIO, *, share_stacks: bool, progress: Callable[[int], None] | None) -> None:
        self._file, self._share, self._progress = file, share_stacks, progress
        self._buffer = bytearray()
        self._count = self._num_events = 0
        self._texts: dict[str, bytes] = {}  # what reads it from the memo
        self._frames: dict[tuple[int, int], bytes] = {}  # (table, number) -> the same
        self._stacks: dict[tuple[int, int], bytes] = {}
        self._integers: dict[int, bytes] = {}

    def snapshot(self, devices: Mapping[int, Recorded]) -> None:
        """Write all of it."""
        file = self._file
        file.write(b"\x80\x04")
        first = next(iter(devices.values()))
        self._dict(
            {
                "segments": lambda: self._segments(devices),
                "device_traces": lambda: self._traces(devices),
                "allocator_settings": lambda: self._settings(first.outcome.settings),
                "external_annotations": lambda: self._list([]),
            }
        )
        self._buffer += b"."
        self._flush()

    # -- values -----------------------------------------------------------------------------------------------------

    def _memoize(self) -> bytes:
        """Number what was just written; return the opcode that reads it again."""
        self._buffer += b"\x94"
        number = self._count
        self._count += 1
        return b"h" + bytes((number,)) if number < 256 else b"j" + number.to_bytes(4, "little")

    def _integer(self, value: int) -> bytes:
        if 0 <= value < 256:
            return b"K" + bytes((value,))
        if 0 <= value < 65_536:
            return b"M" + value.to_bytes(2, "little")
        if -(2**31) <= value < 2**31:
            return b"J" + value.to_bytes(4, "little", signed=True)
        length = value.bit_length() // 8 + 1
        return b"\x8a" + bytes((length,)) + value.to_bytes(length, "little", signed=True)

    def _text(self, text: str) -> None:
        known = self._texts.get(text)
        if known is not None:
            self._buffer += known
            return
        raw = text.encode("utf-8", "surrogatepass")
        short = len(raw) < 256
        self._buffer += (b"\x8c" + bytes((len(raw),)) if short else b"X" + len(raw).to_bytes(4, "little")) + raw
        self._texts[text] = self._memoize()

    def _value(self, value: Value) -> None:
        if callable(value):
            value()
        elif isinstance(value, bool):
            self._buffer += b"\x88" if value else b"\x89"
        elif isinstance(value, int):
            self._buffer += self._integer(value)
        elif isinstance(value, float):
            import struct

            self._buffer += b"G" + struct.pack(">d", value)
        elif isinstance(value, tuple):
            self._buffer += self._integer(value[0]) + self._integer(value[1]) + b"\x86"
            self._memoize()
        else:
            self._text(value)

    def _dict(self, values: Mapping[str, Value]) -> None:
        self._buffer += b"}"
        self._memoize()
        self._buffer += b"("
        for key, value in values.items():
            self._text(key)
            self._value(value)
        self._buffer += b"u"

    def _list(self, items: list[Callable[[], None]]) -> None:
        self._buffer += b"]"
        self._memoize()
        for start in range(0, len(items), BATCH_ITEMS):
            self._buffer += b"("
            for item in items[start : start + BATCH_ITEMS]:
                item()
                self._flush(FRAME_BYTES)
            self._buffer += b"e"

    def _flush(self, least: int = 1) -> None:
        if len(self._buffer) >= least:
            self._file.write(b"\x95" + len(self._buffer).to_bytes(8, "little"))
            self._file.write(self._buffer)
            self._buffer.clear()

    # -- stacks -----------------------------------------------------------------------------------------------------

    def _stack(self, table: Stacks, number: int) -> None:
        key = (id(table), number)
        known = self._stacks.get(key) if self._share else None
        if known is not None:
            self._buffer += known
            return
        self._buffer += b"]"
        read = self._memoize()
        row = table.row(number)
        if row:
            self._buffer += b"("
            for at in row:
                self._frame(table, at)
            self._buffer += b"e"
        if self._share:
            self._stacks[key] = read

    def _frame(self, table: Stacks, number: int) -> None:
        key = (id(table), number)
        known = self._frames.get(key)
        if known is not None:
            self._buffer += known
            return
        name, file, line = table.frames[number]
        self._buffer += b"}"
        self._frames[key] = self._memoize()
        self._buffer += b"("
        for word, value in (("name", name), ("filename", file), ("line", line)):
            self._text(word)
            self._value(value)
        self._buffer += b"u"

    # -- parts ------------------------------------------------------------------------------------------------------

    def _segments(self, devices: Mapping[int, Recorded]) -> None:
        self._list(
            [
                lambda device=device, recorded=recorded, segment=segment: self._segment(device, recorded, segment)  # type: ignore[misc]
                for device, recorded in devices.items()
                for segment in recorded.segments
            ]
        )

    def _segment(self, device: int, recorded: Recorded, segment: SegmentLayout) -> None:
        place = recorded.recording.known_places.places[segment.place]
        used = segment.blocks
        table, stack = recorded.recording.known_stacks, recorded.segment_stacks.get(segment.address, NO_STACK)
        self._dict(
            {
                "device": device,
                "address": segment.address,
                "total_size": segment.size_bytes,
                "allocated_size": sum(block.size_bytes for block in used if not block.awaiting),
                "active_size": sum(block.size_bytes for block in used),
                "requested_size": sum(block.requested_bytes for block in used),
                "stream": place.stream,
                "segment_type": "small" if segment.small else "large",
                "segment_pool_id": place.pool_id,
                "is_expandable": segment.expandable,
                "frames": lambda: self._stack(table, stack),
                "blocks": lambda: self._blocks(recorded, segment),
            }
        )

    def _blocks(self, recorded: Recorded, segment: SegmentLayout) -> None:
        rows: list[tuple[int, int, BlockLayout | None]] = [(at, size, None) for at, size in free_gaps(segment)]
        rows += [(block.address, block.size_bytes, block) for block in segment.blocks]
        rows.sort(key=lambda row: row[0])
        self._list([lambda row=row: self._block(recorded, *row) for row in rows])  # type: ignore[misc]

    def _block(self, recorded: Recorded, address: int, size: int, block: BlockLayout | None) -> None:
        stack = NO_STACK if block is None else recorded.block_stacks.get(address, NO_STACK)
        state = "inactive" if block is None else "active_awaiting_free" if block.awaiting else "active_allocated"
        self._dict(
            {
                "address": address,
                "size": size,
                "requested_size": 0 if block is None else block.requested_bytes,
                "state": state,
                "frames": lambda: self._stack(recorded.recording.known_stacks, stack),
            }
        )

    def _traces(self, devices: Mapping[int, Recorded]) -> None:
        self._list([lambda at=at: self._trace(devices.get(at)) for at in range(max(devices) + 1)])  # type: ignore[misc]

    def _trace(self, recorded: Recorded | None) -> None:
        """Write the events of one device."""
        self._buffer += b"]"
        self._memoize()
        recording = None if recorded is None else recorded.recording
        for start in range(0, 0 if recording is None else len(recording), BATCH_ITEMS):
            assert recording is not None
            self._buffer += b"("
            for at in range(start, min(start + BATCH_ITEMS, len(recording))):
                self._event(recorded, at)  # type: ignore[arg-type]
                self._flush(FRAME_BYTES)
            self._buffer += b"e"
            self._num_events += min(BATCH_ITEMS, len(recording) - start)
            if self._progress is not None:
                self._progress(self._num_events)

    def _event(self, recorded: Recorded, at: int) -> None:
        recording = recorded.recording
        kind = recording.kinds[at]
        place = recording.known_places.places[recording.places[at]]
        self._dict(
            {
                "action": ACTIONS[kind],
                "device_free" if kind == OOM else "addr": recording.addresses[at],
                "size": recording.sizes[at],
                "stream": place.stream,
                "time_us": recording.times_us[at],
                "pool_id": place.pool_id,
                "frames": lambda: self._stack(recording.known_stacks, recording.stacks[at]),
            }
        )

    def _settings(self, settings: AllocatorSettings) -> None:
        table = settings.divisions or (0,) * NUM_ROUNDUP_INTERVALS
        unlimited = settings.max_split_size_bytes == UNLIMITED_BYTES
        self._dict(
            {
                "PYTORCH_CUDA_ALLOC_CONF": settings.text,
                "max_split_size": -1 if unlimited else settings.max_split_size_bytes,
                "garbage_collection_threshold": float(settings.garbage_collection_threshold),
                "expandable_segments": settings.expandable_segments,
                "roundup_power2_divisions": lambda: self._dict(
                    {str(2**power): steps for power, steps in enumerate(table)}
                ),
            }
        )
