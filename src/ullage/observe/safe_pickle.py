"""Read a pickle of plain values (dicts, lists, tuples, strings, numbers) and of nothing else, however large.

The opcodes are carried out here, without Python's own unpickler: there is no way to import, call or set anything,
because nothing here does. Opcodes that ask for it are refused by name, so are lengths beyond the end of the file,
tuples that hold more than plain values (nested ones would be hashed recursively), and more values alive at once than
the limits allow. The file passes through in windows; lists may hand their items on as they come (:class:`Sink`), so
that neither the file nor what was made of it need be in memory at once.

Opcodes: cpython@3.14:Lib/pickletools.py; protocols 0 to 5.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, Protocol

from ullage import garbage
from ullage.errors import InputError
from ullage.i18n import _
from ullage.observe.pickle_limits import (
    MAX_DIGITS,
    MAX_INTEGER_BYTES,
    MAX_PROTOCOL,
    MAX_TEXT_BYTES,
    MISSING,
    PLAIN_TYPES,
    Limits,
)
from ullage.observe.pickle_opcodes import (
    APPENDS,
    BINGET,
    BININT1,
    COUNTED,
    LONG_BINGET,
    MEMOIZE,
    REFUSED,
    SETITEMS,
    STOP,
    from_line,
)
from ullage.observe.pickle_window import WINDOW_BYTES, Window
from ullage.read.jsonfile import missing
from ullage.units import format_bytes


class Sink(list[Any]):
    """A list that does not keep its items."""

    def take(self, items: list[Any], reader: PlainReader) -> None:
        """Take items as they come, complete."""
        raise NotImplementedError

    def fast(self, reader: PlainReader) -> bool:
        """Take items right out of the bytes at the reader's position, if it can; tell whether it took any."""
        return False


class Finder(Protocol):
    """Says which lists are sinks."""

    def sink(self, reader: PlainReader) -> list[Any] | None:
        """Return the list to be used in the place of the empty one that is about to be pushed."""

    def forgotten(self, reader: PlainReader) -> Callable[[int], Any]:
        """Return what reads the numbers that are no longer in the memo."""


