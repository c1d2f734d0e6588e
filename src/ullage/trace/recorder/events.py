"""A trace: what was allocated and freed, in order, and what each allocation was for. No torch here."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from ullage.allocator.events import Workload, WorkloadBuilder
from ullage.units import round_up

#: Blocks of the caching allocator are multiples of this. Source: pytorch@2.13:c10/cuda/CUDACachingAllocator.cpp
#: (kMinBlockSize).
BLOCK_BYTES = 512

PARAMETER, BUFFER, GRADIENT = "parameter", "buffer", "gradient"
OPTIMIZER_STATE, ACTIVATION, TEMPORARY = "optimizer_state", "activation", "temporary"
INPUT, WORKSPACE, COMMUNICATION = "input", "workspace", "communication"
#: In the order in which tables and figures stack them.
CATEGORIES = (
    PARAMETER, BUFFER, OPTIMIZER_STATE, GRADIENT, ACTIVATION, TEMPORARY, INPUT, WORKSPACE, COMMUNICATION,
)  # fmt: skip

#: Operators that communicate begin so.
COLLECTIVE = "_c10d_functional::"

SETUP, FORWARD, BACKWARD, RECOMPUTE, OPTIMIZER = "setup", "forward", "backward", "recompute", "optimizer"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the program was: the phase of the step and the path of the module that ran, "" for none.

    ``step`` counts optimizer steps, ``micro_batch`` backward passes within a step; both from 0.
    """

    phase: str
    module: str
    step: int = 0
    micro_batch: int = 0


@dataclass(kw_only=True)
class Allocation:
    """One block of device memory from the moment it is taken.

    Attributes:
        size_bytes: what was asked for.
        place: number of the place in ``Trace.places``.
        op: the operator that made it, or the kernel whose temporary it is.
        category: "" until the trace is finished.
        owner: path of the parameter that it belongs to, "" where it belongs to none.
        stack: number of the stack in ``Trace.stacks``, -1 where none was taken.
        stream: on which it was taken, 0 for the one that computes: each has a pool of its own.
    """

    __slots__ = ("category", "dtype", "op", "owner", "place", "shape", "size_bytes", "stack", "stream")
    size_bytes: int
    place: int
    op: str
    category: str
    owner: str
    dtype: str
    shape: tuple[int, ...]
    stack: int
    stream: int


@dataclass(kw_only=True)
class Trace:
    """Events in order: ``n`` takes allocation n, ``~n`` gives it back; ``where`` has the place of each event.

    Attributes:
        assumed: sentences on what the trace took for granted.
        peak_event: filled by :meth:`peak`.
    """

    allocations: list[Allocation] = field(default_factory=list)
    events: array[int] = field(default_factory=lambda: array("q"))
    where: array[int] = field(default_factory=lambda: array("L"))
    places: list[Place] = field(default_factory=list)
    stacks: list[tuple[str, ...]] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)

    def place(self, event: int) -> Place:
        """Return where the program was at an event."""
        return self.places[self.where[event]]

    def running_bytes(self) -> array[int]:
        """Return the bytes in use after each event, in the allocator's blocks."""
        running, now = array("q"), 0
        sizes = [round_up(one.size_bytes, BLOCK_BYTES) for one in self.allocations]
        for event in self.events:
            now += sizes[event] if event >= 0 else -sizes[~event]
            running.append(now)
        return running

    def peak(self) -> tuple[int, int]:
        """Return (event, bytes) of the first moment at which most is in use; (-1, 0) of an empty trace."""
        best, at, now = 0, -1, 0
        sizes = [round_up(one.size_bytes, BLOCK_BYTES) for one in self.allocations]
        for index, event in enumerate(self.events):
            if event >= 0:
                now += sizes[event]
                if now > best:
                    best, at = now, index
            else:
                now -= sizes[~event]
        return at, best

    def alive_at(self, event: int) -> list[int]:
        """Return the allocations in use after an event, in the order in which they were taken."""
        alive: dict[int, None] = {}
        for number in self.events[: event + 1]:
            if number >= 0:
                alive[number] = None
            else:
                alive.pop(~number, None)
        return list(alive)

    def workload(self) -> Workload:
        """Return the events as work for the allocator."""
        builder, numbers = WorkloadBuilder(), {}
        for event in self.events:
            if event >= 0:
                one = self.allocations[event]
                numbers[event] = builder.allocate(one.size_bytes, stream=one.stream)
            else:
                builder.free(numbers.pop(~event))
        return builder.work


def classify(trace: Trace) -> None:
    """Give every allocation that no rule named its category.

    What a forward pass (first or repeated) leaves behind when it ends is an activation; what is freed in the phase that
    took it is a temporary, as are the gradients of activations in backward. What a collective gave and backward reads
    is an activation too.
    """
    taken_in = {FORWARD, RECOMPUTE}
    ends: dict[int, int] = {~event: index for index, event in enumerate(trace.events) if event < 0}
    for number, allocation in enumerate(trace.allocations):
        given = allocation.category == COMMUNICATION and allocation.op.startswith(COLLECTIVE)
        if allocation.category and not given:
            continue
        start = trace.places[allocation.place]
        end = ends.get(number)
        within = COMMUNICATION if given else TEMPORARY
        if start.phase not in taken_in:
            allocation.category = within
        elif end is None:
            allocation.category = ACTIVATION
        else:
            last = trace.place(end)
            same = (last.phase, last.step, last.micro_batch) == (start.phase, start.step, start.micro_batch)
            allocation.category = within if same else ACTIVATION
