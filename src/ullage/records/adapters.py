"""The parameter-efficient method that a training record states → :class:`Lora`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ullage.account.adapters.names import LORA_NAMES, canonical, method_names, rule_of
from ullage.account.adapters.whole import solved_for
from ullage.account.lora import adapter_parameters
from ullage.account.optimizer import rule_name
from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.adapter_words import options_of
from ullage.records import words
from ullage.records.compare import NotComparableError
from ullage.records.schema import Record
from ullage.spec.model import Model
from ullage.spec.training import Lora
from ullage.units import canonical_dtype

_IN_FULL = "trained in full beside the adapters:"
_WRAPPED = "adapted modules:"
#: AdaLoRA's ``r`` is where its ranks end; what is allocated is ``init_r``. OFT's and OSF's ranks are other numbers.
_OTHER_RANK = ("adalora",)
#: Frameworks whose adapters are PEFT's: the count of another's may follow other names and rules.
_BY_PEFT = ("single", "hf_trainer", "ddp", "deepspeed")


def method_of(fields: Mapping[str, Any], others: tuple[str, ...] = ()) -> str:
    """Return the method by its usual name: full, one of PEFT's, or one of ``others``.

    Raises:
        NotComparableError: no rules for it.
    """
    said = fields.get("method")
    if said in (None, "full", *others):
        return str(said or "full")
    try:
        return canonical(str(said))
    except InputError:
        raise NotComparableError(_("no rules for the method {method}").format(method=str(said)[:40])) from None


def adapters_of(fields: Mapping[str, Any], record: Record, model: Model) -> Lora | None:
    """Return the adapters of a record; a stated number of trained parameters settles what the fields leave open.

    Raises:
        NotComparableError: LoRA without a rank.
    """
    said = str(fields.get("method") or "full")
    if said != "full" and said in method_names():
        value = fields.get("lora")
        value = value if isinstance(value, dict) else {}
        rank = words.integer(value, "rank", record.where)
        if said not in LORA_NAMES:
            return _other(said, fields, record, model, value, rank)
        if not rank:
            raise NotComparableError(_("the rank of the adapters is not known"))
        return _lora(said, fields, record, model, value, rank)
    return None


def _other(
    kind: str, fields: Mapping[str, Any], record: Record, model: Model, value: Mapping[str, Any], rank: int | None
) -> Lora:
    """Return the adapters of a method that is not LoRA."""
    found = Lora(
        kind=kind,
        rank=rule_of(kind).rank if rank is None else rank,
        targets=_targets(fields, value, ()),
        dtype=_dtype(fields),
        trained_modules=_listed(fields, _IN_FULL),
        options=options_of(kind, value),
    )
    count = stated_parameters(record)
    known = rank is not None and kind not in _OTHER_RANK
    return found if count is None else solved_for(model, found, count, rank_known=known)


def _lora(
    kind: str, fields: Mapping[str, Any], record: Record, model: Model, value: Mapping[str, Any], rank: int
) -> Lora:
    """Return LoRA: a count that only one of its factors has says that the other is frozen."""
    found = Lora(
        rank=rank,
        targets=_targets(fields, value, ("all-linear",)),
        dropout=words.number(value.get("dropout") or 0) or 0.0,
        dora=kind == "dora" or "DoRA on" in words.sentences(fields),
        trained_modules=_listed(fields, _IN_FULL),
    )
    count = stated_parameters(record) if record.engine in _BY_PEFT else None
    if count is None or rule_name(str(fields.get("optimizer") or "")) == "lora_fa":
        return found
    without_b = replace(found, options=(("frozen", "b"),))
    for one in (found, without_b):
        if adapter_parameters(model, one).num_elements == count:
            return one
    return replace(found, num_parameters=count)


def _targets(fields: Mapping[str, Any], value: Mapping[str, Any], default: tuple[str, ...]) -> tuple[str, ...]:
    targets = value.get("targets")
    if targets == "all-linear":
        return ("all-linear",)
    if isinstance(targets, list):
        return tuple(str(one) for one in targets)
    if targets is not None:
        return (str(targets),)
    return _listed(fields, _WRAPPED) or default


def _dtype(fields: Mapping[str, Any]) -> str | None:
    """Return the adapters' dtype where it is said that they are not made fp32."""
    if not any("no automatic cast to fp32" in one for one in words.sentences(fields)):
        return None
    precision = fields.get("precision")
    compute = precision.get("compute") if isinstance(precision, dict) else None
    return canonical_dtype(compute or "bf16")


def _listed(fields: Mapping[str, Any], start: str) -> tuple[str, ...]:
    """Return the names that a sentence of the record lists after ``start``."""
    found = next((one for one in words.sentences(fields) if one.startswith(start)), "")
    return tuple(name.strip() for name in found.removeprefix(start).split(",") if name.strip())


def stated_parameters(record: Record) -> int | None:
    """Return the number of trained parameters that a figure's note states."""
    for figure in record.measured:
        match = re.search(r"([\d,]{1,18}) trainable parameters", figure.note)
        if match:
            return int(match.group(1).replace(",", "")) or None
    return None


def script_flags(record: Record) -> tuple[tuple[str, str], ...]:
    """Return what the source shows of the script that was run, and the record leaves to be looked up.

    PEFT's method comparison evaluates the base model before it trains, with adapters switched off and on again; its
    results state the tokens and samples of a run: 4,198,051 of 20,000.
    Source: huggingface/peft@5d602fdb:method_comparison/MetaMathQA/run.py:train, results/lora--llama-3.2-3B-rank32.json
        (train total tokens, train samples).
    """
    flags = []
    if "/method_comparison/" in record.source_url:
        flags.append(("adapters_switched", "true"))
    if "/method_comparison/MetaMathQA/" in record.source_url:
        flags.append(("mean_tokens", "210"))
    return tuple(flags)