class PlainReader:
    """The stack machine of the pickle language, as far as plain values need it.

    Attributes:
        memo: number -> value; what a sink has taken is no longer there, ``forgotten`` may still know it.
        num_memoized: numbers given so far.
        forgotten: called with a number that is not in the memo.
    """

    def __init__(
        self,
        file: BinaryIO,
        size_bytes: int,
        *,
        limits: Limits | None = None,
        finder: Finder | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.window = Window(file, size_bytes, progress)
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.num_memoized = self.num_opcodes = self.num_containers = 0
        self.forgotten = self._never_written if finder is None else finder.forgotten(self)
        self.sink_mark = -1
        self._finder = finder
        self._slow = _table(self)

    def read(self) -> Any:
        """Return the value.

        Raises:
            InputError: the pickle is broken, too large, or holds anything but plain values.
        """
        try:
            with garbage.paused():
                self._run()
            self._check_limits()
            if len(self.stack) != 1 or self.marks:
                self.refuse(_("the end does not hold one value"))
            return self.stack[0]
        except IndexError:
            raise InputError(_("the pickle ends in the middle of a value")) from None
        except (ValueError, TypeError, AttributeError, UnicodeError, OverflowError) as error:
            what = " ".join(str(error).split())[:120] or type(error).__name__
            raise InputError(_("not a pickle of plain values: {what}").format(what=what)) from None

    def _run(self) -> None:
        """Carry out the opcodes up to STOP: the frequent ones here, the others by the table."""
        window, stack, memo, slow = self.window, self.stack, self.memo, self._slow
        data, position, soft = window.data, window.position, window.soft_end
        get, push, count = memo.get, stack.append, 0
        while True:
            if position >= soft:
                window.position, self.num_opcodes, count = position, self.num_opcodes + count, 0
                self._check_limits()
                window.refill()
                data, position, soft = window.data, window.position, window.soft_end
            opcode = data[position]
            count += 1
            if opcode == BINGET:
                value = get(data[position + 1], MISSING)
                push(value if value is not MISSING else self.forgotten(data[position + 1]))
                position += 2
            elif opcode == LONG_BINGET:
                number = int.from_bytes(data[position + 1 : position + 5], "little")
                value = get(number, MISSING)
                push(value if value is not MISSING else self.forgotten(number))
                position += 5
            elif opcode == MEMOIZE:
                memo[self.num_memoized] = stack[-1]
                self.num_memoized += 1
                position += 1
            elif opcode == BININT1:
                push(data[position + 1])
                position += 2
            elif opcode == STOP:
                self.num_opcodes += count
                return
            else:
                window.position = position
                slow[opcode](opcode)
                data, position, soft = window.data, window.position, window.soft_end

    def _check_limits(self) -> None:
        for count, most, what in (
            (self.num_opcodes, self.limits.opcodes, _("{count} values at once")),
            (self.num_containers, self.limits.containers, _("{count} lists and dicts at once")),
        ):
            if count > most:
                too_large(what.format(count=count))

    def taken(self) -> None:
        """Note that all up to here was taken by a sink."""
        self.num_opcodes = self.num_containers = 0

    def refuse(self, what: str) -> NoReturn:
        """Refuse the file at this place."""
        raise InputError(_("{what}, at byte {position}").format(what=what, position=self.window.absolute()))

    def _never_written(self, number: int) -> Any:
        self.refuse(_("memo number {number} was never written").format(number=number))

    # -- opcodes ----------------------------------------------------------------------------------------------------

    def _container(self, value: Any, *, skip: int = 1) -> None:
        self.num_containers += 1
        self.stack.append(value)
        self.window.position += skip

    def _empty_dict(self, _opcode: int) -> None:
        marks = self.marks
        if marks and marks[-1] == self.sink_mark:
            sink = self.stack[self.sink_mark - 1]
            if isinstance(sink, Sink):
                self._drain(sink)
                if sink.fast(self):
                    return
        self._container({})

    def _drain(self, sink: Sink) -> None:
        """Hand on what is complete: all that lies above the mark."""
        mark = self.sink_mark
        if len(self.stack) > mark:
            items = self.stack[mark:]
            del self.stack[mark:]
            sink.take(items, self)

    def _empty_list(self, _opcode: int) -> None:
        found = None
        if self._finder is not None and len(self.marks) <= 2:
            found = self._finder.sink(self)
        self._container([] if found is None else found)

    def _mark(self, _opcode: int) -> None:
        stack = self.stack
        if stack and isinstance(stack[-1], Sink):
            self.sink_mark = len(stack)
        self.marks.append(len(stack))
        self.window.position += 1

    def _items(self) -> list[Any]:
        """Take what lies above the last mark."""
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def _append(self, opcode: int) -> None:
        items = self._items() if opcode == APPENDS else [self._pop()]
        target = self.stack[-1]
        if isinstance(target, Sink):
            if items:
                target.take(items, self)
        elif isinstance(target, list):
            target.extend(items)
        else:
            self.refuse(_("an item of what is no list"))
        self.window.position += 1

    def _pop(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            self.refuse(_("a value is missing"))
        return self.stack.pop()

    def _set(self, opcode: int) -> None:
        items = self._items() if opcode == SETITEMS else [self._pop(), self._pop()][::-1]
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            self.refuse(_("items of what is no dict"))
        self._fill(target, items)
        self.window.position += 1

    def _fill(self, target: dict[Any, Any], items: list[Any]) -> None:
        for key in items[::2]:
            if type(key) not in PLAIN_TYPES and type(key) is not tuple:
                self.refuse(_("a key that is not plain"))
        target.update(zip(items[::2], items[1::2], strict=True))

    def _list(self, _opcode: int) -> None:
        self._container(self._items())

    def _dict(self, _opcode: int) -> None:
        items = self._items()
        if len(items) % 2:
            self.refuse(_("items of what is no dict"))
        target: dict[Any, Any] = {}
        self._fill(target, items)
        self._container(target)

    def _tuple(self, opcode: int) -> None:
        """Build tuples of plain values only: a tuple of tuples of tuples ... would be hashed recursively as a key."""
        num_items = {0x29: 0, 0x85: 1, 0x86: 2, 0x87: 3}.get(opcode)
        items = self._items() if num_items is None else [self._pop() for _at in range(num_items)][::-1]
        if not all(type(item) in PLAIN_TYPES for item in items):
            self.refuse(_("a tuple that holds more than plain values"))
        self._container(tuple(items))

    def _constant(self, opcode: int) -> None:
        self.stack.append({0x4E: None, 0x88: True, 0x89: False}[opcode])
        self.window.position += 1

    def _fixed(self, opcode: int) -> None:
        self.stack.append(self.window.fixed(opcode))

    def _long(self, opcode: int) -> None:
        length = self.window.number(1 if opcode == 0x8A else 4)
        if length > MAX_INTEGER_BYTES:
            self.refuse(_("an integer of {count} bytes").format(count=length))
        self.stack.append(int.from_bytes(self.window.take(length), "little", signed=True))

    def _counted(self, opcode: int) -> None:
        width, is_text = COUNTED[opcode]
        length = self.window.number(width)
        if length > self.window.left():
            self.refuse(_("{size} are declared, more than is left of the file").format(size=format_bytes(length)))
        if length > MAX_TEXT_BYTES:
            too_large(_("{size} of one text").format(size=format_bytes(length)))
        raw = self.window.take(length)
        self.num_opcodes += length // 16
        self.stack.append(str(raw, "utf-8", "surrogatepass") if is_text else raw)

    def _line(self, opcode: int) -> None:
        text = self.window.line()
        if opcode != 0x53 and opcode != 0x56 and len(text) > MAX_DIGITS:
            self.refuse(_("a number of {count} digits").format(count=len(text)))
        self.stack.append(from_line(opcode, text))

    def _get_line(self, _opcode: int) -> None:
        number = self._memo_line()
        value = self.memo.get(number, MISSING)
        self.stack.append(value if value is not MISSING else self.forgotten(number))

    def _memo_line(self) -> int:
        text = self.window.line()
        return int(text) if text.isdigit() and len(text) < MAX_DIGITS else 2**64

    def _put(self, opcode: int) -> None:
        """Keep a value under a number. A number far above what is kept is refused: picklers count."""
        number = self._memo_line() if opcode == 0x70 else self.window.number(1 if opcode == 0x71 else 4)
        if number > 2 * self.num_memoized + 1024:
            self.refuse(_("memo index {index} after {count} entries").format(index=number, count=self.num_memoized))
        self.num_memoized += number not in self.memo
        self.memo[number] = self.stack[-1]

    def _protocol(self, _opcode: int) -> None:
        version = self.window.number(1)
        if version > MAX_PROTOCOL:
            self.refuse(_("protocol {version} is not known").format(version=version))

    def _frame(self, _opcode: int) -> None:
        if self.window.number(8) > self.window.left():  # framing changes neither the stack nor what comes next
            self.refuse(_("a frame that is longer than the file"))

    def _refused(self, opcode: int) -> None:
        name = REFUSED.get(bytes((opcode,)))
        self.refuse(
            _("opcode {name} can run code or hides values").format(name=name)
            if name
            else _("byte {byte:#04x} is no opcode").format(byte=opcode)
        )


def _table(reader: PlainReader) -> list[Callable[[int], None]]:
    """Return what to call for each byte."""
    table: list[Callable[[int], None]] = [reader._refused] * 256
    for opcodes, method in (
        (b"}", reader._empty_dict), (b"]", reader._empty_list), (b"(", reader._mark), (b"ae", reader._append),
        (b"su", reader._set), (b"l", reader._list), (b"d", reader._dict), (b")t\x85\x86\x87", reader._tuple),
        (b"N\x88\x89", reader._constant), (b"MJG", reader._fixed), (b"\x8a\x8b", reader._long),
        (bytes(COUNTED), reader._counted), (b"IFLVS", reader._line), (b"g", reader._get_line),
        (b"pqr", reader._put), (b"\x80", reader._protocol), (b"\x95", reader._frame),
    ):  # fmt: skip
        for opcode in opcodes:
            table[opcode] = method
    return table


def too_large(what: str) -> NoReturn:
    """Refuse what is above a limit."""
    raise InputError(_("{what} are more than the limit").format(what=what))


def loads(data: bytes, *, limits: Limits | None = None) -> Any:
    """Return the plain values in a pickle.

    Raises:
        InputError: the pickle is broken, too large, or holds anything but plain values.
    """
    limits = limits or Limits()
    if len(data) > limits.file_bytes:
        too_large(format_bytes(len(data)))
    return PlainReader(io.BytesIO(data), len(data), limits=limits).read()


def load(
    path: Path,
    *,
    limits: Limits | None = None,
    finder: Finder | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """Return the plain values in a pickle file.

    Args:
        path: the file.
        limits: what it may ask for.
        finder: says which lists hand their items on.
        progress: called with the bytes read and those there are.

    Raises:
        InputError: the file cannot be read, or as :func:`loads`, with the file named.
    """
    limits = limits or Limits()
    try:
        if not path.is_file():
            raise missing(path)
        size = path.stat().st_size
        if size > limits.file_bytes:
            raise InputError(
                _("{size} are more than the {limit} that are read").format(
                    size=format_bytes(size), limit=format_bytes(limits.file_bytes)
                ),
                where=str(path),
            )
        with path.open("rb", buffering=0 if size > WINDOW_BYTES else -1) as file:
            return PlainReader(file, size, limits=limits, finder=finder, progress=progress).read()
    except OSError as error:
        raise InputError(_("cannot be read: {why}").format(why=error.strerror or error), where=str(path)) from None
    except InputError as error:
        if error.where == str(path):
            raise
        where = f"{path}: {error.where}" if error.where else str(path)
        remedy = _("expected is a memory snapshot of torch.cuda.memory._dump_snapshot")
        raise InputError(error.what, where=where, remedy=remedy) from None
