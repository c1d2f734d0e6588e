"""Methods by name."""

from __future__ import annotations

from functools import lru_cache

from ullage.account.adapters.rule import Rule
from ullage.errors import InputError
from ullage.i18n import _

#: Methods whose rules are LoRA's own (:mod:`ullage.account.lora`).
LORA_NAMES = ("lora", "qlora", "dora")


@lru_cache(maxsize=1)
def rules() -> dict[str, Rule]:
    """Return the rules by every name they go by; loaded only where a method that is not LoRA is asked for."""
    from ullage.account.adapters import low_rank, maps, parts, prompts, weights

    every = (*low_rank.RULES, *weights.RULES, *maps.RULES, *parts.RULES, *prompts.RULES)
    return {name: rule for rule in every for name in rule.names}


def method_names() -> tuple[str, ...]:
    """Return the names of all methods, LoRA's first."""
    return (*LORA_NAMES, *sorted({rule.names[0] for rule in rules().values()}))


def canonical(name: str) -> str:
    """Return a method's name as PEFT has it: case, dashes and blanks do not matter.

    Raises:
        InputError: no rule has that name.
    """
    word = name.strip().lower().replace("-", "_").replace(" ", "_")
    if word in LORA_NAMES:
        return word
    known = rules()
    for each in (word, word.replace("_", "")):
        if each in known:
            return known[each].names[0]
    raise InputError(
        _("unknown method {name!r}").format(name=name[:40]),
        where="method",
        remedy=_("known are {known}").format(known=", ".join(("full", *method_names()))),
    )


def rule_of(kind: str) -> Rule:
    """Return the rule of a method.

    Raises:
        InputError: no rule has that name.
    """
    return rules()[canonical(kind)]
