"""Read a pickle of plain values (dicts, lists, tuples, strings, numbers) and of nothing else.

Two locks. First the bytes are walked, without building anything: an opcode that could import, call or set anything is
refused, so are declared lengths beyond the file, memo indices that would reserve memory, and more values than
the limits allow. Only then the values are built, by an unpickler whose every look-up of a name raises.

Opcodes: cpython@3.14:Lib/pickletools.py; protocols 0 to 5.
"""

from __future__ import annotations

import gc
import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ullage.errors import InputError
from ullage.i18n import _
from ullage.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a file may ask of this machine.

    A memory snapshot takes about 20 opcodes and 1.2 containers per event (kept recordings: 908,007 opcodes and 36,232
    containers for 19,342 events with stacks), so that the defaults leave room for millions of events.
    """

    file_bytes: int = 2**31
    opcodes: int = 200_000_000
    containers: int = 20_000_000


#: Longest decimal number (protocol 0) and longest binary integer: 64 bits and a sign need 20 digits, 9 bytes.
MAX_DIGITS, MAX_INTEGER_BYTES = 40, 9

#: Opcode byte -> name, for those that can run code or reach outside the file.
REFUSED = {
    b"c": "GLOBAL", b"\x93": "STACK_GLOBAL", b"i": "INST", b"o": "OBJ", b"R": "REDUCE", b"b": "BUILD",
    b"\x81": "NEWOBJ", b"\x92": "NEWOBJ_EX", b"\x82": "EXT1", b"\x83": "EXT2", b"\x84": "EXT4",
    b"P": "PERSID", b"Q": "BINPERSID", b"\x97": "NEXT_BUFFER", b"\x98": "READONLY_BUFFER",
    b"\x8f": "EMPTY_SET", b"\x90": "ADDITEMS", b"\x91": "FROZENSET", b"\x96": "BYTEARRAY8", b"2": "DUP",
    b"0": "POP", b"1": "POP_MARK",
}  # fmt: skip
#: Opcode -> bytes of its argument: values that are complete in themselves, and reading the memo.
PLAIN = {b"N": 0, b"\x88": 0, b"\x89": 0, b"K": 1, b"M": 2, b"J": 4, b"G": 8, b"h": 1, b"j": 4}
#: The same, of opcodes that build on what is there (MARK, items, PROTO).
STRUCTURE = {b"(": 0, b"a": 0, b"e": 0, b"s": 0, b"u": 0, b"\x80": 1}
CONTAINERS = b"}]ld"  # EMPTY_DICT, EMPTY_LIST, LIST, DICT
LINES = b"IFLVSg"  # arguments that end with a newline
LINES_SET = {bytes((_opcode,)) for _opcode in LINES}
COUNTED = {b"\x8c": 1, b"X": 4, b"\x8d": 8, b"U": 1, b"T": 4, b"C": 1, b"B": 4, b"\x8e": 8, b"\x8a": 1, b"\x8b": 4}
TUPLES = {b")": 0, b"\x85": 1, b"\x86": 2, b"\x87": 3, b"t": -1}
MEMO = {b"\x94": 0, b"q": 1, b"r": 4, b"p": -1}  # MEMOIZE, BINPUT, LONG_BINPUT, PUT
MARK, STOP, FRAME = b"(.\x95"
#: Values between the last opcode that built something and a tuple: a dict of a segment has about 30.
MAX_RUN_BYTES = 65_536

_STEP = [0] * 256  # 1 to 15: structure, skip that many; 17 to 31: a plain value; 0: look closer
for _symbol, _argument in STRUCTURE.items():
    _STEP[_symbol[0]] = 1 + _argument
for _symbol, _argument in PLAIN.items():
    _STEP[_symbol[0]] = 17 + _argument


class _Walk:
    """The walk over the opcodes of one file: where it is, and what it has counted.

    Attributes:
        run: where the values begin that were pushed since something was built.
        memo: memo indices that are taken; ``texts`` those that hold a string or a number.
        pushed: where the last string or number of variable length ended.
    """

    __slots__ = ("containers", "data", "limits", "memo", "opcodes", "position", "pushed", "run", "texts")

    def __init__(self, data: bytes, limits: Limits) -> None:
        self.data, self.limits = data, limits
        self.position = self.opcodes = self.containers = self.run = 0
        self.pushed = -1
        self.memo: set[int] = set()
        self.texts: set[int] = set()

    def walk(self) -> None:
        """Walk to STOP.

        Raises:
            InputError: something in the file is refused.
            IndexError: the file ends before STOP.
        """
        data, steps, most = self.data, _STEP, self.limits.opcodes
        position = run = count = 0
        while True:
            opcode = data[position]
            count += 1
            step = steps[opcode]
            if step > 16:
                position += step - 16
            elif step:
                position += step
                run = position
            else:
                self.position, self.run, self.opcodes = position, run, count
                if count > most:
                    _too_large(_("{count} opcodes").format(count=count))
                if opcode == STOP:
                    return
                self._closer(opcode)
                position, run = self.position, self.run

    def _closer(self, opcode: int) -> None:
        """Handle an opcode whose argument has no fixed length, or that has a rule."""
        symbol = bytes((opcode,))
        if symbol in COUNTED:
            self._counted(symbol, COUNTED[symbol])
        elif symbol in MEMO:
            self._memo(MEMO[symbol])
        elif opcode in CONTAINERS:
            self._build()
        elif symbol in TUPLES:
            self._tuple(TUPLES[symbol])
        elif opcode in LINES:
            self._line(opcode)
        elif opcode == FRAME:
            self._fits(self.position + 9, self._number(8))
            self.position += 9  # framing changes neither the stack nor what comes next
        else:
            name = REFUSED.get(symbol)
            self._refuse(
                _("opcode {name} can run code or hides values").format(name=name)
                if name
                else _("byte {byte:#04x} is no opcode").format(byte=opcode)
            )

    def _number(self, width: int) -> int:
        start = self.position + 1
        if start + width > len(self.data):
            raise IndexError
        return int.from_bytes(self.data[start : start + width], "little")

    def _fits(self, start: int, length: int) -> None:
        if length > len(self.data) - start:
            self._refuse(_("it declares {size} where fewer follow").format(size=format_bytes(length)))

    def _build(self) -> None:
        """Count a list, dict or tuple."""
        self.containers += 1
        if self.containers > self.limits.containers:
            _too_large(_("{count} lists and dicts").format(count=self.containers))
        self.position += 1
        self.run = self.position

    def _counted(self, symbol: bytes, width: int) -> None:
        length = self._number(width)
        start = self.position + 1 + width
        if symbol in (b"\x8a", b"\x8b") and length > MAX_INTEGER_BYTES:
            self._refuse(_("an integer of {count} bytes").format(count=length))
        self._fits(start, length)
        self.position = self.pushed = start + length

    def _line(self, opcode: int) -> None:
        text = self._text()
        if opcode in b"IFLg" and len(text) > MAX_DIGITS:
            self._refuse(_("a number of {count} digits").format(count=len(text)))
        self.position += len(text) + 2
        if opcode != b"g"[0]:
            self.pushed = self.position

    def _text(self) -> bytes:
        """Return the argument up to the newline."""
        end = self.data.find(b"\n", self.position + 1)
        if end < 0:
            raise IndexError
        return self.data[self.position + 1 : end]

    def _memo(self, width: int) -> None:
        """Note what is kept. An index far above what is kept is refused: the memo is an array that grows to it."""
        is_text = self.pushed == self.position
        if width < 0:
            text = self._text()
            index = int(text) if text.isdigit() and len(text) < MAX_DIGITS else 2**64
            self.position += len(text) + 2
        else:
            index = self._number(width) if width else len(self.memo)
            self.position += 1 + width
        if index > 2 * len(self.memo) + 1024:
            self._refuse(_("memo index {index} after {count} entries").format(index=index, count=len(self.memo)))
        self.memo.add(index)
        if is_text:
            self.texts.add(index)
            self.pushed = self.position
        else:
            self.texts.discard(index)

    def _tuple(self, num_items: int) -> None:
        """Allow tuples of plain values only: a tuple of tuples of tuples ... would be hashed recursively as a key."""
        plain = self._run_of_values() if num_items else []
        if num_items < 0:
            marked = self.run > 0 and self.data[self.run - 1] == MARK
            enough = marked and all(plain)
        else:
            enough = len(plain) >= num_items and all(plain[len(plain) - num_items :])
        if not enough:
            self._refuse(_("a tuple that holds more than plain values"))
        self._build()

    def _run_of_values(self) -> list[bool]:
        """Tell, for each value pushed since something was built, whether it is a string or a number."""
        found, position, data = [], self.run, self.data
        if self.position - position > MAX_RUN_BYTES:
            self._refuse(_("a tuple after {size} of values").format(size=format_bytes(self.position - position)))
        while position < self.position:
            symbol = data[position : position + 1]
            width = COUNTED.get(symbol, 0)
            argument = data[position + 1 : position + 1 + (PLAIN.get(symbol, 0) or MEMO.get(symbol, 0) or width)]
            if symbol in LINES_SET or symbol == b"p":
                argument = data[position + 1 : data.index(b"\n", position)]
                position += 1
            if symbol not in MEMO and symbol[0] != FRAME:
                reads = int(argument) if symbol == b"g" else int.from_bytes(argument, "little")
                found.append(symbol not in (b"h", b"j", b"g") or reads in self.texts)
            position += 1 + len(argument) + (int.from_bytes(argument, "little") if width else 0)
            position += 8 * (symbol[0] == FRAME)
        return found

    def _refuse(self, what: str) -> NoReturn:
        raise InputError(_("{what}, at byte {position}").format(what=what, position=self.position))


def _too_large(what: str) -> NoReturn:
    raise InputError(_("{what} are more than the limit").format(what=what))


class _Closed(pickle.Unpickler):
    """An unpickler that can build plain values only."""

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise pickle.UnpicklingError(f"{module_name}.{global_name}")

    def persistent_load(self, pid: Any, /) -> NoReturn:
        raise pickle.UnpicklingError("persistent id")


def loads(data: bytes, *, limits: Limits | None = None) -> Any:
    """Return the plain values in a pickle.

    Raises:
        InputError: the pickle is broken, too large, or holds anything but plain values.
    """
    limits = limits or Limits()
    if len(data) > limits.file_bytes:
        _too_large(format_bytes(len(data)))
    try:
        _Walk(data, limits).walk()
    except (IndexError, ValueError):
        raise InputError(_("the pickle ends in the middle of a value")) from None
    collecting = gc.isenabled()
    gc.disable()  # the collector would walk the growing tree again and again
    try:
        return _Closed(io.BytesIO(data)).load()
    except Exception as error:  # whatever the C unpickler finds wrong with it
        what = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(_("not a pickle of plain values: {what}").format(what=what)) from None
    finally:
        if collecting:
            gc.enable()


def load(path: Path, *, limits: Limits | None = None) -> Any:
    """Return the plain values in a pickle file.

    Raises:
        InputError: the file cannot be read, or as :func:`loads`, with the file named.
    """
    limits = limits or Limits()
    try:
        if not path.is_file():
            raise InputError(_("no such file"), where=str(path))
        size = path.stat().st_size
        if size > limits.file_bytes:
            raise InputError(
                _("{size} are more than the {limit} that are read").format(
                    size=format_bytes(size), limit=format_bytes(limits.file_bytes)
                ),
                where=str(path),
            )
        data = path.read_bytes()
    except OSError as error:
        raise InputError(_("cannot be read: {why}").format(why=error.strerror or error), where=str(path)) from None
    try:
        return loads(data, limits=limits)
    except InputError as error:
        raise InputError(
            error.what, where=str(path), remedy=_("expected is a memory snapshot of torch.cuda.memory._dump_snapshot")
        ) from None
