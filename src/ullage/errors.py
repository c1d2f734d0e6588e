"""The tree of errors. Each knows its exit code; each message says what, where, and what would be right.

UllageError (1)
├── InputError (2)            a file, flag or value that cannot be used
│   ├── LayoutError (2)       numbers that are fine alone and impossible together
│   └── MissingExtraError (2) an optional dependency that this call needs
└── UnknownArchitectureError (5)   a model that is not understood, with the keys that are not
"""

from __future__ import annotations

from collections.abc import Iterable

from ullage.i18n import _

EXIT_OK = 0
EXIT_INTERNAL = 1
EXIT_USAGE = 2
EXIT_DOES_NOT_FIT = 3
EXIT_TIGHT = 4
EXIT_UNKNOWN_ARCHITECTURE = 5


def _one_line(text: str) -> str:
    """Return a sentence that stays one, whatever names from outside it quotes."""
    return text if text.isprintable() else "".join(one if one.isprintable() else " " for one in text)


class UllageError(Exception):
    """Base of every error that ullage raises on purpose. ``str(error)`` is one sentence for the user."""

    exit_code = EXIT_INTERNAL


class InputError(UllageError):
    """What was given cannot be used: ``what`` is wrong, ``where`` it stands, ``remedy`` what would be right."""

    exit_code = EXIT_USAGE

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(_one_line("".join((f"{where}: " if where else "", what, f"; {remedy}" if remedy else ""))))


class LayoutError(InputError):
    """Sizes that cannot go together, such as a tensor-parallel size that does not divide the attention heads."""


class MissingExtraError(InputError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            _("this needs the package {package}").format(package=package),
            remedy=_("install it with: pip install 'ullage[{extra}]'").format(extra=extra),
        )


class UnknownArchitectureError(UllageError):
    """A model whose architecture, or a key of whose config, is not understood. ``keys`` names what was not."""

    exit_code = EXIT_UNKNOWN_ARCHITECTURE

    def __init__(self, what: str, *, where: str = "", keys: Iterable[str] = ()) -> None:
        self.what, self.where, self.keys = what, where, tuple(keys)
        named = _("; keys not understood: {keys}").format(keys=", ".join(self.keys)) if self.keys else ""
        super().__init__(_one_line("".join((f"{where}: " if where else "", what, named))))
