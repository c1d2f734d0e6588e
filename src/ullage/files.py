"""Files are written whole or not at all: under a temporary name beside the file, then renamed over it."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from ullage.errors import InputError
from ullage.i18n import _


@contextlib.contextmanager
def replacing(path: Path, *, make_folder: bool = False) -> Iterator[Path]:
    """Give a temporary name to write to; it takes the place of ``path`` when the block ends well.

    Args:
        path: the file.
        make_folder: make the folders above it, too.

    Raises:
        InputError: it cannot be written; what stood there before is kept.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str, *, make_folder: bool = False) -> None:
    """Write ``text`` to ``path`` in one move (see :func:`replacing`)."""
    with replacing(path, make_folder=make_folder) as temporary:
        temporary.write_text(text, encoding="utf-8")


def cannot_write(path: Path, error: OSError) -> InputError:
    """Return the sentence for a file that could not be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    why = _("the disk is full") if full else str(error.strerror or type(error).__name__)
    there = _("; what stood there before is kept") if path.is_file() else ""
    return InputError(_("cannot be written: {why}{there}").format(why=why, there=there), where=str(path)[:200])


def set_aside(path: Path) -> Path | None:
    """Rename a corrupt file to ``NAME.corrupt-N`` and return that; None where it cannot be renamed."""
    for number in range(1, 1000):
        kept = path.with_name(f"{path.name}.corrupt-{number}")
        if not kept.exists():
            try:
                return path.rename(kept)
            except OSError:
                return None
    return None


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system can: the rename itself has happened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
