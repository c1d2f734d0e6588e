"""Typed access to a config's keys that remembers which were read, so that none is passed over in silence."""

from __future__ import annotations

from typing import Any

from ullage.errors import InputError, UnknownArchitectureError
from ullage.i18n import _
from ullage.read.hf_config.harmless import HARMLESS, HARMLESS_OFF, HARMLESS_PREFIXES

MAX_DIMENSION = 2**40
MAX_LAYERS = 10_000
_MISSING = object()


class Keys:
    """A config (or a part of one) whose keys are taken one by one.

    Args:
        values: the JSON object.
        where: file and path, for errors.
        parent: the object this one is a part of; a few facts (dtype, tying, quantisation) may stand there instead.
    """

    def __init__(self, values: dict[str, Any], where: str, parent: Keys | None = None) -> None:
        self.values, self.where, self.parent = values, where, parent
        self._taken: set[str] = set()
        self._parts: list[Keys] = []

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def at(self, key: str) -> str:
        """Return the path of ``key``, for an error."""
        return f"{self.where}: {key}"

    def raw(self, key: str, default: Any = None) -> Any:
        """Take a key of any type."""
        self._taken.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def skip(self, *keys: str) -> None:
        """Take keys that are known to have no effect on memory in this family."""
        self._taken.update(keys)

    def _need(self, key: str, default: Any) -> Any:
        value = self.raw(key)
        if value is None:
            if default is _MISSING:
                raise InputError(_("the key is missing"), where=self.at(key))
            return default
        return value

    def integer(self, key: str, default: Any = _MISSING, *, low: int = 1, high: int = MAX_DIMENSION) -> Any:
        """Take an integer in ``low..high`` (a float with an integral value passes)."""
        value = self._need(key, default)
        if value is default:
            return value
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise InputError(
                _("{value} is not an integer from {low} to {high}").format(value=repr(value)[:60], low=low, high=high),
                where=self.at(key),
            )
        return value

    def first_integer(self, *names: str, default: Any = _MISSING, low: int = 1, high: int = MAX_DIMENSION) -> Any:
        """Take an integer that may stand under several names; those that are there must agree."""
        found = {name: self.integer(name, low=low, high=high) for name in names if name in self}
        if not found:
            return self.integer(names[0], default, low=low, high=high)
        if len(set(found.values())) > 1:
            raise InputError(
                _("these keys say the same thing and disagree: {keys}").format(
                    keys=", ".join(f"{name} {value}" for name, value in found.items())
                ),
                where=self.where,
            )
        return next(iter(found.values()))

    def first_name(self, *names: str) -> str:
        """Return the name under which a key stands that has several; the first where it is missing."""
        return next((name for name in names if name in self), names[0])

    def nullable_integer(self, key: str, default: int | None, *, low: int = 1) -> int | None:
        """Take an integer where null means "none" and only a missing key means ``default``."""
        found: int | None = self.integer(key, None, low=low)
        return default if found is None and key not in self.values else found

    def holder(self, key: str) -> Keys:
        """Return the object that has ``key``: this one, or the nearest it is a part of; this one when none has."""
        at: Keys | None = self
        while at is not None:
            if key in at:
                return at
            at = at.parent
        return self

    def flag(self, key: str, default: Any = _MISSING) -> Any:
        """Take a boolean. Null is false, as the classes read it; only a missing key means ``default``."""
        value = False if key in self.values and self.raw(key) is None else self._need(key, default)
        if value is not default and not isinstance(value, bool):
            raise InputError(_("{value} is not true or false").format(value=repr(value)[:60]), where=self.at(key))
        return value

    def text(self, key: str, default: Any = _MISSING) -> Any:
        """Take a string."""
        value = self._need(key, default)
        if value is not default and not isinstance(value, str):
            raise InputError(_("{value} is not a string").format(value=repr(value)[:60]), where=self.at(key))
        return value

    def items(self, key: str, default: Any = _MISSING, *, length: Any = None) -> Any:
        """Take a list, of ``length`` entries when given."""
        value = self._need(key, default)
        if value is default:
            return value
        if not isinstance(value, list) or len(value) > MAX_LAYERS * 100:
            raise InputError(_("{value} is not a list").format(value=repr(value)[:60]), where=self.at(key))
        if length is not None and len(value) != length:
            raise InputError(
                _("has {got} entries, {want} are needed").format(got=len(value), want=length), where=self.at(key)
            )
        return value

    def integers(self, key: str, default: Any = _MISSING, *, length: Any = None, low: int = 0) -> Any:
        """Take a list of integers, each at least ``low``."""
        return self._all_of(key, default, length, _("an integer of at least {low}").format(low=low), low)

    def texts(self, key: str, default: Any = _MISSING, *, length: Any = None) -> Any:
        """Take a list of strings."""
        return self._all_of(key, default, length, _("a string"), None)

    def _all_of(self, key: str, default: Any, length: Any, wanted: str, low: int | None) -> Any:
        value = self.items(key, default, length=length)
        if value is default:
            return value
        for index, item in enumerate(value):
            right = isinstance(item, str) if low is None else type(item) is int and low <= item <= MAX_DIMENSION
            if not right:
                raise InputError(
                    _("entry {index} is {value}, not {wanted}").format(
                        index=index, value=repr(item)[:60], wanted=wanted
                    ),
                    where=self.at(key),
                )
        return value

    def part(self, key: str) -> Keys | None:
        """Take a nested object, or None when it is missing."""
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise InputError(_("{value} is not an object").format(value=repr(value)[:60]), where=self.at(key))
        return self.adopt(value, key)

    def adopt(self, value: dict[str, Any], key: str) -> Keys:
        """Return a nested object as a part of this one: its keys count as this one's."""
        part = Keys(value, self.at(key), self)
        self._parts.append(part)
        return part

    def layers(self, key: str = "num_hidden_layers", **kwargs: Any) -> Any:
        """Take a number of layers."""
        return self.integer(key, high=MAX_LAYERS, **kwargs)

    def unread(self) -> list[str]:
        """Return the paths of keys nobody took and that are not known to be harmless."""
        left = [
            key
            for key, value in self.values.items()
            if key not in self._taken
            and key not in HARMLESS
            and value is not None
            and not key.startswith(HARMLESS_PREFIXES)
            and not (value is False and key in HARMLESS_OFF)
        ]
        for part in self._parts:
            left += [f"{part.where.rsplit(': ', 1)[-1]}.{key}" for key in part.unread()]
        return left

    def finish(self, architecture: str, *, assume: bool) -> tuple[str, ...]:
        """Check that every key was understood; return those passed over on the user's word.

        Raises:
            UnknownArchitectureError: keys are left and ``assume`` is False.
        """
        left = self.unread()
        if left and not assume:
            raise UnknownArchitectureError(
                _("{architecture} has settings that ullage does not understand").format(architecture=architecture),
                where=self.where,
                keys=left,
            )
        return tuple(left)
