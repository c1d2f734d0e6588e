"""A trace as a memory snapshot of PyTorch, for ``torch.cuda._memory_viz``, the web viewer, ``ullage replay``."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from ullage.allocator.events import SEGMENT_ALLOC, SEGMENT_FREE, SEGMENT_MAP, SEGMENT_UNMAP, Place
from ullage.allocator.settings import AllocatorSettings
from ullage.allocator.simulate import Allocator
from ullage.allocator.state import IN_USE, UNMAPPED, Block, FreeSet
from ullage.files import replacing
from ullage.trace.recorder.events import Allocation, Trace

_DRIVER = {
    SEGMENT_ALLOC: "segment_alloc", SEGMENT_FREE: "segment_free", SEGMENT_MAP: "segment_map",
    SEGMENT_UNMAP: "segment_unmap",
}  # fmt: skip
#: Microseconds between two events: a trace has no clock.
TICK_US = 10


def write_snapshot(path: Path, trace: Trace, settings: AllocatorSettings, *, text: str = "") -> None:
    """Write the snapshot of a run without a limit of memory. ``text``: the settings as PYTORCH_ALLOC_CONF.

    Raises:
        InputError: the file cannot be written.
    """
    value = _Writer(trace, settings).run(text)
    with replacing(path) as temporary, temporary.open("wb") as file:
        pickle.dump(value, file, protocol=4)


class _Writer:
    """Runs the events and keeps what the allocator's recorder would."""

    def __init__(self, trace: Trace, settings: AllocatorSettings) -> None:
        self.trace, self.settings = trace, settings
        self.allocator = Allocator(settings)
        self.allocator.on_driver = self._driver
        self.entries: list[dict[str, Any]] = []
        self._frames: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        self._owners: dict[int, list[dict[str, Any]]] = {}

    def run(self, text: str) -> dict[str, Any]:
        blocks: dict[int, Any] = {}
        requests: dict[tuple[int, int], Any] = {}
        for event in self.trace.events:
            if event >= 0:
                one = self.trace.allocations[event]
                request = requests.get((one.size_bytes, one.stream))
                if request is None:
                    request = self.allocator.request(one.size_bytes, Place(stream=one.stream))
                    requests[one.size_bytes, one.stream] = request
                self._now = self._frames_of(one)
                block = self.allocator.malloc(request)
                assert block is not None  # there is no limit
                blocks[event] = block
                self._owners[block.address] = self._now
                self._entry("alloc", block.address, one.size_bytes, one.stream)
            else:
                block = blocks.pop(~event)
                one, address = self.trace.allocations[~event], block.address
                self._now = self._owners.pop(address)
                self._entry("free_requested", address, one.size_bytes, one.stream)
                self._entry("free_completed", address, one.size_bytes, one.stream)
                self.allocator.free(block)
        return {
            "segments": [self._segment(base) for base in sorted(self.allocator.segments)],
            "device_traces": [self.entries],
            "allocator_settings": {
                "PYTORCH_CUDA_ALLOC_CONF": text,
                "expandable_segments": self.settings.expandable_segments,
            },
            "external_annotations": [],
        }

    def _entry(self, action: str, address: int, size: int, stream: int) -> None:
        self.entries.append(
            {
                "action": action,
                "addr": address,
                "size": size,
                "stream": stream,
                "time_us": TICK_US * len(self.entries),
                "compile_context": "N/A",
                "user_metadata": "",
                "frames": self._now,
            }
        )

    def _driver(self, kind: int, address: int, size: int, whose: FreeSet) -> None:
        self._entry(_DRIVER[kind], address, size, whose.stream)

    def _frames_of(self, one: Allocation) -> list[dict[str, Any]]:
        """Return frames that say what an allocation is: operator, module, phase; then the stack if one was taken."""
        key = (one.op, one.place, one.category, one.owner, one.stack)
        found = self._frames.get(key)
        if found is None:
            place = self.trace.places[one.place]
            words = [one.op, one.owner or place.module or "(no module)", f"{one.category}, {place.phase}"]
            found = [{"name": word, "filename": "", "line": 0} for word in words]
            for line in self.trace.stacks[one.stack] if one.stack >= 0 else ():
                filename, number, name = line.rsplit(":", 2)
                found.append({"name": name, "filename": filename, "line": int(number)})
            self._frames[key] = found
        return found

    def _segment(self, base: int) -> dict[str, Any]:
        blocks = [each for each in self.allocator.blocks_of(base) if each.state != UNMAPPED]
        in_use = [each for each in blocks if each.state == IN_USE]
        used = sum(each.size for each in in_use)
        return {
            "device": 0,
            "address": blocks[0].address,
            "total_size": sum(each.size for each in blocks),
            "allocated_size": used,
            "active_size": used,
            "requested_size": sum(each.requested for each in in_use),
            "stream": blocks[0].free_set.stream,
            "segment_type": "small" if blocks[0].free_set.small else "large",
            "segment_pool_id": (0, 0),
            "is_expandable": blocks[0].expandable,
            "frames": [],
            "blocks": [self._block(each) for each in blocks],
        }

    def _block(self, block: Block) -> dict[str, Any]:
        used = block.state == IN_USE
        return {
            "address": block.address,
            "size": block.size,
            "requested_size": block.requested if used else 0,
            "state": "active_allocated" if used else "inactive",
            "frames": self._owners.get(block.address, []) if used else [],
        }
