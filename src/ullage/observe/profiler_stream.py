"""A JSON document of any size, item by item: the events of a trace are decoded one at a time, never all at once.

``json`` of the standard library decodes one value where it is told to; around it only the structure of the outermost
levels is walked. One value may be as large as ``MAX_VALUE_CHARS``; a broken one is skipped and counted, and a document
that ends too early gives what was read of it.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from ullage.errors import InputError
from ullage.i18n import _
from ullage.observe.streams import Readable

CHUNK_BYTES = 1 << 20
#: No event of a profiler comes near it; the whole of a coalesced memory timeline of an hour does.
MAX_VALUE_CHARS = 32 << 20
#: A document with more broken values than this is not worth reading on.
MAX_BROKEN = 1000
_BETWEEN = re.compile(r"[\s,]*")
_SPACE = re.compile(r"\s*")
_NEXT_EVENT = re.compile(r'\{\s*"(?:ph|cat|name|ts|pid|args)"\s*:')


class _BrokenError(ValueError):
    """No value of JSON stands here."""


class _EndedError(ValueError):
    """The document ends within a value."""


class Document:
    """A JSON document, read once.

    Attributes:
        truncated: it ended too early. ``num_broken``: values that are not JSON and were skipped.
    """

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._json = json.JSONDecoder(strict=False)
        self._text, self._at, self._ended = "", 0, False
        self.truncated = False
        self.num_broken = 0

    def items(self, array: str) -> Iterator[tuple[str, Any]]:
        """Yield (key, value) of the outermost object; the items of its list ``array`` one by one under that key.

        A document that is a list yields its items under the key ``array``.

        Raises:
            InputError: it is no JSON document, or it cannot be read on.
        """
        first = self._peek(_SPACE).lstrip("\ufeff")
        if self._text.startswith("\ufeff", self._at):
            self._at += 1
            first = self._peek(_SPACE)
        try:
            if first == "[":
                yield from self._list(array)
            elif first == "{":
                yield from self._object(array)
            else:
                raise InputError(_("it is no JSON document"))
        except _EndedError:
            self.truncated = True
        except _BrokenError:
            self.num_broken += 1
            self.truncated = True

    def _object(self, array: str) -> Iterator[tuple[str, Any]]:
        self._at += 1
        while (mark := self._peek(_BETWEEN)) != "}":
            if not mark:
                raise _EndedError
            key = self._value()
            if not isinstance(key, str) or self._peek(_SPACE) != ":":
                raise _BrokenError
            self._at += 1
            if key == array and self._peek(_SPACE) == "[":
                yield from self._list(array)
            else:
                self._peek(_SPACE)
                yield key, self._value()

    def _list(self, key: str) -> Iterator[tuple[str, Any]]:
        self._at += 1
        while (mark := self._peek(_BETWEEN)) != "]":
            if not mark:
                raise _EndedError
            try:
                value = self._value()
            except _BrokenError:
                self._skip_broken()
                continue
            yield key, value
        self._at += 1

    def _peek(self, between: re.Pattern[str]) -> str:
        """Skip what stands between values, and return the first character of the next; empty at the end."""
        while True:
            found = between.match(self._text, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read():
                return ""

    def _value(self) -> Any:
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except (ValueError, RecursionError):
                if len(self._text) - self._at > MAX_VALUE_CHARS:
                    raise _BrokenError from None
                if not self._read(len(self._text) - self._at):
                    raise (_BrokenError if self._next_event() else _EndedError) from None
                continue
            if end == len(self._text) and not self._ended and self._read():
                continue  # a number may go on in the next block
            self._at = end
            return value

    def _next_event(self) -> int:
        found = _NEXT_EVENT.search(self._text, self._at + 1)
        return found.start() if found else 0

    def _skip_broken(self) -> None:
        """Go on at what looks like the next event."""
        self.num_broken += 1
        if self.num_broken > MAX_BROKEN:
            raise _EndedError
        place = self._next_event()
        while not place:
            self._at = max(self._at, len(self._text) - 256)
            if not self._read():
                raise _EndedError
            place = self._next_event()
        self._at = place

    def _read(self, at_least: int = 0) -> bool:
        """Read on, and drop what was consumed; False at the end."""
        if self._ended:
            return False
        try:
            block = self._stream.read(max(CHUNK_BYTES, at_least))
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise InputError(_("cannot read on: {reason}").format(reason=reason)) from None
        self._ended = not block
        self._text = self._text[self._at :] + self._decoder.decode(block, final=self._ended)
        self._at = 0
        return not self._ended
