"""Would a request that was refused have fitted under other allocator settings? The recording is run again up to it.

The run starts from what was there when the recording began, allocated anew under the settings tried; the driver can
give what was reserved when the request was refused and what it had left then, and the request comes last.
Known error: what other processes do meanwhile, and blocks that wait for other streams, are as recorded.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ullage.allocator.events import ALLOC, OOM, Recording
from ullage.allocator.replay import recover_beginning, to_workload
from ullage.allocator.run import run_workload
from ullage.allocator.settings import AllocatorSettings
from ullage.allocator.what_if import CANDIDATES, compare
from ullage.errors import InputError
from ullage.observe.attribution_lives import Lives
from ullage.observe.snapshot import DeviceMemory

#: Steps of work that are run in all: more take more than about ten seconds.
MAX_STEPS = 3_000_000


@dataclass(kw_only=True)
class Refusal:
    """A request that was refused.

    Attributes:
        requested_bytes: what was asked for. ``event``: when. ``free_bytes``: what the driver had left.
        reserved_bytes, allocated_bytes: at that moment.
        tried: whether other settings were run at all, and ``dies``: whether the recorded ones refuse it in the run too.
        saved_by: settings under which it fits, the best first, with the bytes that stay free under each.
    """

    requested_bytes: int
    event: int
    free_bytes: int
    reserved_bytes: int
    allocated_bytes: int
    tried: bool = False
    dies: bool = False
    saved_by: list[tuple[str, int]] = field(default_factory=list)

    @property
    def gap_bytes(self) -> int:
        """What is missing even if all that is free were one piece; at most 0: it would fit."""
        return self.allocated_bytes + self.requested_bytes - self.reserved_bytes - self.free_bytes


def refusal_of(memory: DeviceMemory, lives: Lives, settings: AllocatorSettings) -> Refusal | None:
    """Look at the last request that was refused; ``None`` when none was."""
    if not memory.ooms:
        return None
    event, requested = memory.ooms[-1]
    free = memory.recording.addresses[event] if event < len(memory.recording) else 0
    before = lives.totals[event - 1] if event else lives.start_bytes
    result = Refusal(
        requested_bytes=requested,
        event=event,
        free_bytes=free,
        reserved_bytes=lives.reserved_at(event),
        allocated_bytes=before,
    )
    if result.gap_bytes <= 0 and event:  # a refusal alone is no history
        _try_others(result, memory, settings)
    return result


def _try_others(result: Refusal, memory: DeviceMemory, settings: AllocatorSettings) -> None:
    num_candidates = min(len(CANDIDATES), MAX_STEPS // max(1, result.event) - 2)
    if num_candidates < 1 or settings.backend != "native":
        return
    beginning = recover_beginning(memory.segments, memory.recording, settings)
    work = to_workload(_until(memory.recording, result), beginning.segments)
    capacity = result.reserved_bytes + result.free_bytes
    try:
        kept = run_workload(work, settings, capacity_bytes=capacity)
        comparison = compare(work, settings, kept, capacity_bytes=capacity, candidates=CANDIDATES[:num_candidates])
    except InputError:
        return
    result.tried, result.dies = True, kept.death is not None
    alive = [outcome for outcome in comparison.outcomes if outcome.death is None]
    result.saved_by = [(outcome.settings.text, capacity - outcome.final_reserved_bytes) for outcome in alive]


def _until(recording: Recording, result: Refusal) -> Recording:
    """Return the recording up to the refusal, which becomes a request like any other."""
    end = result.event
    kinds = bytearray(
        ALLOC if kind == OOM and at == end else kind for at, kind in enumerate(recording.kinds[: end + 1])
    )
    addresses = recording.addresses[: end + 1]
    addresses[end] = 2**63  # where no block lies
    return Recording(
        kinds=kinds,
        addresses=addresses,
        sizes=recording.sizes[: end + 1],
        places=recording.places[: end + 1],
        stacks=recording.stacks[: end + 1],
        times_us=recording.times_us[: end + 1],
        known_places=recording.known_places,
        known_stacks=recording.known_stacks,
    )
