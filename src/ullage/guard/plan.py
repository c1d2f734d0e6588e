"""A memory plan: the settings a job runs with, and how it came to them.

A job that runs out of memory goes on with the next, smaller plan; the plan is what is kept between attempts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _

Value = int | float | str | bool
FORMAT = 1
MAX_KNOBS = 256
MAX_HISTORY = 100
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.@x,:-]{0,119}")
_KEYS = {"ullage_plan", "generation", "knobs", "reason", "history"}


class Plan(Frozen):
    """Settings by name, the count of changes since the first plan, and why each change was made.

    ``knobs`` may be given as a mapping; it is kept as sorted pairs. ``history`` holds the reasons of the last changes,
    oldest first.
    """

    generation: int = 0
    knobs: tuple[tuple[str, Value], ...] = ()
    reason: str = ""
    history: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check names and values, and sort the knobs."""
        given = self.knobs.items() if isinstance(self.knobs, Mapping) else self.knobs
        pairs = tuple(sorted((name, value) for name, value in given))
        _check(self.generation, pairs, self.reason, self.history)
        self.__dict__["knobs"] = pairs

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of a knob, or ``default``."""
        return dict(self.knobs).get(name, default)

    def changed(self, reason: str, **knobs: Value | None) -> Plan:
        """Return the next plan with these knobs changed; a knob of ``None`` is removed."""
        kept = {name: value for name, value in {**dict(self.knobs), **knobs}.items() if value is not None}
        words = f"{self.generation + 1}: {reason}"
        return Plan(
            generation=self.generation + 1,
            knobs=tuple(kept.items()),
            reason=reason,
            history=(*self.history, words)[-MAX_HISTORY:],
        )

    def shrunk(self, reason: str, **knobs: Value) -> Plan:
        """Return the next plan, which needs less memory: ``generation`` goes up by one."""
        return self.changed(reason, **knobs)

    def to_json(self) -> str:
        """Return one line of JSON."""
        return json.dumps(
            {
                "ullage_plan": FORMAT,
                "generation": self.generation,
                "knobs": dict(self.knobs),
                "reason": self.reason,
                "history": list(self.history),
            },
            ensure_ascii=False,
            allow_nan=False,
        )

    @classmethod
    def from_json(cls, text: str, *, where: str = "") -> Plan:
        """Read what :meth:`to_json` wrote; anything else is an :class:`InputError`."""
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(_("this is not JSON"), where=where) from error
        if not isinstance(raw, dict) or raw.get("ullage_plan") != FORMAT or not raw.keys() <= _KEYS:
            raise InputError(
                _("this is not a plan of format {format}").format(format=FORMAT),
                where=where,
                remedy=_("expected the keys {keys}").format(keys=", ".join(sorted(_KEYS))),
            )
        knobs, history = raw.get("knobs", {}), raw.get("history", [])
        if not isinstance(knobs, dict) or not isinstance(history, list):
            raise InputError(_("knobs must be an object and history a list"), where=where)
        try:
            return cls(
                generation=raw.get("generation", 0),
                knobs=tuple(knobs.items()),
                reason=raw.get("reason", ""),
                history=tuple(history),
            )
        except InputError as error:
            raise InputError(error.what, where=where, remedy=error.remedy) from error


def _check(generation: Any, pairs: tuple[tuple[Any, Any], ...], reason: Any, history: Any) -> None:
    if isinstance(generation, bool) or not isinstance(generation, int) or not 0 <= generation < 2**31:
        raise InputError(_("the generation of a plan must be a count from 0, not {value!r}").format(value=generation))
    if not isinstance(reason, str) or not all(isinstance(line, str) for line in history):
        raise InputError(_("the reason and the history of a plan must be text"))
    if len(pairs) > MAX_KNOBS or len(history) > MAX_HISTORY:
        raise InputError(_("a plan holds at most {knobs} knobs").format(knobs=MAX_KNOBS))
    for name, value in pairs:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InputError(_("{name!r} is not the name of a knob").format(name=name))
        number = isinstance(value, (int, float)) and (isinstance(value, bool) or math.isfinite(value))
        if not number and not isinstance(value, str):
            raise InputError(
                _("the knob {name} must be a number, text or true/false, not {value!r}").format(name=name, value=value)
            )
