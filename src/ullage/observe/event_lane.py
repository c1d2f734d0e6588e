"""The events of a snapshot read right out of the bytes, many times faster than value by value.

Python's pickler writes every event of a trace alike: the same keys in the same order, each by the number under which
the memo has it, numbers in their shortest form, and last the frames of the stack, again by number. After the first
event was read value by value, its *shape* is known as a regular expression; every event that has the shape is read by
it, and every other one value by value as before. What is in the memo is tracked either way.

Source: cpython@3.14:Modules/_pickle.c:save_dict, batch_dict, save_list, save_long, memo_put (protocols 4 and 5).
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from ullage.allocator.events import ACTIONS, DEFAULT_POOL, OOM, Recording
from ullage.allocator.stacks import NO_STACK
from ullage.observe.pickle_opcodes import BININT1, EMPTY_LIST
from ullage.observe.safe_pickle import PlainReader

INTEGER = rb"(K.|M..|J.{4}|\x8a(?:\x08.{8}|\x07.{7}|\x06.{6}|\x05.{5}|\x09.{9}))"
REFERENCE = rb"h.|j.{4}"
#: A text by number, or written out and kept under the next number.
TEXT = rb"(" + REFERENCE + rb"|N|\x8c(?:\x00" + b"".join(rb"|\x%02x.{%d}" % (n, n) for n in range(1, 33)) + rb")\x94)"
PAIR = rb"(" + REFERENCE + rb"|K.K.\x86\x94)"
#: What the value of a key looks like; ``frames`` is last and has a form of its own.
VALUES = {
    "action": rb"(" + REFERENCE + rb")", "addr": INTEGER, "device_free": INTEGER, "size": INTEGER, "stream": INTEGER,
    "time_us": INTEGER, "device": INTEGER, "pool_id": PAIR, "compile_context": TEXT, "user_metadata": TEXT,
}  # fmt: skip
#: An empty stack, one by number, one of one frame, the beginning of a longer one.
FRAMES = rb"(\]\x94u|(?:" + REFERENCE + rb")u|\]\x94(?:" + REFERENCE + rb")au|\]\x94\()"
REFERENCES = re.compile(REFERENCE, re.DOTALL)
ONLY_REFERENCES = re.compile(rb"(?:" + REFERENCE + rb")+", re.DOTALL)
NEEDED = {"action", "size", "stream"}
WITH_MEMO = {"pool_id", "compile_context", "user_metadata"}
MAX_SHAPES = 16
#: Kept of what was met before, for speed; forgotten when it grows above this.
MAX_CACHED = 200_000
#: Places of ``eu`` that are tried as the end of a stack.
MAX_ENDS = 4
#: What the memo of the lane says of a number: nothing that may be read again.
NOTHING = 0
CODES: dict[Any, int] = {name: code for code, name in enumerate(ACTIONS)}
OPEN_STACK, MEMOIZED, LONG1 = b"]\x94(", b"\x94", 0x8A


class Shape:
    """How one kind of events is written, and which groups of the expression are what.

    Attributes:
        order: the groups of action, address, size, stream, time, pool and frames; 0, all of it, where there is none.
        memoized: the groups that may be written out, in the order of the file.
        pool_only: whether the pool is the only one.
        kind_of: the bytes of an action -> its kind.
    """

    __slots__ = ("kind_of", "match", "memoized", "order", "pool_only")

    def __init__(self, fields: tuple[str, ...], pattern: bytes) -> None:
        at = {name: index for index, name in enumerate(fields, 1)}
        self.match = re.compile(pattern, re.DOTALL).match
        address = at.get("addr", at.get("device_free", 0))
        rest = (at.get("time_us", 0), at.get("pool_id", 0), len(fields) + 1)
        self.order = (at["action"], address, at["size"], at["stream"], *rest)
        self.memoized = tuple(at[name] for name in fields if name in WITH_MEMO)
        self.pool_only = self.memoized == (at.get("pool_id"),)
        self.kind_of: dict[bytes, int] = {}


class LaneMemo:
    """What the lane has passed by and some later value may read by its number: stacks, texts, pairs."""

    def __init__(self) -> None:
        self.codes = array("i")  # by number: NOTHING, a stack + 1, or -(other + 1)
        self.others: list[Any] = []
        self._other_numbers: dict[Any, int] = {}

    def catch_up(self, num_memoized: int) -> None:
        """Know of the numbers that were given elsewhere."""
        missing = num_memoized - len(self.codes)
        if missing > 0:
            self.codes.frombytes(bytes(self.codes.itemsize * missing))

    def other(self, value: Any) -> int:
        """Return the code of a text or pair."""
        found = self._other_numbers.get(value)
        if found is None:
            found = self._other_numbers[value] = len(self.others)
            self.others.append(value)
        return -found - 1


class StackNumber:
    """A stack that was interned, in the place of its list."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


