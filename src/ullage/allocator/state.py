"""Blocks, the sets of free ones, and the pools they belong to.

A block never changes pool or stream, so each (pool, stream) has a set of its own; within it the allocator's order is
(size, address), kept as one sorted list of integers ``size << 128 | address``.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

IN_USE, FREE, AWAITING, UNMAPPED = range(4)
#: Room for addresses in a key: far more than a device has, so that a job of absurd size is answered, too.
ADDRESS_BITS = 128


class Block:
    """A stretch of a segment, between the blocks before and after it."""

    __slots__ = (
        "address", "expandable", "free_set", "gc_base", "key", "next", "owner", "prev", "requested", "size", "state",
    )  # fmt: skip

    def __init__(self, address: int, size: int, free_set: FreeSet, state: int, expandable: bool = False) -> None:
        self.address, self.size, self.free_set, self.state = address, size, free_set, state
        self.expandable = expandable
        self.prev: Block | None = None
        self.next: Block | None = None
        self.requested = self.gc_base = self.key = 0
        self.owner = -1

    @property
    def whole(self) -> bool:
        """Tell whether the block is a segment of its own."""
        return self.prev is None and self.next is None

    def insert_after(self, other: Block) -> None:
        """Link this block in behind ``other``."""
        following = other.next
        self.prev, self.next = other, following
        other.next = self
        if following is not None:
            following.prev = self

    def unlink(self) -> None:
        """Take this block out of the chain."""
        if self.prev is not None:
            self.prev.next = self.next
        if self.next is not None:
            self.next.prev = self.prev


class Pool:
    """The small or the large blocks of the default pool, or of one graph or MemPool."""

    __slots__ = ("free_sets", "num_calls", "pool_id", "small")

    def __init__(self, *, pool_id: tuple[int, int], small: bool) -> None:
        self.pool_id, self.small = pool_id, small
        self.free_sets: dict[int, FreeSet] = {}
        self.num_calls = 0  # searches, the clock of the garbage collector

    @property
    def private(self) -> bool:
        """Tell whether a CUDA graph or a MemPool owns the pool."""
        return self.pool_id != (0, 0)

    def free_set(self, stream: int) -> FreeSet:
        """Return the set of one stream."""
        found = self.free_sets.get(stream)
        if found is None:
            found = self.free_sets[stream] = FreeSet(self, stream)
        return found

    def blocks(self) -> Iterator[Block]:
        """Yield the free blocks in the allocator's order: stream, size, address."""
        for stream in sorted(self.free_sets):
            yield from list(self.free_sets[stream].blocks)


class FreeSet:
    """The free blocks of one pool and stream by (size, address), and the unmapped ones by address."""

    __slots__ = ("bases", "blocks", "keys", "pool", "small", "spare", "stream", "unmapped", "unmapped_addresses")

    def __init__(self, pool: Pool, stream: int) -> None:
        self.pool, self.stream, self.small = pool, stream, pool.small
        self.keys: list[int] = []
        self.blocks: list[Block] = []  # in the order of keys
        self.spare: list[Block] = []  # blocks that were merged away, to be used again
        self.bases: list[int] = []  # where its expandable segments begin
        self.unmapped_addresses: list[int] = []
        self.unmapped: dict[int, Block] = {}

    def insert(self, block: Block) -> None:
        """Add a free block."""
        block.state = FREE
        block.gc_base = self.pool.num_calls
        block.key = block.size << ADDRESS_BITS | block.address
        index = bisect_left(self.keys, block.key)
        self.keys.insert(index, block.key)
        self.blocks.insert(index, block)

    def remove(self, block: Block) -> None:
        """Take a free block out."""
        index = bisect_left(self.keys, block.key)
        del self.keys[index]
        del self.blocks[index]

    def insert_unmapped(self, block: Block) -> None:
        """Add a stretch of addresses without memory."""
        block.state = UNMAPPED
        insort(self.unmapped_addresses, block.address)
        self.unmapped[block.address] = block

    def remove_unmapped(self, block: Block) -> None:
        """Take such a stretch out."""
        del self.unmapped_addresses[bisect_left(self.unmapped_addresses, block.address)]
        del self.unmapped[block.address]

    def first_fit(self, size: int) -> int:
        """Return the index of the smallest block of at least ``size``, the lowest among equals."""
        return bisect_left(self.keys, size << ADDRESS_BITS)

    def at(self, index: int) -> Block:
        """Return the block at an index of the order."""
        return self.blocks[index]
