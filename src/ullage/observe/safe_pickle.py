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
#: Opcode -> bytes of its argument: values that are complete in themselves.
PLAIN = {b"N": 0, b"\x88": 0, b"\x89": 0, b"K": 1, b"M": 2, b"J": 4, b"G": 8}
#: The same, of opcodes that build on what is there (MARK, items, reading and writing the memo, PROTO).
STRUCTURE = {b"(": 0, b"a": 0, b"e": 0, b"s": 0, b"u": 0, b"\x94": 0, b"h": 1, b"j": 4, b"q": 1, b"\x80": 1}
CONTAINERS = b"}]ld"  # EMPTY_DICT, EMPTY_LIST, LIST, DICT
LINES = b"IFLVSgp"  # arguments that end with a newline
COUNTED = {b"\x8c": 1, b"X": 4, b"\x8d": 8, b"U": 1, b"T": 4, b"C": 1, b"B": 4, b"\x8e": 8, b"\x8a": 1, b"\x8b": 4}
TUPLES = {b")": 0, b"\x85": 1, b"\x86": 2, b"\x87": 3}
MARK, TUPLE, STOP, FRAME, LONG_BINPUT = b"(t.\x95r"

_STEP = [0] * 256  # 1 to 15: structure, skip that many; 17 to 31: a plain value; 0: look closer
for _opcode, _argument in STRUCTURE.items():
    _STEP[_opcode[0]] = 1 + _argument
for _opcode, _argument in PLAIN.items():
    _STEP[_opcode[0]] = 17 + _argument


class _Walk:
    """The walk over the opcodes of one file: where it is, and what it has counted."""

    __slots__ = ("containers", "data", "last", "limits", "memo", "opcodes", "plain", "position")

    def __init__(self, data: bytes, limits: Limits) -> None:
        self.data, self.limits = data, limits
        self.position = self.opcodes = self.containers = self.memo = 0
        self.plain = 0  # plain values at the top of the stack, since the last other opcode, which is in ``last``
        self.last = 0

    def run(self) -> None:
        """Walk to STOP.

        Raises:
            InputError: something in the file is refused.
            IndexError: the file ends before STOP.
        """
        data, steps, most = self.data, _STEP, self.limits.opcodes
        position = plain = last = count = 0
        while True:
            opcode = data[position]
            count += 1
            step = steps[opcode]
            if step > 16:
                position += step - 16
                plain += 1
            elif step:
                position += step
                plain, last = 0, opcode
            else:
                self.position, self.plain, self.last, self.opcodes = position, plain, last, count
                if count > most:
                    _too_large(_("{count} opcodes").format(count=count))
                if opcode == STOP:
                    return
                self._closer(opcode)
                position, plain, last = self.position, self.plain, self.last

    def _closer(self, opcode: int) -> None:
        """Handle an opcode whose argument has no fixed length, or that has a rule."""
        symbol = bytes((opcode,))
        if symbol in COUNTED:
            self._counted(symbol, COUNTED[symbol])
        elif opcode in CONTAINERS:
            self._container()
            self._structure(opcode, 1)
        elif symbol in TUPLES or opcode == TUPLE:
            self._tuple(opcode, TUPLES.get(symbol))
        elif opcode in LINES:
            self._line(opcode)
        elif opcode == FRAME:
            self._fits(self.position + 9, self._number(8))
            self.position += 9  # framing changes neither the stack nor what comes next
        elif opcode == LONG_BINPUT:
            self._memo_index(self._number(4))
            self._structure(opcode, 5)
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

    def _structure(self, opcode: int, step: int) -> None:
        self.position += step
        self.plain, self.last = 0, opcode

    def _container(self) -> None:
        self.containers += 1
        if self.containers > self.limits.containers:
            _too_large(_("{count} lists and dicts").format(count=self.containers))

    def _counted(self, symbol: bytes, width: int) -> None:
        length = self._number(width)
        start = self.position + 1 + width
        if symbol in (b"\x8a", b"\x8b") and length > MAX_INTEGER_BYTES:
            self._refuse(_("an integer of {count} bytes").format(count=length))
        self._fits(start, length)
        self.position = start + length
        self.plain += 1

    def _tuple(self, opcode: int, num_items: int | None) -> None:
        """Allow tuples of plain values only: a tuple of tuples of tuples ... would be hashed recursively as a key."""
        enough = self.last == MARK if num_items is None else self.plain >= num_items
        if not enough:
            self._refuse(_("a tuple that holds more than plain values"))
        self._container()
        self._structure(opcode, 1)

    def _line(self, opcode: int) -> None:
        start = self.position + 1
        end = self.data.find(b"\n", start)
        if end < 0:
            raise IndexError
        numeric = opcode in b"IFLgp"
        if numeric and end - start > MAX_DIGITS:
            self._refuse(_("a number of {count} digits").format(count=end - start))
        if opcode == b"p"[0]:
            text = self.data[start:end]
            self._memo_index(int(text) if text.isdigit() else 2**63)
        self.position = end + 1
        if opcode in b"gp":
            self.plain, self.last = 0, opcode
        else:
            self.plain += 1

    def _memo_index(self, index: int) -> None:
        """Refuse an index far above the number of values so far: the memo is an array that grows to the index."""
        if index > self.opcodes:
            self._refuse(_("memo index {index} after {count} opcodes").format(index=index, count=self.opcodes))

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
        _Walk(data, limits).run()
    except IndexError:
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
