"""The settings of a fine-tuning recipe, asked for by name and kind; what nobody asked for is named at the end."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ullage.errors import InputError
from ullage.i18n import _

MAX_COUNT = 10**9
_TRUE, _FALSE = ("true", "yes", "1", "on"), ("false", "no", "0", "off", "none", "")


class Fields:
    """A mapping of settings and where it stands; every question is remembered."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise InputError(_("is not a mapping of settings"), where=where)
        self.values: dict[str, Any] = values
        self.where = where
        self._asked: set[str] = set()

    def raw(self, key: str) -> Any:
        """Return the value as it stands; None when it is not given."""
        self._asked.add(key)
        return self.values.get(key)

    def count(self, key: str) -> int | None:
        """Return a whole number above zero, None when it is not given."""
        value = self.raw(key)
        if isinstance(value, str) and re.fullmatch(r"\d{1,10}", value.strip()):
            value = int(value)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_COUNT:
            raise self.wrong(key, _("a whole number above zero"))
        return value

    def fraction(self, key: str, default: float = 0.0) -> float:
        """Return a number from 0 up to 1, without it."""
        value = self.raw(key)
        try:
            number = default if value is None else float(value)
        except (TypeError, ValueError):
            number = -1.0
        if not 0 <= number < 1:
            raise self.wrong(key, _("a number from 0 up to 1"))
        return number

    def flag(self, key: str, default: bool = False) -> bool:
        """Return whether a switch is on."""
        value = self.raw(key)
        word = str(value).strip().lower()
        if value is None:
            return default
        if word not in _TRUE and word not in _FALSE:
            raise self.wrong(key, _("true or false"))
        return word in _TRUE

    def word(self, key: str) -> str | None:
        """Return a text without blanks around it, None when it is not given."""
        value = self.raw(key)
        if value is None or value == "":
            return None
        if not isinstance(value, str):
            raise self.wrong(key, _("a name"))
        return value.strip()

    def words(self, key: str) -> tuple[str, ...]:
        """Return names: a list, or one text with commas."""
        value = self.raw(key)
        if value is None:
            return ()
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list) or not all(isinstance(one, str) for one in parts):
            raise self.wrong(key, _("a list of names"))
        return tuple(one.strip() for one in parts if one.strip())

    def choice(self, key: str, known: Mapping[str, Any]) -> Any:
        """Return what a word stands for, None when it is not given."""
        word = self.word(key)
        if word is None:
            return None
        if word.lower() not in known:
            raise self.wrong(key, _("one of {known}").format(known=", ".join(known)))
        return known[word.lower()]

    def section(self, key: str) -> Fields | None:
        """Return the settings below a key, None when there are none."""
        value = self.raw(key)
        return None if value is None else Fields(value, f"{self.where}: {key}")

    def wrong(self, key: str, right: str) -> InputError:
        """Return the error of a value that a key cannot have."""
        return InputError(
            _("{key} has a value that it cannot have").format(key=key),
            where=self.where,
            remedy=_("write {right}").format(right=right),
        )

    def not_asked(self, harmless: Iterable[str], prefixes: tuple[str, ...]) -> tuple[str, ...]:
        """Return the settings that nobody asked for and that are not known to cost nothing."""
        known = self._asked.union(harmless)
        return tuple(key for key in self.values if key not in known and not key.startswith(prefixes))
