"""The caching allocator under a walk: streams by their names, and a run that goes on when the card is full."""

from __future__ import annotations

from collections.abc import Callable

from ullage.allocator.events import DEFAULT_POOL, Place
from ullage.allocator.request import Request
from ullage.allocator.settings import AllocatorSettings
from ullage.allocator.simulate import Allocator
from ullage.allocator.state import IN_USE, Block, FreeSet, Pool

__all__ = ["Block", "Pools", "Unpooled"]


#: Jobs that need so many cards are walked without one: what goes back decides nothing, and looking for it takes long.
HOPELESS = 2


class Pools:
    """The simulator of :mod:`ullage.allocator`, asked for sizes on named streams.

    Args:
        settings: of the allocator, as the job states them.
        capacity_bytes: what the card has for the allocator; no limit when not given. What is free goes back before it
            is passed; where a request fits no more, the walk goes on with a card that is just large enough for it.
        total_bytes: what the driver reports as the card's memory, for a fraction of it.
    """

    def __init__(
        self,
        settings: AllocatorSettings | None = None,
        *,
        capacity_bytes: int | None = None,
        total_bytes: int | None = None,
    ) -> None:
        settings = settings or AllocatorSettings()
        self._allocator = Allocator(settings, capacity_bytes=capacity_bytes, total_bytes=total_bytes)
        self._card = capacity_bytes
        self._requests: dict[tuple[int, str], Request] = {}
        self._streams: dict[str, int] = {}
        self.give: Callable[[Block], None] = self._allocator.free

    @property
    def reserved(self) -> int:
        """Return the bytes of all segments."""
        return self._allocator.reserved

    @property
    def peak_reserved(self) -> int:
        """Return the most bytes that the segments had."""
        return self._allocator.peak_reserved

    def reserved_on(self, stream: str) -> int:
        """Return the bytes of a stream's segments; of expandable ones, what is mapped."""
        ranges = self._allocator.mapped_ranges()
        number = self._streams.get(stream)
        return sum(block.size for blocks in ranges for block in blocks if block.free_set.stream == number)

    def take(self, num_bytes: int, stream: str) -> Block:
        """Allocate on a stream."""
        request = self._requests.get((num_bytes, stream))
        if request is None:
            place = Place(stream=self._streams.setdefault(stream, len(self._streams)))
            request = self._requests[num_bytes, stream] = self._allocator.request(num_bytes, place)
        return self._allocator.malloc(request) or self._beyond(request)

    def _beyond(self, request: Request) -> Block:
        """Serve what the card has no room for, and take the card to be as large from now on."""
        allocator = self._allocator
        capacity, cap, gc_threshold = allocator.capacity, allocator.cap, allocator.gc_threshold
        allocator.capacity, allocator.cap, allocator.gc_threshold = None, None, 0.0
        allocator.total = max(allocator.total or 0, request.rounded)  # so many addresses have to be there
        block = allocator.malloc(request)
        assert block is not None
        if allocator.active <= HOPELESS * (self._card or 0):
            allocator.capacity = None if capacity is None else max(capacity, allocator.reserved)
            allocator.cap = None if cap is None else max(cap, allocator.reserved)
            allocator.gc_threshold = gc_threshold
        return block


class Unpooled(Pools):
    """Lays out nothing: for a walk that is asked for allocated bytes alone."""

    def __init__(self) -> None:
        super().__init__()
        self._block = Block(0, 0, FreeSet(Pool(pool_id=DEFAULT_POOL, small=False), 0), IN_USE)
        self.give = _keep

    def take(self, num_bytes: int, stream: str) -> Block:
        """Allocate nowhere."""
        return self._block


def _keep(_block: Block) -> None:
    """Nothing was taken."""
