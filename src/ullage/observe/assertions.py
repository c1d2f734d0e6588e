"""Limits that an inspection has to keep: ``peak < 70GiB``, ``leak < 1MiB/step``, ``retries == 0``."""

from __future__ import annotations

import operator
import re

from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.observe.inspection import Inspection
from ullage.units import format_bytes, parse_size

_COMPARISONS = {
    "<=": operator.le, ">=": operator.ge, "==": operator.eq, "<": operator.lt, ">": operator.gt,
}  # fmt: skip
#: Quantity -> (unit, where it stands: names of sizes or metrics, the first that is there counts).
QUANTITIES = {
    "peak": ("bytes", ("peak_allocated", "allocated", "peak")),
    "reserved": ("bytes", ("peak_reserved", "reserved")),
    "used": ("bytes", ("peak_used", "device_used", "used", "process_used")),
    "leak": ("bytes", ("leak_per_step",)),
    "fragmentation": ("share", ("fragmentation_share",)),
    "retries": ("count", ("num_alloc_retries", "retries")),
    "ooms": ("count", ("num_ooms", "ooms")),
}
_FORM = re.compile(r"\s*([A-Za-z_]{1,40})\s*(<=|>=|==|<|>)\s*([^\s].{0,60}?)\s*")
MAX_ASSERTIONS = 100


class Assertion(Frozen):
    """One limit: ``amount`` is bytes, a share or a count; ``text`` is what was typed."""

    quantity: str
    comparison: str
    amount: float
    text: str


def allowed() -> str:
    """Say what can be asserted."""
    return _("write QUANTITY < AMOUNT with {names}, such as 'peak < 70GiB', 'leak < 1MiB/step', 'retries == 0'").format(
        names=", ".join(QUANTITIES)
    )


def parse_assertion(text: str) -> Assertion:
    """Read a limit.

    Raises:
        InputError: it is none.
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise InputError(_("{text!r} is no limit").format(text=text[:80]), where="--assert", remedy=allowed())
    name, comparison, amount = match.groups()
    if name not in QUANTITIES:
        raise InputError(_("{name!r} cannot be asserted").format(name=name[:40]), where="--assert", remedy=allowed())
    return Assertion(quantity=name, comparison=comparison, amount=_amount(name, amount, text), text=text.strip())


def _amount(name: str, amount: str, text: str) -> float:
    unit = QUANTITIES[name][0]
    if unit == "bytes":
        size = re.sub(r"\s*/\s*step$", "", amount) if name == "leak" else amount
        try:
            return parse_size(size)
        except InputError as error:
            raise InputError(error.what, where=f"--assert {text[:60]!r}", remedy=error.remedy) from None
    pattern = r"(\d{1,12}(?:\.\d{1,6})?)\s*%" if unit == "share" else r"(\d{1,12})"
    match = re.fullmatch(pattern, amount)
    if match is None:
        right = _("write a share, such as 10%") if unit == "share" else _("write a whole number")
        raise InputError(
            _("{amount!r} is no amount of {name}").format(amount=amount[:40], name=name),
            where=f"--assert {text[:60]!r}",
            remedy=right,
        )
    return float(match.group(1)) / 100 if unit == "share" else int(match.group(1))


def failures(assertions: list[Assertion], found: Inspection) -> list[str]:
    """Return a sentence for each limit that is not kept.

    Raises:
        InputError: what was inspected does not have the quantity.
    """
    return [sentence for each in assertions for sentence in [_failure(each, _value(each.quantity, found))] if sentence]


def _value(quantity: str, found: Inspection) -> float:
    sizes, metrics = dict(found.sizes), dict(found.metrics)
    for name in QUANTITIES[quantity][1]:
        if name in sizes:
            return sizes[name]
        if name in metrics:
            return metrics[name]
    known = [
        name for name, (_unit, places) in QUANTITIES.items() if any(each in sizes or each in metrics for each in places)
    ]
    raise InputError(
        _("{name} is not known of this file").format(name=quantity),
        where="--assert",
        remedy=_("known are {known}").format(known=", ".join(known) or _("none")),
    )


def _failure(each: Assertion, value: float) -> str:
    if _COMPARISONS[each.comparison](value, each.amount):
        return ""
    return _("{quantity} is {value}, and {limit!r} was asserted").format(
        quantity=each.quantity, value=_words(each.quantity, value), limit=each.text
    )


def _words(quantity: str, value: float) -> str:
    unit = QUANTITIES[quantity][0]
    if unit == "share":
        return f"{100 * value:.1f} %"
    if unit == "count":
        return f"{int(value):,}"
    return format_bytes(value) + (_(" per step") if quantity == "leak" else "")
