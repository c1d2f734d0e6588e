"""The allocator itself: search, split, merge, and what it does when nothing fits."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

from ullage.allocator import expandable, release
from ullage.allocator.constants import ROUND_LARGE_BYTES
from ullage.allocator.events import SEGMENT_ALLOC, Place, SegmentLayout
from ullage.allocator.request import Request
from ullage.allocator.settings import AllocatorSettings
from ullage.allocator.state import ADDRESS_BITS, AWAITING, FREE, IN_USE, UNMAPPED, Block, FreeSet, Pool
from ullage.errors import InputError
from ullage.i18n import _
from ullage.units import round_up

#: Where made-up segments start; any value does, ties between equal blocks apart.
FIRST_ADDRESS = 2**40


@dataclass(kw_only=True)
class Counters:
    """What the driver was asked, and how often it said no."""

    num_segments_allocated: int = 0
    num_segments_freed: int = 0
    num_maps: int = 0
    num_unmaps: int = 0
    num_retries: int = 0
    num_synchronisations: int = 0
    num_rejections: int = 0

    @property
    def num_driver_calls(self) -> int:
        """Return the calls that stop the GPU or the host: allocate, free, map, unmap."""
        return self.num_segments_allocated + self.num_segments_freed + self.num_maps + self.num_unmaps


class Allocator:
    """One device's caching allocator under some settings.

    Args:
        settings: as ``PYTORCH_ALLOC_CONF`` gives them.
        capacity_bytes: what the driver can give to this allocator; no limit when not given.
        total_bytes: what the driver reports as the device's memory, for fractions; ``capacity_bytes`` when not given.
        addresses: called with the bytes of a new segment, returns where it lies.
    """

    def __init__(
        self,
        settings: AllocatorSettings,
        *,
        capacity_bytes: int | None = None,
        total_bytes: int | None = None,
        addresses: Callable[[int], int] | None = None,
    ) -> None:
        self.settings, self.capacity = settings, capacity_bytes
        self.total = total_bytes if total_bytes is not None else capacity_bytes
        self.cap = None if settings.memory_fraction is None else settings.allowed_bytes(self.total)
        self.gc_threshold = settings.garbage_collection_threshold if self.cap is not None else 0.0
        self.addresses = addresses or self._next_address
        self.pools: dict[tuple[tuple[int, int], bool], Pool] = {}
        self.segments: dict[int, Block] = {}  # base address -> first block
        self.waiting: dict[int, Block] = {}  # freed blocks that a stream still uses
        self.counters = Counters()
        self.reserved = self.active = self.awaiting = 0  # bytes; active ones are in use or awaiting an event
        self.peak_reserved = self.peak_allocated = self.peak_active = self._low_peak = 0
        self.on_growth: Callable[[], None] | None = None  # called when the reserved memory reaches a new height
        self.on_driver: Callable[[int, int, int, FreeSet], None] | None = None  # (SEGMENT_..., address, bytes, whose)
        self._top = FIRST_ADDRESS
        self._has_expandable = settings.expandable_segments
        self._alignment = settings.alignment_bytes if settings.expandable_segments else 0
        # whether the first fit may be the wrong one, and blocks of one set differ
        self._choosy = bool(settings.expandable_segments or self.gc_threshold)

    @property
    def allocated(self) -> int:
        """Return the bytes of the blocks in use."""
        return self.active - self.awaiting

    @property
    def requested(self) -> int:
        """Return what was asked for in the blocks in use."""
        return sum(block.requested for base in self.segments for block in self.blocks_of(base) if block.state == IN_USE)

    # -- set-up ---------------------------------------------------------------------------------------------------

    def request(self, size_bytes: int, place: Place) -> Request:
        """Prepare requests of a size at a place."""
        return Request(
            size_bytes, lambda small: self.pool(place.pool_id, small=small).free_set(place.stream), self.settings
        )

    def pool(self, pool_id: tuple[int, int], *, small: bool) -> Pool:
        """Return a pool, a new one when it is new."""
        found = self.pools.get((pool_id, small))
        if found is None:
            found = self.pools[pool_id, small] = Pool(pool_id=pool_id, small=small)
        return found

    def adopt(self, layout: list[SegmentLayout], places: list[Place]) -> dict[int, Block]:
        """Take over segments that are already there; return their used blocks by owner."""
        owned: dict[int, Block] = {}
        for segment in sorted(layout, key=lambda one: one.address):
            place = places[segment.place]
            free_set = self.pool(place.pool_id, small=segment.small).free_set(place.stream)
            if segment.expandable:
                self._has_expandable = self._choosy = True
                first = expandable.adopt_range(self, segment, free_set)
            else:
                first = Block(segment.address, segment.size_bytes, free_set, FREE)
                self.segments[segment.address] = first
            self.reserved += segment.size_bytes
            self._top = max(self._top, round_up(segment.address + segment.size_bytes, ROUND_LARGE_BYTES))
            owned.update(self._fill(segment, first))
        self.peak_reserved = self.reserved
        self.peak_allocated, self.peak_active = self.allocated, self.active
        self._low_peak = self.active
        return owned

    def _fill(self, segment: SegmentLayout, first: Block) -> dict[int, Block]:
        """Cut the blocks in use out of the free stretch ``first``."""
        owned: dict[int, Block] = {}
        rest: Block | None = first
        for used in segment.blocks:
            assert rest is not None
            if used.address > rest.address:
                before, rest = rest, self._cut(rest, used.address - rest.address)
                before.free_set.insert(before)
            block = rest
            rest = self._cut(block, used.size_bytes) if used.size_bytes < block.size else None
            block.state, block.requested, block.owner = IN_USE, used.requested_bytes, used.owner
            self.active += block.size
            owned[used.owner] = block
            if used.awaiting:
                self.request_free(block)
        if rest is not None:
            rest.free_set.insert(rest)
        return owned

    def _cut(self, block: Block, size: int) -> Block:
        """Shorten a block to ``size``; return the new block of the rest, which is in no set yet."""
        rest = Block(block.address + size, block.size - size, block.free_set, FREE, block.expandable)
        block.size = size
        rest.insert_after(block)
        return rest

    def _next_address(self, size: int) -> int:
        address = self._top
        self._top = round_up(address + size, ROUND_LARGE_BYTES)
        if self._top >> ADDRESS_BITS:
            raise InputError(_("no address can be written for what is asked of the allocator"))
        return address

    # -- allocate -------------------------------------------------------------------------------------------------

    def malloc(self, request: Request) -> Block | None:
        """Serve a request; ``None`` when memory has run out.

        Source: pytorch@2.11:c10/cuda/CUDACachingAllocator.cpp:malloc, get_free_block, should_split, alloc_found_block.
        """
        keys, blocks, size = request.keys, request.blocks, request.rounded
        index = bisect_left(keys, request.bound)
        if self._choosy:
            if self.gc_threshold:
                request.pool.num_calls += 1
            if self._has_expandable and index < len(keys):
                index = self._search(request, index)
        if index < len(keys) and keys[index] < request.limit:
            block = blocks[index]
        else:
            acquired, index = self._acquire(request), -1
            if acquired is None:
                return None
            block = acquired
        if self._alignment and size >= ROUND_LARGE_BYTES:
            block, index = self._aligned(block, index, size), -1
        block.state, block.requested = IN_USE, request.requested
        rest_size = block.size - size
        if rest_size >= request.min_rest:
            spare = request.spare
            rest = spare.pop() if spare else Block(0, 0, request.free_set, FREE)
            block.size, rest.size = size, rest_size
            rest.address = address = block.address + size
            rest.key = key = rest_size << ADDRESS_BITS | address
            rest.prev, rest.next = block, block.next
            following = block.next
            if following is not None:
                following.prev = rest
            block.next = rest
            if self._choosy:  # else a block is like all others of its set
                rest.expandable, rest.gc_base = block.expandable, request.pool.num_calls
            if index < 0 or (index > 0 and keys[index - 1] > key):
                if index > 0:
                    del keys[index], blocks[index]
                index = bisect_left(keys, key)
                keys.insert(index, key)
                blocks.insert(index, rest)
            else:  # the rest takes the place in the order
                keys[index], blocks[index] = key, rest
        else:
            size += rest_size
            if index >= 0:
                del keys[index], blocks[index]
        self.active = active = self.active + size
        if active > self._low_peak:
            self._rise()
        return block

    def _rise(self) -> None:
        """Note new peaks; ``_low_peak`` is what the active bytes must pass for one of them to change."""
        self.peak_active = max(self.peak_active, self.active)
        self.peak_allocated = max(self.peak_allocated, self.active - self.awaiting)
        self._low_peak = min(self.peak_active, self.peak_allocated + self.awaiting)

    def _aligned(self, block: Block, index: int, size: int) -> Block:
        """Leave the front of an expandable block free, so that a large block begins at a multiple of the alignment.

        Source: Ascend/pytorch@2.8:torch_npu/csrc/core/npu/NPUCachingAllocator.cpp:malloc (base_addr_aligned_kb).
        """
        if index >= 0:
            block.free_set.remove(block)
        offset = -block.address % self._alignment
        if not offset or offset + size > block.size:
            return block
        aligned = self._cut(block, offset)
        block.free_set.insert(block)
        return aligned

    def _search(self, request: Request, index: int) -> int:
        """Return the index of the block to use, from the first fit on, where blocks are expandable; past the end: none.

        Source: as :meth:`malloc`, get_free_block.
        """
        growing = self.settings.expandable_segments
        following = request.blocks[index].next
        if not growing or (following is not None and following.state == UNMAPPED):
            return expandable.best_fit(request.free_set, index, growing=growing)
        return index

    def _acquire(self, request: Request) -> Block | None:
        """Get memory from the driver, giving other memory back where that is needed.

        Source: pytorch@2.11:c10/cuda/CUDACachingAllocator.cpp:malloc; throw_on_cudamalloc_oom: pytorch@2.13. The free
        blocks are not searched again after a release, as there.
        """
        if self.gc_threshold:
            release.garbage_collect(self)
        over_cap = self.cap is not None and self.reserved + request.segment > self.cap
        if over_cap and self.settings.throw_on_cudamalloc_oom:
            self.counters.num_rejections += 1
            return None
        block = self._alloc_block(request)
        if block is None and release.release_available_cached_blocks(self, request):
            block = self._alloc_block(request)
        if block is None:
            release.release_cached_blocks(self)
            self.counters.num_retries += 1
            block = self._alloc_block(request)
        return block

    def _alloc_block(self, request: Request) -> Block | None:
        """Ask the driver once (source: as :meth:`_acquire`, alloc_block)."""
        if self.cap is not None and self.reserved + request.segment > self.cap:
            return None
        if self.settings.expandable_segments:
            return expandable.allocate(self, request.free_set, request.rounded)
        if not self.take(request.segment):
            return None
        self.counters.num_segments_allocated += 1
        address = self.addresses(request.segment)
        block = Block(address, request.segment, request.free_set, IN_USE)
        self.segments[address] = block
        if self.on_driver is not None:
            self.on_driver(SEGMENT_ALLOC, address, request.segment, request.free_set)
        return block

    def take(self, size: int) -> bool:
        """Take memory from the driver, if it has that much."""
        if self.capacity is not None and self.reserved + size > self.capacity:
            return False
        self.reserved += size
        if self.reserved > self.peak_reserved:
            self.peak_reserved = self.reserved
            if self.on_growth is not None:
                self.on_growth()
        return True

    # -- free -----------------------------------------------------------------------------------------------------

    def request_free(self, block: Block) -> None:
        """Give a block back that another stream still uses: it stays as it is until the event of that stream."""
        self.awaiting += block.size
        self._low_peak = min(self.peak_active, self.peak_allocated + self.awaiting)
        block.state = AWAITING
        self.waiting[block.address] = block

    def complete_free(self, block: Block) -> None:
        """Free such a block; nothing happens when a synchronisation has already done so."""
        if self.waiting.get(block.address) is block and block.state == AWAITING:
            del self.waiting[block.address]
            self.awaiting -= block.size
            self._low_peak = min(self.peak_active, self.peak_allocated + self.awaiting)
            self.free(block)

    def synchronise(self) -> None:
        """Wait for the events of all streams (source: synchronize_and_free_events)."""
        self.counters.num_synchronisations += 1
        for block in list(self.waiting.values()):
            self.complete_free(block)

    def free(self, block: Block) -> None:
        """Give a block back that no stream uses: merge it with its free neighbours and put it among the free ones.

        Source: pytorch@2.11:c10/cuda/CUDACachingAllocator.cpp:free_block, try_merge_blocks.
        """
        size = block.size
        self.active -= size
        free_set, index = block.free_set, -1
        keys, blocks = free_set.keys, free_set.blocks
        before, after = block.prev, block.next
        if after is not None and after.state == FREE:
            index = bisect_left(keys, after.key)
            size += after.size
            block.next = following = after.next
            if following is not None:
                following.prev = block
            free_set.spare.append(after)
        if before is not None and before.state == FREE:
            if index >= 0:
                del keys[index], blocks[index]
            index = bisect_left(keys, before.key)
            size += before.size
            before.next = following = block.next
            if following is not None:
                following.prev = before
            block.state = FREE
            free_set.spare.append(block)
            block = before
        block.state, block.size = FREE, size
        if self._choosy:
            block.gc_base = free_set.pool.num_calls
        block.key = key = size << ADDRESS_BITS | block.address
        if index < 0 or (index + 1 < len(keys) and keys[index + 1] < key):
            if index >= 0:
                del keys[index], blocks[index]
            index = bisect_left(keys, key)
            keys.insert(index, key)
            blocks.insert(index, block)
        else:  # it keeps the place of a part of it
            keys[index], blocks[index] = key, block

    def empty_cache(self) -> None:
        """Give the free segments back to the driver."""
        release.release_cached_blocks(self)

    def blocks_of(self, base: int) -> list[Block]:
        """Return the blocks of a segment in order."""
        found, block = [], self.segments.get(base)
        while block is not None:
            found.append(block)
            block = block.next
        return found

    def mapped_ranges(self) -> list[list[Block]]:
        """Return the blocks of each segment, an expandable one split into its mapped ranges, as snapshots have them."""
        ranges: list[list[Block]] = []
        for base in sorted(self.segments):
            current: list[Block] = []
            for block in self.blocks_of(base):
                if block.state == UNMAPPED:
                    if current:
                        ranges.append(current)
                    current = []
                else:
                    current.append(block)
            if current:
                ranges.append(current)
        return ranges