class EventLane:
    """Reads the events of one device.

    Args:
        recording: where they go.
        memo: what was passed by, of all lanes of a file.
        stack_of: gives the number of a stack from the frames that the memo has; -1 where something is no frame.
    """

    def __init__(self, recording: Recording, memo: LaneMemo, stack_of: Callable[[Sequence[Any]], int]) -> None:
        self.recording, self.memo = recording, memo
        self.num_events = 0
        self._stack_of = stack_of
        self._shapes: list[Shape] = []
        self._known: set[tuple[str, ...]] = set()
        self._integers: dict[bytes, int] = {}
        self._places: dict[tuple[bytes, bytes], int] = {}
        self._stacks: dict[bytes, int] = {}
        self._written: dict[bytes, int] = {}  # texts and pairs written out -> what the memo says of them

    def learn(self, event: dict[Any, Any], reader: PlainReader) -> None:
        """Make a shape of an event that was read value by value, if all its keys are known."""
        names = tuple(event)
        if names in self._known or len(self._known) >= MAX_SHAPES:
            return
        self._known.add(names)
        has_frames = names[-1:] == ("frames",)
        fields = names[:-1] if has_frames else names
        if NEEDED - set(fields) or set(fields) - VALUES.keys() or not {"addr", "device_free"} & set(fields):
            return
        pattern = rb"\}\x94\("
        for name in names:
            numbers = [number for number, value in reader.memo.items() if type(value) is str and value == name]
            if not 0 < len(numbers) <= 4:
                return
            pattern += b"(?:" + b"|".join(re.escape(_reads(number)) for number in numbers) + b")"
            pattern += VALUES.get(name, b"") if name != "frames" else b""
        self._shapes.insert(0, Shape(fields, pattern + (FRAMES if has_frames else b"(u)")))

    def run(self, reader: PlainReader) -> bool:
        """Read events from the reader's position as long as they have a known shape; tell whether there was one."""
        self.memo.catch_up(reader.num_memoized)
        before = self.num_events
        while any(self._run_shape(shape, reader) for shape in self._shapes):
            pass
        reader.num_memoized = len(self.memo.codes)
        return self.num_events > before

    def _run_shape(self, shape: Shape, reader: PlainReader) -> bool:
        """Read events of one shape; written for speed, what is met for the first time goes to the methods below."""
        window, codes, match, order = reader.window, self.memo.codes, shape.match, shape.order
        data, position, soft = window.data, window.position, window.soft_end
        kinds, integers, places, stacks = shape.kind_of, self._integers, self._places, self._stacks
        written, append, before = self._written, self.recording.append, self.num_events
        pool_only, has_time, find = shape.pool_only, order[4] > 0, data.find
        while position < soft and (found := match(data, position)) is not None:
            action, address, size, stream, time, pool, frames = found.group(*order)
            length = len(codes)
            codes.append(NOTHING)  # the event itself
            if pool_only and pool in written:
                codes.append(written[pool])
            else:
                self._memoize(shape, found)
            end, stack = found.end(), -1
            if frames == OPEN_STACK:
                stop = find(b"eu", end)
                stack = stacks.get(data[end:stop], -1)
            if stack >= 0:
                end = stop + 2
            else:
                stack, end = self._stack(frames, data, end, reader)
            kind, where, amount = kinds.get(action, -1), integers.get(address, -1), integers.get(size, -1)
            place = places.get((stream, pool) if order[5] else (stream, b""), -1)
            if kind < 0 or where < 0 or amount < 0 or place < 0:
                kind, where, amount, place = self._values(shape, (action, address, size, stream, pool), reader)
            time_us = int.from_bytes(time[2:], "little") if has_time and time[0] == LONG1 else _time(time, has_time)
            if min(kind, where, amount, place, time_us, stack) < 0:
                del codes[length:]
                break
            codes.append(stack + 1) if frames[0] == EMPTY_LIST else None
            append(kind, where, amount, place, stack, time_us)
            position = end
            self.num_events += 1
        window.position = position
        return self.num_events > before

    def _memoize(self, shape: Shape, found: re.Match[bytes]) -> None:
        """Number the texts and pairs that an event writes out."""
        for at in shape.memoized:
            raw = found.group(at)
            if raw[-1:] == MEMOIZED:
                code = self._written.get(raw)
                if code is None:
                    code = self.memo.other(_written(raw))
                    if len(self._written) < MAX_CACHED:
                        self._written[raw] = code
                self.memo.codes.append(code)

    def _values(self, shape: Shape, fields: tuple[bytes, ...], reader: PlainReader) -> tuple[int, int, int, int]:
        """Return kind, address, bytes and place; -1 where the other way must judge."""
        action, address, size, stream, pool = fields
        kind = shape.kind_of.get(action, -1)
        if kind < 0:
            kind = CODES.get(self._resolve(action, reader), -1)
            if kind in (-1, OOM):  # those refused are few, and noted by the other way
                return -1, -1, -1, -1
            shape.kind_of[action] = kind
        key = (stream, pool if shape.order[5] else b"")
        place = self._places.get(key, -1)
        return kind, self._integer(address), self._integer(size), self._place(key, reader) if place < 0 else place

    def _integer(self, raw: bytes) -> int:
        value = self._integers.get(raw)
        if value is None:
            if len(self._integers) > MAX_CACHED:
                self._integers.clear()
            value = self._integers[raw] = _number(raw)
        return value

    def _place(self, key: tuple[bytes, bytes], reader: PlainReader) -> int:
        stream, pool = _number(key[0]), key[1]
        pair: Any = DEFAULT_POOL
        if pool:
            pair = _written(pool) if pool[-1:] == MEMOIZED else self._resolve(pool, reader)
        if stream < 0 or type(pair) is not tuple or len(pair) != 2 or not all(type(one) is int for one in pair):
            return -1
        if len(self._places) > MAX_CACHED:
            self._places.clear()
        place = self._places[key] = self.recording.known_places.index(stream, pair)
        return place

    def _resolve(self, raw: bytes, reader: PlainReader) -> Any:
        """Return what a reference reads, ``None`` where nothing may be read."""
        number = raw[1] if len(raw) == 2 else int.from_bytes(raw[1:5], "little")
        value = reader.memo.get(number)
        if value is None and number < len(self.memo.codes):
            code = self.memo.codes[number]
            return self.memo.others[-code - 1] if code < 0 else None
        return value

    def _stack(self, frames: bytes, data: bytes, end: int, reader: PlainReader) -> tuple[int, int]:
        """Return the number of a stack, -1 where the other way must judge, and where what follows begins."""
        if frames[0] != EMPTY_LIST:
            return (self._stack_again(frames[:-1], reader) if len(frames) > 1 else NO_STACK), end
        if frames != OPEN_STACK:  # none, or one frame
            return (self._new_stack(frames[2:-2], reader) if len(frames) > 3 else NO_STACK), end
        stop = data.find(b"eu", end)
        for _turn in range(MAX_ENDS):
            if stop < 0 or ONLY_REFERENCES.fullmatch(data, end, stop):
                break
            stop = data.find(b"eu", stop + 1)
        return (self._new_stack(data[end:stop], reader), stop + 2) if stop >= 0 else (-1, end)

    def _new_stack(self, raw: bytes, reader: PlainReader) -> int:
        number = self._stacks.get(raw, -1)
        if number >= 0 or not ONLY_REFERENCES.fullmatch(raw):
            return number
        number = self._stack_of([self._resolve(one, reader) for one in REFERENCES.findall(raw)])
        if number >= 0:
            if len(self._stacks) > MAX_CACHED:
                self._stacks.clear()
            self._stacks[raw] = number
        return number

    def _stack_again(self, raw: bytes, reader: PlainReader) -> int:
        """Return the number of a stack that stands earlier in the file."""
        number = raw[1] if len(raw) == 2 else int.from_bytes(raw[1:5], "little")
        codes = self.memo.codes
        if number >= len(codes):
            return -1
        if codes[number] <= 0:
            frames = reader.memo.get(number)
            stack = self._stack_of(frames) if type(frames) is list else -1
            if stack < 0:
                return -1
            codes[number] = stack + 1
        return codes[number] - 1


def _reads(number: int) -> bytes:
    """Return the opcode that reads a number of the memo."""
    return b"h" + bytes((number,)) if number < 256 else b"j" + number.to_bytes(4, "little")


def _number(raw: bytes) -> int:
    """Return what BININT1, BININT2, BININT or LONG1 stand for."""
    return int.from_bytes(raw[2:] if raw[0] == 0x8A else raw[1:], "little", signed=raw[0] in (0x8A, 0x4A))


def _time(raw: bytes, known: bool) -> int:
    return _number(raw) if known else 0


def _written(raw: bytes) -> str | tuple[int, int]:
    """Return a pair or a text that is written out."""
    return (raw[1], raw[3]) if raw[0] == BININT1 else raw[2:-1].decode("utf-8", "surrogatepass")
