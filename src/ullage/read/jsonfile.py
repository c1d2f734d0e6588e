"""Reading JSON that nobody vouches for: bounded, and with one sentence when it is not what it should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ullage.errors import InputError
from ullage.i18n import _

MAX_CONFIG_BYTES = 16 * 2**20


def is_file(path: Path) -> bool:
    """Return whether ``path`` is a file; a name that no file can have (too long) is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def missing(path: Path) -> InputError:
    """Return the error for a path that is no file: a folder is told apart from nothing."""
    try:
        folder = path.is_dir()
    except OSError:
        folder = False
    return InputError(_("is a folder, not a file") if folder else _("no such file"), where=str(path)[:200])


def read_json_object(path: Path, *, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        InputError: missing, unreadable, too large, not JSON, nested too deeply, or not an object.
    """
    try:
        if not path.is_file():
            raise missing(path)
        size = path.stat().st_size
        if size > max_bytes:
            raise InputError(
                _("the file has {size:,} bytes").format(size=size),
                where=str(path),
                remedy=_("at most {limit:,} are read for a configuration").format(limit=max_bytes),
            )
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(_("cannot be read ({reason})").format(reason=error.strerror), where=str(path)) from None
    except UnicodeDecodeError:
        raise InputError(_("is not UTF-8 text"), where=str(path)) from None
    return parse_json_object(text, where=str(path))


def parse_json_object(text: str, *, where: str) -> dict[str, Any]:
    """Parse ``text`` as a JSON object; ``where`` names it in errors (see :func:`read_json_object`)."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            _("is not valid JSON ({reason})").format(reason=error.msg), where=f"{where}:{error.lineno}:{error.colno}"
        ) from None
    except RecursionError:
        raise InputError(_("is nested too deeply"), where=where) from None
    except ValueError as error:  # an integer of thousands of digits
        raise InputError(
            _("holds a number that cannot be read ({reason})").format(reason=str(error)[:80]), where=where
        ) from None
    if not isinstance(value, dict):
        raise InputError(_("is not a JSON object"), where=where)
    return value
