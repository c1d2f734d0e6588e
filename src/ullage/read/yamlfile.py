"""Settings in YAML or JSON from outside: bounded, without anchors, and read by the safe loader only."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from ullage.errors import InputError, MissingExtraError
from ullage.i18n import _

MAX_BYTES = 1 << 20


def read_yaml(path: Path) -> Any:
    """Read a file of settings (JSON is YAML too).

    Raises:
        MissingExtraError: PyYAML is not installed.
        InputError: unreadable, too large, or not YAML.
    """
    try:
        yaml = import_module("yaml")
    except ModuleNotFoundError:
        raise MissingExtraError("PyYAML", "train") from None
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(_("cannot be read ({reason})").format(reason=reason), where=str(path)) from None
    if len(data) > MAX_BYTES:
        raise InputError(_("the file has more than {size:,} bytes").format(size=MAX_BYTES), where=str(path))
    try:
        text = data.decode("utf-8-sig")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise InputError(_("YAML anchors are not read"), where=str(path), remedy=_("write the values out"))
        return yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise InputError(_("is not YAML ({reason})").format(reason=type(error).__name__), where=str(path)) from None
