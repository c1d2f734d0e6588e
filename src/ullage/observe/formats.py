"""What kind of file it is, told by its first bytes, and who inspects it."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import BinaryIO, cast

from ullage.errors import InputError
from ullage.i18n import _
from ullage.observe.inspection import Inspection, inspect_stream, looked_for
from ullage.observe.streams import Readable, open_source

_PICKLE, _GZIP, _SQLITE, _ZIP = b"\x80", b"\x1f\x8b", b"SQLite format 3\0", b"PK\x03\x04"
_HEAD_BYTES = 4096


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
    with open_source(name, stdin) as stream:
        head = _head(stream, where)
        if head.startswith(_PICKLE) and not where:
            raise InputError(_("a snapshot cannot come through a pipe"), remedy=_("give the name of its file"))
        if head.startswith(_PICKLE):
            from ullage.observe.snapshot_view import inspect_snapshot

            return inspect_snapshot(Path(name), device)
        whole = _Rejoined(head, stream)
        if head.startswith(_GZIP):
            return _unpacked(whole, where)
        _refuse(head, where)
        return inspect_stream(whole, where)


def _head(stream: Readable, where: str) -> bytes:
    try:
        return stream.read(_HEAD_BYTES)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(_("cannot read it: {reason}").format(reason=reason), where=where[:200]) from None


def _refuse(head: bytes, where: str) -> None:
    """Refuse formats that are known and not read."""
    if head.startswith(_SQLITE):
        raise InputError(_("exports of Nsight Systems are not read yet"), where=where, remedy=looked_for())
    if b'"traceEvents"' in head or (head.lstrip().startswith(b"{") and b'"schemaVersion"' in head):
        raise InputError(_("traces of torch.profiler are not read yet"), where=where, remedy=looked_for())
    if head.lstrip().startswith(b"[["):
        raise InputError(_("memory timelines of torch.profiler are not read yet"), where=where, remedy=looked_for())
    if head.startswith(_ZIP):
        raise InputError(_("this is an archive"), where=where, remedy=_("unpack it and name the log in it"))


def _unpacked(stream: Readable, where: str) -> Inspection:
    """Inspect a packed log, unpacking as it is read."""
    import gzip

    with gzip.GzipFile(fileobj=cast("BinaryIO", stream)) as unpacked:
        try:
            head = _head(unpacked, where)
            _refuse(head, where)
            return inspect_stream(_Rejoined(head, unpacked), where)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(_("the packed file is broken: {reason}").format(reason=error), where=where) from None
