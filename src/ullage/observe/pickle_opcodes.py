"""The opcodes of the pickle language (source: cpython@3.14:Lib/pickletools.py)."""

from __future__ import annotations

from typing import Any

BINGET, LONG_BINGET, MEMOIZE, MARK, STOP, BININT1, EMPTY_DICT, EMPTY_LIST, SETITEMS, APPENDS = b"hj\x94(.K}]ue"
#: Opcode byte -> name, for those that can run code or reach outside the file.
REFUSED = {
    b"c": "GLOBAL", b"\x93": "STACK_GLOBAL", b"i": "INST", b"o": "OBJ", b"R": "REDUCE", b"b": "BUILD",
    b"\x81": "NEWOBJ", b"\x92": "NEWOBJ_EX", b"\x82": "EXT1", b"\x83": "EXT2", b"\x84": "EXT4",
    b"P": "PERSID", b"Q": "BINPERSID", b"\x97": "NEXT_BUFFER", b"\x98": "READONLY_BUFFER",
    b"\x8f": "EMPTY_SET", b"\x90": "ADDITEMS", b"\x91": "FROZENSET", b"\x96": "BYTEARRAY8", b"2": "DUP",
    b"0": "POP", b"1": "POP_MARK",
}  # fmt: skip
#: Opcode -> (bytes of the length, whether it is a text): SHORT_BINUNICODE, BINUNICODE, BINUNICODE8, SHORT_BINSTRING,
#: BINSTRING, SHORT_BINBYTES, BINBYTES, BINBYTES8.
COUNTED = {
    0x8C: (1, True), 0x58: (4, True), 0x8D: (8, True), 0x55: (1, True), 0x54: (4, True), 0x43: (1, False),
    0x42: (4, False), 0x8E: (8, False),
}  # fmt: skip


def from_line(opcode: int, text: bytes) -> Any:
    """Return the value of an opcode of protocol 0 (source: pickle.py:load_int, load_float, load_long, load_string)."""
    if opcode == 0x49:  # INT, which is also how protocol 0 writes booleans
        return {b"00": False, b"01": True}[text] if text in (b"00", b"01") else int(text)
    if opcode == 0x46:
        return float(text)
    if opcode == 0x4C:
        return int(text.removesuffix(b"L"))
    if opcode == 0x56:
        return str(text, "raw-unicode-escape")
    if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in (b"'", b'"'):
        raise ValueError("a string without quotes")
    return text[1:-1].decode("unicode-escape").encode("latin-1").decode("ascii")
