"""The words of an evaluation → :class:`~ullage.spec.training.Evaluation`: ``8``, ``8,seq=2048,kept=10``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ullage.errors import InputError
from ullage.i18n import _
from ullage.spec.training import Evaluation

_KEYS = ("batch_size", "seq_len", "kept_batches")
_SHORT = {"batch": "batch_size", "seq": "seq_len", "kept": "kept_batches"}


def parse_evaluation(text: str, where: str = "--evaluate") -> Evaluation:
    """Parse a batch size and what is said of it: ``seq=`` tokens, ``kept=`` batches whose logits stay.

    Raises:
        InputError: not of that form.
    """
    first, *rest = (part.strip() for part in text.split(","))
    fields: dict[str, Any] = {"batch_size": first.removeprefix("batch=")}
    for part in rest:
        name, _equals, value = part.partition("=")
        fields[_SHORT.get(name.strip(), name.strip())] = value.strip()
    return evaluation_of(fields, where)


def evaluation_of(fields: Mapping[str, Any], where: str) -> Evaluation:
    """Build what the fields state.

    Raises:
        InputError: a field that is not known, or a value that is no count.
    """
    unknown = next((str(name) for name in fields if name not in _KEYS), None)
    batch = _count(fields, "batch_size")
    if unknown is not None or batch is None:
        raise _wrong(unknown or "batch_size", where)
    length, kept = _count(fields, "seq_len"), _count(fields, "kept_batches")
    for name, value in (("seq_len", length), ("kept_batches", kept)):
        if value is None and fields.get(name) is not None:
            raise _wrong(name, where)
    return Evaluation(batch_size=batch, seq_len=length, kept_batches=kept or 0)


def _count(fields: Mapping[str, Any], key: str) -> int | None:
    """Return a count from 1 on, None where there is none or it is nonsense."""
    value = fields.get(key)
    word = str(value)
    if isinstance(value, bool) or not word.isascii() or not word.isdigit() or len(word) > 9 or not int(word):
        return None
    return int(word)


def _wrong(what: str, where: str) -> InputError:
    return InputError(
        _("{what} does not describe an evaluation").format(what=what[:40]),
        where=where,
        remedy=_("write for example {example}").format(example="8 or 8,seq=2048,kept=10"),
    )
