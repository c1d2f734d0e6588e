"""A pickle as it passes by: a window of bytes that moves on, and the arguments of the opcodes in it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, BinaryIO

#: Bytes that are in memory at once.
WINDOW_BYTES = 1 << 20
#: Bytes that are left when more is read: more than any argument of fixed length, and than most events.
MARGIN_BYTES = 1 << 15
#: Longest argument that ends with a newline.
MAX_LINE_BYTES = 1 << 16

#: Opcode -> how its argument is packed: BININT2, BININT, BINFLOAT.
FIXED = {0x4D: struct.Struct("<H"), 0x4A: struct.Struct("<i"), 0x47: struct.Struct(">d")}


class Window:
    """Bytes of a file from ``base`` on.

    Attributes:
        data: what is in memory.
        position: of the next opcode, in ``data``.
        soft_end: from this position on more should be read first; beyond the end when all was read.
    """

    def __init__(self, file: BinaryIO, size_bytes: int, progress: Callable[[int, int], None] | None = None) -> None:
        self._file, self.size_bytes, self._progress = file, size_bytes, progress
        self.data = b""
        self.base = self.position = self.soft_end = 0
        self.refill()

    def refill(self, least: int = 0) -> None:
        """Drop what is behind, and read until a window, or at least ``least`` bytes, lie ahead."""
        rest = self.data[self.position :]
        self.base += self.position
        pieces, length, wanted = [rest], len(rest), max(least, WINDOW_BYTES)
        while length < wanted:
            piece = self._file.read(wanted - length)
            if not piece:
                break
            pieces.append(piece)
            length += len(piece)
        self.data, self.position = b"".join(pieces), 0
        self.soft_end = length - MARGIN_BYTES if length >= wanted else length + 1
        if self._progress is not None:
            self._progress(self.base, self.size_bytes)

    def absolute(self) -> int:
        """Return the position in the file."""
        return self.base + self.position

    def left(self) -> int:
        """Return the bytes from the position to the end of the file."""
        return self.size_bytes - self.absolute()

    def number(self, width: int) -> int:
        """Read the unsigned argument of an opcode, and go to what follows."""
        raw = self.data[self.position + 1 : self.position + 1 + width]
        if len(raw) < width:
            raise IndexError
        self.position += 1 + width
        return int.from_bytes(raw, "little")

    def fixed(self, opcode: int) -> Any:
        """Read the number that an opcode pushes."""
        layout = FIXED[opcode]
        if self.position + 1 + layout.size > len(self.data):
            raise IndexError
        (value,) = layout.unpack_from(self.data, self.position + 1)
        self.position += 1 + layout.size
        return value

    def take(self, length: int) -> bytes:
        """Read so many bytes."""
        if self.position + length > len(self.data):
            self.refill(length + MARGIN_BYTES)
        raw = self.data[self.position : self.position + length]
        if len(raw) < length:
            raise IndexError
        self.position += length
        return raw

    def line(self) -> bytes:
        """Read the argument up to the newline."""
        if self.position + MAX_LINE_BYTES > len(self.data):
            self.refill()
        end = self.data.find(b"\n", self.position + 1)
        if end < 0:
            raise IndexError
        raw = self.data[self.position + 1 : end]
        self.position = end + 1
        return raw
