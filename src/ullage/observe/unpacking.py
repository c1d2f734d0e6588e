"""Packed files (gzip) unpacked as they are read; one that was cut gives what can be unpacked, and says so."""

from __future__ import annotations

import zlib

from ullage.observe.streams import Readable

_PACKED_BYTES = 1 << 18
_GZIP_WINDOW = 31  # zlib: 15 bits of window, and 16 for the header of gzip


class Unpacked:
    """The content of a gzip stream. ``broken`` says why it ended early, empty when it did not."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self._engine = zlib.decompressobj(_GZIP_WINDOW)
        self._rest, self._fresh = b"", True
        self.broken = ""

    def read(self, size: int, /) -> bytes:
        """Return up to ``size`` bytes, none at the end."""
        while not self.broken:
            if not self._rest:
                self._rest = self._stream.read(_PACKED_BYTES)
                if not self._rest:
                    if not self._fresh:
                        self.broken = "it was cut"
                    return b""
            if self._fresh and not self._rest.strip(b"\0"):
                self._rest = b""  # padding after the last member
                continue
            given = self._step(size)
            if given:
                return given
        return b""

    def _step(self, size: int) -> bytes:
        self._fresh = False
        try:
            given = self._engine.decompress(self._rest, size)
        except zlib.error as error:
            self.broken = str(error)
            return b""
        self._rest = self._engine.unconsumed_tail
        if self._engine.eof:  # the next member of the file, if there is one
            self._rest = self._engine.unused_data
            self._engine, self._fresh = zlib.decompressobj(_GZIP_WINDOW), True
        return given
