"""PyTorch's caching allocator as far as a planned step needs it: one pool per stream and size class.

A freed block serves only its own stream, a large block is split, neighbours merge: that is where reserved bytes beyond
allocated ones come from. Times of use across streams, graph pools and ``max_split_size_mb`` are not followed.

Source: torch@2.13.0:c10/cuda/CUDACachingAllocator.cpp: kMinBlockSize 512 B, kSmallSize 1 MiB, kSmallBuffer 2 MiB,
kMinLargeAlloc 10 MiB, kLargeBuffer 20 MiB, kRoundLarge 2 MiB; get_free_block (best fit), should_split,
try_allocate_expandable_block (grows at the end of the one segment).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field

from ullage.units import MiB, round_up

MIN_BLOCK = 512
SMALL_SIZE = 1 * MiB
SMALL_SEGMENT = 2 * MiB
MIN_LARGE_ALLOC = 10 * MiB
LARGE_SEGMENT = 20 * MiB
ROUND_LARGE = 2 * MiB


class Block:
    """A piece of a segment, in use or free, between its neighbours."""

    __slots__ = ("after", "before", "free", "number", "pool", "size")

    def __init__(self, pool: Pool, size: int, number: int) -> None:
        self.pool, self.size, self.number = pool, size, number
        self.before: Block | None = None
        self.after: Block | None = None
        self.free = True


@dataclass(eq=False)
class Pool:
    """The blocks of one stream and size class."""

    small: bool
    expandable: bool
    reserved: int = 0
    _free: list[tuple[int, int]] = field(default_factory=list)
    _blocks: dict[int, Block] = field(default_factory=dict)
    _last: Block | None = None
    _count: int = 0
    _least_rest: int = 0

    def __post_init__(self) -> None:
        """What may be left of a block for it to be cut: anything in small and expandable segments, else over 1 MiB."""
        self._least_rest = MIN_BLOCK if self.small or self.expandable else SMALL_SIZE + 1

    def take(self, size: int) -> Block:
        """Return a block of ``size`` (rounded) bytes, cut from the smallest free block that holds it, or a new one."""
        free = self._free
        at = bisect_left(free, (size, -1))
        block = self._blocks[free.pop(at)[1]] if at < len(free) else self._grow(size)
        if block.size - size >= self._least_rest:
            self._split(block, size)
        block.free = False
        return block

    def give(self, block: Block) -> None:
        """Return a block and merge it with free neighbours."""
        before, after = block.before, block.after
        if before is not None and before.free:
            self._forget(before)
            block.size += before.size
            block.before = before.before
            if block.before is not None:
                block.before.after = block
        if after is not None and after.free:
            self._forget(after)
            block.size += after.size
            block.after = after.after
            if block.after is not None:
                block.after.before = block
            if after is self._last:
                self._last = block
        block.free = True
        insort(self._free, (block.size, block.number))

    def release(self) -> int:
        """Give wholly free segments back to the device, as before an out-of-memory error; return their bytes."""
        if self.expandable:
            return 0
        gone = [self._blocks[n] for _size, n in self._free]
        gone = [block for block in gone if block.before is None and block.after is None]
        for block in gone:
            self._forget(block)
            self._blocks.pop(block.number)
            self.reserved -= block.size
        return sum(block.size for block in gone)

    def segment_size(self, size: int) -> int:
        """Bytes asked of the device for a request of ``size``."""
        if self.small:
            return SMALL_SEGMENT
        return LARGE_SEGMENT if size < MIN_LARGE_ALLOC else round_up(size, ROUND_LARGE)

    def _grow(self, size: int) -> Block:
        if not self.expandable:
            return self._new(self.segment_size(size))
        page = SMALL_SEGMENT if self.small else LARGE_SEGMENT
        last = self._last
        if last is not None and last.free:
            self._forget(last)
            more = round_up(size - last.size, page)
            last.size += more
            self.reserved += more
            return last
        block = self._new(round_up(size, page))
        block.before = last
        if last is not None:
            last.after = block
        self._last = block
        return block

    def _new(self, size: int) -> Block:
        self._count += 1
        block = Block(self, size, self._count)
        self._blocks[block.number] = block
        self.reserved += size
        return block

    def _split(self, block: Block, size: int) -> None:
        self._count += 1
        rest = Block(self, block.size - size, self._count)
        self._blocks[rest.number] = rest
        rest.before, rest.after = block, block.after
        if rest.after is not None:
            rest.after.before = rest
        block.after, block.size = rest, size
        if block is self._last:
            self._last = rest
        insort(self._free, (rest.size, rest.number))

    def _forget(self, block: Block) -> None:
        at = bisect_left(self._free, (block.size, block.number))
        self._free.pop(at)


class Allocator:
    """All pools of a device.

    Args:
        expandable: ``expandable_segments:True``.
        limit_bytes: what the device has for the allocator; before it is passed, free segments are given back.
    """

    def __init__(self, *, expandable: bool = False, limit_bytes: int | None = None) -> None:
        self.expandable, self.limit_bytes = expandable, limit_bytes
        self.pools: dict[tuple[str, bool], Pool] = {}
        self.peak_reserved = 0
        self.reserved = 0

    def take(self, num_bytes: int, stream: str) -> Block:
        """Allocate on a stream."""
        size = (max(num_bytes, 1) + MIN_BLOCK - 1) // MIN_BLOCK * MIN_BLOCK
        small = size <= SMALL_SIZE
        pool = self.pools.get((stream, small))
        if pool is None:
            pool = self.pools[stream, small] = Pool(small=small, expandable=self.expandable)
        before = pool.reserved
        block = pool.take(size)
        if pool.reserved != before:
            self._grown(pool.reserved - before)
        return block

    def _grown(self, more: int) -> None:
        self.reserved += more
        if self.limit_bytes is not None and self.reserved > self.limit_bytes:
            self.reserved -= sum(one.release() for one in self.pools.values())
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def give(self, block: Block) -> None:
        """Free."""
        block.pool.give(block)


class Unpooled(Allocator):
    """Lays out nothing: for a walk that is asked for allocated bytes alone."""

    def __init__(self) -> None:
        super().__init__()
        self._block = Block(_NoPool(small=False, expandable=False), 0, 0)

    def take(self, num_bytes: int, stream: str) -> Block:
        """Allocate nowhere."""
        return self._block


class _NoPool(Pool):
    def give(self, block: Block) -> None:
        """Nothing was taken."""
