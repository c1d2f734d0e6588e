"""Memory snapshots of PyTorch (``torch.cuda.memory._dump_snapshot``): from the file to segments and events.

Source: pytorch@2.14:torch/cuda/memory.py:_snapshot, and what recordings since torch 2.0 hold. Keys come and go between
versions, so what is not known is named, not refused; what is needed and wrong is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ullage.allocator.events import (
    ACTIONS,
    DEFAULT_POOL,
    OOM,
    BlockLayout,
    Places,
    Recording,
    SegmentLayout,
)
from ullage.allocator.stacks import NO_STACK, Frame, Stack, Stacks
from ullage.errors import InputError
from ullage.i18n import _
from ullage.observe import safe_pickle
from ullage.observe.event_lane import StackNumber
from ullage.observe.pickle_limits import Limits
from ullage.observe.snapshot_stream import MAX_DEVICES, EventSink, StreamFinder

TOP_KEYS = {
    "segments", "device_traces", "allocator_settings", "external_annotations", "host_segments", "host_traces",
}  # fmt: skip
SEGMENT_KEYS = {
    "device", "address", "total_size", "allocated_size", "active_size", "requested_size", "stream", "segment_type",
    "segment_pool_id", "is_expandable", "frames", "blocks", "registration_counter",
}  # fmt: skip
BLOCK_KEYS = {"address", "size", "requested_size", "state", "frames", "history"}
EVENT_KEYS = {
    "action", "addr", "size", "stream", "time_us", "frames", "device_free", "pool_id", "compile_context",
    "user_metadata", "device",
}  # fmt: skip
#: Actions that change nothing.
SILENT = ("snapshot", "annotate", "user_defined", "workspace_snapshot")
STATES = {
    "active_allocated": False,
    "active_awaiting_free": True,
    "active_pending_free": True,
    "inactive": None,
}
CODES = {name: code for code, name in enumerate(ACTIONS)}
MAX_INTEGER = 2**64 - 1
#: Frames of a stack, and characters of a name in it, that are kept.
MAX_FRAMES, MAX_NAME = 400, 200
#: Frames that are known by the dict they stand in; the code of a program has some ten thousand.
MAX_KEPT_FRAMES = 1_000_000


@dataclass(kw_only=True)
class DeviceMemory:
    """One device of a snapshot: its segments when it was taken, and what was recorded before that.

    Attributes:
        segments: the segments with the blocks in use.
        free_blocks: (segment address, block address, bytes) of the others.
        recording: the events, oldest first; empty when the history was not recorded.
        stacks: block address -> stack, of the blocks in use; the same tuple for equal stacks.
        num_events: entries of the trace, those that change nothing counted too.
        ooms: (number of the event, bytes) of the requests that were refused.
    """

    device: int
    segments: list[SegmentLayout] = field(default_factory=list)
    free_blocks: list[tuple[int, int, int]] = field(default_factory=list)
    recording: Recording = field(default_factory=Recording)
    stacks: dict[int, Stack] = field(default_factory=dict)
    num_events: int = 0
    ooms: list[tuple[int, int]] = field(default_factory=list)


@dataclass(kw_only=True)
class Snapshot:
    """A snapshot file."""

    source: str
    devices: dict[int, DeviceMemory]
    settings: dict[str, Any]
    warnings: list[str]


def read_snapshot(
    path: Path,
    *,
    limits: Limits | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Snapshot:
    """Read a snapshot file, without running anything in it, and in bounded memory.

    Events become compact arrays while the file is read (:class:`ullage.allocator.events.Recording`, 37 bytes each).
    Stacks are kept once: an event has a number, ``recording.known_stacks.stack(number)`` is the stack, innermost frame
    first, as (function, file, line); ``DeviceMemory.stacks`` gives those of the blocks in use by their address.

    Args:
        path: the file.
        limits: what it may ask for.
        progress: called with the bytes read and those there are.

    Raises:
        InputError: the file is not a snapshot, is broken or is too large.
    """
    reader = _Reader()
    finder = StreamFinder(reader)
    tree = safe_pickle.load(path, limits=limits, finder=finder, progress=progress)
    try:
        return _parse(reader, tree, source=str(path))
    except InputError as error:
        raise InputError(error.what, where=f"{path}: {error.where}" if error.where else str(path)) from None


def parse_snapshot(tree: Any, *, source: str = "") -> Snapshot:
    """Read the plain values of a snapshot."""
    return _parse(_Reader(), tree, source=source)


def _parse(reader: _Reader, tree: Any, *, source: str) -> Snapshot:
    if isinstance(tree, list):
        tree = {"segments": tree, "device_traces": []}  # torch 1.x: the segments alone
    if not isinstance(tree, dict) or not isinstance(tree.get("segments"), list):
        raise InputError(_("this is no memory snapshot: it has no list of segments"))
    for segment in tree["segments"]:
        reader.segment(segment)
    traces = tree.get("device_traces", [])
    if not isinstance(traces, list) or len(traces) > MAX_DEVICES:
        raise InputError(_("device_traces must be a list with one list per device"), where="device_traces")
    for device, events in enumerate(traces):
        reader.trace(device, events)
    reader.unknown("top", set(tree) - TOP_KEYS)
    settings = tree.get("allocator_settings")
    return Snapshot(
        source=source,
        devices=dict(sorted(reader.devices.items())),
        settings=settings if isinstance(settings, dict) else {},
        warnings=reader.warnings(),
    )


class _Reader:
    """Reads segment by segment and event by event; refuses lists that stand for themselves again and again."""

    def __init__(self) -> None:
        self.devices: dict[int, DeviceMemory] = {}
        self._places: dict[int, Places] = {}
        self._strange: dict[str, set[str]] = {}
        self._seen: set[int] = set()
        self.stacks = Stacks()
        self._frames: dict[int, tuple[int, Any]] = {}

    def unknown(self, where: str, keys: set[Any]) -> None:
        """Note keys that are not known."""
        if keys:
            self._strange.setdefault(where, set()).update(str(key)[:40] for key in keys)

    def warnings(self) -> list[str]:
        """Return a sentence for each place with unknown keys."""
        return [
            _("keys of the snapshot that are not known are left out ({where}): {keys}").format(
                where=where, keys=", ".join(sorted(keys)[:12])
            )
            for where, keys in sorted(self._strange.items())
        ]

    def device(self, number: int) -> DeviceMemory:
        """Return a device, a new one when it is new."""
        if number not in self.devices:
            if len(self.devices) >= MAX_DEVICES:
                raise InputError(_("more than {count} devices").format(count=MAX_DEVICES))
            self.devices[number] = DeviceMemory(device=number, recording=Recording(known_stacks=self.stacks))
        return self.devices[number]

    def segment(self, segment: Any) -> None:
        """Read one segment and its blocks."""
        where = "segments"
        entry = self._entry(segment, where)
        self.unknown(where, entry.keys() - SEGMENT_KEYS)
        memory = self.device(_integer(entry, "device", where, default=0))
        total = _integer(entry, "total_size", where)
        address = _integer(entry, "address", where)
        kind = entry.get("segment_type")
        if kind not in ("small", "large"):
            raise InputError(_("segment_type is {value!r}, not small or large").format(value=_short(kind)), where=where)
        layout = SegmentLayout(
            address=address,
            size_bytes=total,
            place=memory.recording.known_places.index(
                _integer(entry, "stream", where, default=0), _pool(entry, "segment_pool_id", where)
            ),
            small=kind == "small",
            expandable=bool(entry.get("is_expandable", False)),
        )
        end = address
        for block in self._list(entry, "blocks", where):
            end = self._block(memory, layout, end, block)
        if end != address + total or not total:
            raise InputError(
                _("the blocks of the segment at {address:#x} add up to {found}, not to {total} bytes").format(
                    address=address, found=end - address, total=total
                ),
                where=where,
            )
        memory.segments.append(layout)

    def _block(self, memory: DeviceMemory, layout: SegmentLayout, start: int, block: Any) -> int:
        where = "segments.blocks"
        entry = self._entry(block, where)
        self.unknown(where, entry.keys() - BLOCK_KEYS)
        size = _integer(entry, "size", where)
        address = _integer(entry, "address", where, default=start)
        if address != start or size <= 0:
            raise InputError(
                _("a block at {address:#x} does not follow the one before").format(address=address), where=where
            )
        state = entry.get("state")
        if not isinstance(state, str) or state not in STATES:
            raise InputError(_("unknown state {state!r} of a block").format(state=_short(state)), where=where)
        if STATES[state] is None:
            memory.free_blocks.append((layout.address, address, size))
            return address + size
        requested, frames = _requested(entry, where, size)
        layout.blocks.append(
            BlockLayout(address=address, size_bytes=size, requested_bytes=requested, awaiting=bool(STATES[state]))
        )
        memory.stacks[address] = self.stacks.stack(self._stack(frames))
        return address + size

    def trace(self, device: int, events: Any) -> None:
        """Read the events of one device, if they were not taken while the file was read."""
        where = f"device_traces[{device}]"
        if isinstance(events, EventSink) and events.device == device:
            if events.num_events:
                self.device(device).num_events = events.num_events
            return
        if type(events) is not list:
            raise InputError(_("{name} must be a list").format(name=where), where=where)
        if events:
            self.device(device).num_events = len(events)
            for event in events:
                self._entry(event, where)
            self.events(device, events)

    def recording(self, device: int) -> Recording:
        """Return where the events of a device go."""
        return self.device(device).recording

    def events(self, device: int, items: list[Any]) -> list[int]:
        """Read events; return the numbers of their stacks."""
        where = f"device_traces[{device}]"
        memory, stacks = self.device(device), []
        recording = memory.recording
        for event in items:
            if not isinstance(event, dict):
                raise InputError(_("an entry of {name} is not a dict").format(name=where), where=where)
            if not event.keys() <= EVENT_KEYS:
                self.unknown(where, event.keys() - EVENT_KEYS)
            stacks.append(self._stack(event.get("frames")))
            action = event.get("action")
            code = CODES.get(action) if isinstance(action, str) else None
            if code is None:
                if action not in SILENT:
                    self.unknown(f"{where}.action", {_short(action)})
                continue
            self._event(memory, recording, code, event, stacks[-1], where)
        return stacks

    def _event(
        self, memory: DeviceMemory, recording: Recording, code: int, event: dict[Any, Any], stack: int, where: str
    ) -> None:
        address_key = "device_free" if code == OOM else "addr"
        address = _integer(event, address_key, where, default=0 if code == OOM else None)
        size = _integer(event, "size", where)
        pool = _pool(event, "pool_id", where)
        place = recording.known_places.index(_integer(event, "stream", where, default=0), pool)
        if code == OOM:
            memory.ooms.append((len(recording), size))
        time_us = event.get("time_us")
        known_time = time_us if type(time_us) is int and 0 <= time_us <= MAX_INTEGER else 0
        recording.append(code, address, size, place, stack, known_time)

    def _stack(self, frames: Any) -> int:
        """Return the number of a stack; what is no list of frames is no stack."""
        if isinstance(frames, StackNumber):
            return frames.number
        if not isinstance(frames, list) or not frames:
            return NO_STACK
        row = tuple(map(self._frame_number, frames[:MAX_FRAMES]))
        return self.stacks.number_of_row(row)

    def stack_of(self, frames: Sequence[Any]) -> int:
        """Return the number of a stack, -1 where something in it is no frame."""
        if not all(type(frame) is dict for frame in frames):
            return -1
        return self.stacks.number_of_row(tuple(map(self._frame_number, frames[:MAX_FRAMES])))

    def _frame_number(self, frame: Any) -> int:
        """Return the number of a frame; dicts met before are known again, and kept so that no other takes their id."""
        found = self._frames.get(id(frame))
        if found is None:
            found = self.stacks.frame_number(_frame(frame)), frame
            if len(self._frames) < MAX_KEPT_FRAMES:
                self._frames[id(frame)] = found
        return found[0]

    def _entry(self, value: Any, where: str) -> dict[Any, Any]:
        """Return a dict that was not read before: real snapshots write each entry once."""
        if not isinstance(value, dict):
            raise InputError(_("an entry of {name} is not a dict").format(name=where), where=where)
        if id(value) in self._seen:
            raise InputError(_("an entry of {name} stands twice in the file").format(name=where), where=where)
        self._seen.add(id(value))
        return value

    def _list(self, entry: dict[Any, Any], key: str, where: str) -> list[Any]:
        value = entry.get(key)
        if not isinstance(value, list):
            raise InputError(_("{name} must be a list").format(name=key), where=where)
        return value


def _integer(entry: dict[Any, Any], key: str, where: str, *, default: int | None = None) -> int:
    value = entry.get(key, default)
    if type(value) is not int or not 0 <= value <= MAX_INTEGER:
        what = _("{name} is {value!r}, not a number of bytes or an address")
        raise InputError(what.format(name=key, value=_short(value)), where=where)
    return value


def _pool(entry: dict[Any, Any], key: str, where: str) -> tuple[int, int]:
    value = entry.get(key, DEFAULT_POOL)
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(type(part) is int for part in value):
        return value[0], value[1]
    raise InputError(_("{name} must be two numbers").format(name=key), where=where)


def _requested(entry: dict[Any, Any], where: str, size: int) -> tuple[int, Any]:
    """Return what was asked for and the stack; until torch 2.0 both stand in ``history``, the newest first."""
    history = entry.get("history")
    if isinstance(history, list) and history and isinstance(history[0], dict):
        newest = history[0]
        requested = entry.get("requested_size", newest.get("real_size", size))
        stack = newest.get("frames")
    else:
        requested, stack = entry.get("requested_size", size), entry.get("frames")
    if type(requested) is not int or not 0 <= requested <= size:
        raise InputError(
            _("requested_size is {value!r} in a block of {size} bytes").format(value=_short(requested), size=size),
            where=where,
        )
    return requested, stack


def _frame(frame: Any) -> Frame:
    if not isinstance(frame, dict):
        return "?", "?", 0
    name, file = (str(frame.get(key, "?"))[:MAX_NAME] for key in ("name", "filename"))
    line = frame.get("line")
    return name, file, line if type(line) is int and 0 <= line <= MAX_INTEGER else 0


def python_frames(stack: Stack | None, *, limit: int = 8) -> list[str]:
    """Return the Python frames of a stack, the innermost first, as ``function (file:line)``."""
    python = (f"{name} ({file}:{line})" for name, file, line in stack or () if file.endswith(".py"))
    return list(islice(python, limit))


def _short(value: Any) -> str:
    """Return a value for a message; only plain ones, because others may be large."""
    return str(value)[:40] if isinstance(value, (str, int, float, bool)) or value is None else type(value).__name__
