"""The lists of a snapshot that hand their items on while the file is read: the traces, and what is not looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ullage.allocator.events import Recording
from ullage.errors import InputError
from ullage.i18n import _
from ullage.observe.event_lane import NOTHING, EventLane, LaneMemo, StackNumber
from ullage.observe.safe_pickle import PlainReader, Sink

MAX_DEVICES = 1024
TRACES = "device_traces"
#: Lists that may be as long as the traces and are not looked at.
LEFT_OUT = ("host_traces", "external_annotations")


class Taker(Protocol):
    """What becomes of the events."""

    def recording(self, device: int) -> Recording:
        """Return where the events of a device go."""

    def events(self, device: int, items: list[Any]) -> list[int]:
        """Take events that were read value by value; return the numbers of their stacks."""

    def stack_of(self, frames: Sequence[Any]) -> int:
        """Return the number of a stack, -1 where something in it is no frame."""


class Traces(list[Any]):
    """The list with one trace per device."""


class EventSink(Sink):
    """The trace of one device: reads its events and keeps none of them."""

    def __init__(self, device: int, taker: Taker, memo: LaneMemo, num_memoized: int) -> None:
        super().__init__()
        self.device, self._taker, self._memo = device, taker, memo
        self._lane: EventLane | None = None
        self._num_slow, self._last = 0, num_memoized

    @property
    def num_events(self) -> int:
        """Return the entries taken so far."""
        return self._num_slow + (self._lane.num_events if self._lane is not None else 0)

    def take(self, items: list[Any], reader: PlainReader) -> None:
        """Take events that were read value by value, and learn what they look like."""
        if self._lane is None:
            self._lane = EventLane(self._taker.recording(self.device), self._memo, self._taker.stack_of)
        if len({id(item) for item in items}) < len(items):
            raise InputError(_("an entry of {name} stands twice in the file").format(name=TRACES))
        stacks = self._taker.events(self.device, items)
        self._num_slow += len(items)
        self._lane.learn(items[-1], reader)
        self._forget(items, stacks, reader)
        reader.taken()

    def fast(self, reader: PlainReader) -> bool:
        """Take events by their shape."""
        found = self._lane is not None and self._lane.run(reader)
        self._last = reader.num_memoized
        if found:
            reader.taken()
        return found

    def _forget(self, items: list[Any], stacks: list[int], reader: PlainReader) -> None:
        """Take the events and what is in them out of the memo; keep what a number still may be read for."""
        known = _known(items, self._memo)
        known.update((id(item.get("frames")), stack + 1) for item, stack in zip(items, stacks, strict=True))
        _forget(known, self._memo, reader, self._last)
        self._last = reader.num_memoized


class Discard(Sink):
    """A list whose items nobody looks at."""

    def __init__(self, memo: LaneMemo, num_memoized: int) -> None:
        super().__init__()
        self._memo, self._last = memo, num_memoized

    def take(self, items: list[Any], reader: PlainReader) -> None:
        """Let them go, with the lists in them."""
        known = _known([item for item in items if isinstance(item, dict)], self._memo)
        _forget(known, self._memo, reader, self._last)
        self._last = reader.num_memoized
        reader.taken()


def _known(items: list[Any], memo: LaneMemo) -> dict[int, int]:
    """Return, by their id, what is left of dicts and of the values in them when they are gone."""
    known: dict[int, int] = {}
    for item in items:
        known[id(item)] = NOTHING
        for value in item.values():
            if type(value) in (str, tuple):
                known[id(value)] = memo.other(value)
            elif type(value) is list:
                known[id(value)] = NOTHING
    return known


def _forget(known: dict[int, int], memo: LaneMemo, reader: PlainReader, first: int) -> None:
    """Take what is known out of the reader's memo."""
    memo.catch_up(reader.num_memoized)
    for number in range(first, reader.num_memoized):
        value = reader.memo.get(number)
        if value is not None and id(value) in known:
            memo.codes[number] = known[id(value)]
            del reader.memo[number]


class StreamFinder:
    """Finds these lists by the key they stand under at the top of the file."""

    def __init__(self, taker: Taker) -> None:
        self._taker, self._memo = taker, LaneMemo()
        self._traces: Traces | None = None

    def sink(self, reader: PlainReader) -> list[Any] | None:
        """Return the sink to be used for the empty list that is about to be pushed."""
        stack, marks = reader.stack, reader.marks
        if not stack:
            return None
        under_mark = bool(marks) and marks[-1] == len(stack)
        below: Any = stack[marks[-1] - 1] if marks and marks[-1] > 0 else None
        traces: Traces | None = self._traces
        if traces is not None and (stack[-1] is traces or below is traces):
            device = len(traces) + (0 if stack[-1] is traces else len(stack) - marks[-1])
            if device >= MAX_DEVICES:
                raise InputError(_("more than {count} devices").format(count=MAX_DEVICES))
            return EventSink(device, self._taker, self._memo, reader.num_memoized)
        key = stack[-1] if not under_mark else None
        if type(key) is not str or not _is_key(stack, marks):
            return None
        if key == TRACES and self._traces is None:
            self._traces = Traces()
            return self._traces
        return Discard(self._memo, reader.num_memoized) if key in LEFT_OUT else None

    def forgotten(self, reader: PlainReader) -> Callable[[int], Any]:
        """Return what reads the numbers that are no longer in the memo."""

        def read(number: int) -> Any:
            codes = self._memo.codes
            code = codes[number] if number < len(codes) else NOTHING
            if code == NOTHING:
                reader.refuse(_("memo number {number} is not there").format(number=number))
            return StackNumber(code - 1) if code > 0 else self._memo.others[-code - 1]

        return read


def _is_key(stack: list[Any], marks: list[int]) -> bool:
    """Tell whether the last value is a key of the dict at the bottom."""
    if type(stack[0]) is not dict or marks not in ([], [1]):
        return False
    return len(stack) % 2 == 0
