"""What kind of file it is, told by its first bytes, and who inspects it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from ullage.errors import InputError
from ullage.i18n import _
from ullage.observe.inspection import Inspection, inspect_stream, looked_for
from ullage.observe.progress import Watched
from ullage.observe.streams import Readable, open_source
from ullage.observe.unpacking import Unpacked

_PICKLE, _GZIP, _SQLITE, _ZIP = b"\x80", b"\x1f\x8b", b"SQLite format 3\0", b"PK\x03\x04"
_HEAD_BYTES = 1 << 16
_RECORDING = re.compile(rb'\A[^\n]{0,4096}"ullage_recording"\s*:')
_TRACE = re.compile(rb'"traceEvents"|"schemaVersion"\s*:|"deviceProperties"|"displayTimeUnit"|"baseTimeNanoseconds"')
_EVENTS = re.compile(rb'\A\s*\[\s*\{[^{}]{0,400}"ph"\s*:')
_TIMELINE = re.compile(rb"\A\s*\[\s*\[[-\d\s]")


class _Rejoined:
    """A stream whose beginning was looked at, from its beginning."""

    def __init__(self, head: bytes, stream: Readable) -> None:
        self._head, self._stream = head, stream

    def read(self, size: int, /) -> bytes:
        """Return up to ``size`` bytes."""
        if not self._head:
            return self._stream.read(size)
        given, self._head = self._head[:size], self._head[size:]
        return given


def inspect_source(name: str, stdin: BinaryIO, device: int | None = None) -> Inspection:
    """Inspect a file, or what comes through the pipe for ``-``.

    Raises:
        InputError: it cannot be read, or nothing in it is understood.
    """
    where = "" if name == "-" else name
    with open_source(name, stdin) as opened, Watched(opened, _length(where)) as stream:
        head = _head(stream, where)
        if head.startswith((_PICKLE, _SQLITE)):
            return _by_path(head, where, device)
        whole: Readable = _Rejoined(head, stream)
        if not head.startswith(_GZIP):
            return _dispatch(head, whole, where, device)
        unpacked = Unpacked(whole)
        head = _head(unpacked, where)
        return _unpacked(head, unpacked, where, device)


def _length(where: str) -> int | None:
    try:
        return Path(where).stat().st_size or None if where else None
    except OSError:
        return None


def _by_path(head: bytes, where: str, device: int | None) -> Inspection:
    """Inspect what is read from all over the file: snapshots and databases."""
    if head.startswith(_PICKLE):
        if not where:
            raise InputError(_("a snapshot cannot come through a pipe"), remedy=_("give the name of its file"))
        from ullage.observe.snapshot_view import inspect_snapshot

        return inspect_snapshot(Path(where), device)
    if not where:
        raise InputError(_("a database cannot come through a pipe"), remedy=_("give the name of its file"))
    from ullage.observe.nsys import inspect_nsys

    return inspect_nsys(Path(where), device)


def _head(stream: Readable, where: str) -> bytes:
    try:
        return stream.read(_HEAD_BYTES)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(_("cannot read it: {reason}").format(reason=reason), where=where[:200]) from None


def _dispatch(head: bytes, stream: Readable, where: str, device: int | None) -> Inspection:
    """Inspect what is read from beginning to end."""
    if head.startswith((_ZIP, _GZIP)):
        raise InputError(_("this is an archive"), where=where, remedy=_("unpack it and name the log in it"))
    if head.startswith((_SQLITE, _PICKLE)):
        raise InputError(_("a packed snapshot or database is not read"), where=where, remedy=_("unpack it first"))
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if _RECORDING.match(start):
        from ullage.observe.recording import inspect_recording

        return inspect_recording(stream, where, device)
    if _EVENTS.match(start) or (start.startswith(b"{") and _TRACE.search(head)):
        from ullage.observe.profiler import inspect_trace

        return inspect_trace(stream, where, device)
    if _TIMELINE.match(start):
        from ullage.observe.profiler_timeline import inspect_timeline

        return inspect_timeline(stream, where)
    return inspect_stream(stream, where)


def _unpacked(head: bytes, unpacked: Unpacked, where: str, device: int | None) -> Inspection:
    """Inspect a packed file as it is unpacked; one that is cut gives a partial answer."""
    try:
        found = _dispatch(head, _Rejoined(head, unpacked), where, device)
    except InputError:
        if not unpacked.broken:
            raise
        broken = _("the packed file is broken: {reason}").format(reason=unpacked.broken)
        raise InputError(broken, where=where, remedy=looked_for()) from None
    if not unpacked.broken:
        return found
    note = _("the packed file is broken ({reason}): this is a partial answer").format(reason=unpacked.broken)
    return replace(found, partial=True, notes=(note, *found.notes))
