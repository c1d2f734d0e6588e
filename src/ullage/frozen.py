"""Frozen keyword-only dataclasses that cost little to define.

``@dataclass(frozen=True, kw_only=True)`` compiles six methods for every class at import: half a millisecond each, a
third of a whole ``ullage fit``. :class:`Frozen` lets :mod:`dataclasses` collect the fields and shares one generic
method of each kind; ``fields``, ``replace``, ``is_dataclass`` and ``asdict`` work as usual. Why: docs/adr/0004.
"""

from __future__ import annotations

import sys
from dataclasses import MISSING, FrozenInstanceError, dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING or sys.version_info >= (3, 11):
    from typing import dataclass_transform
else:

    def dataclass_transform(**_settings: Any) -> Any:
        """Return a decorator that changes nothing: the mark is for type checkers."""
        return lambda class_: class_


__all__ = ["Frozen", "field"]


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
class Frozen:
    """Base of the frozen keyword-only dataclasses: ``class Norm(Frozen): name: str``.

    Equal when of the same class with equal fields; hashed once. ``__post_init__`` is called if there is one.
    """

    __slots__ = ("_hash",)
    if TYPE_CHECKING:
        _checks: bool
        _defaults: dict[str, Any]
        _factories: dict[str, Any]
        __dataclass_fields__: dict[str, Any]

        def __post_init__(self) -> None:
            """Check the fields: a class may have this."""

    def __init_subclass__(cls) -> None:
        dataclass(init=False, repr=False, eq=False, match_args=False)(cls)
        fields = cls.__dataclass_fields__.values()
        cls._defaults = {each.name: each.default for each in fields if each.default is not MISSING}
        cls._factories = {each.name: each.default_factory for each in fields if each.default_factory is not MISSING}
        cls._checks = hasattr(cls, "__post_init__")

    def __init__(self, **values: Any) -> None:
        cls, state = type(self), self.__dict__
        state.update(cls._defaults)
        if cls._factories:
            state.update({name: make() for name, make in cls._factories.items() if name not in values})
        state.update(values)
        if state.keys() != cls.__dataclass_fields__.keys():
            missing = sorted(cls.__dataclass_fields__.keys() - state.keys())
            unknown = sorted(state.keys() - cls.__dataclass_fields__.keys())
            raise TypeError(f"{cls.__name__}: missing {missing}, unexpected {unknown}")
        if cls._checks:
            self.__post_init__()

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise FrozenInstanceError(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> NoReturn:
        raise FrozenInstanceError(f"cannot delete field {name!r}")

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return self.__dict__ == other.__dict__ if type(self) is type(other) else NotImplemented

    def __hash__(self) -> int:
        known: int | None = getattr(self, "_hash", None)
        if known is None:
            known = hash((type(self).__name__, *map(self.__dict__.__getitem__, self.__dataclass_fields__)))
            object.__setattr__(self, "_hash", known)
        return known

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={self.__dict__[name]!r}" for name in self.__dataclass_fields__)
        return f"{type(self).__name__}({shown})"

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields: a copied or unpickled record hashes itself anew."""
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
