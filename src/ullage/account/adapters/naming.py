"""Which modules a target of PEFT names: by the end of a module's name, or by a pattern of its whole name."""

from __future__ import annotations

import re
from functools import lru_cache

from ullage.errors import InputError
from ullage.i18n import _

_PATTERN = re.compile(r"[\\\[\](){}|*+?^$]")
#: A repeated group with a repetition inside takes time without bound on some names.
_NESTED = re.compile(r"\([^()]*[*+}][^()]*\)\s*[*+{]")
MOST_CHARACTERS = 300
#: What stands before a layer's number in the models of transformers.
#: Source: transformers@5.23.0:models/*/modeling_*.py (LlamaForCausalLM, Gemma4ForConditionalGeneration,
#: Mistral3ForConditionalGeneration).
ROOTS = ("model.layers.0.", "model.language_model.layers.0.", "language_model.model.layers.0.")


def is_named(module: str, targets: tuple[str, ...]) -> bool:
    """Return whether a module of a layer is among the targets.

    Source: peft@0.19.1:tuners/tuners_utils.py:check_target_module_exists (the end of the name; a single string is a
        pattern that the whole name must match).

    Raises:
        InputError: a target that is no pattern, or one without bounds.
    """
    return any(module == target or module.endswith(f".{target}") or _matches(target, module) for target in targets)


def _matches(target: str, module: str) -> bool:
    if not _PATTERN.search(target):
        return False
    pattern = _compiled(target)
    return any(pattern.fullmatch(f"{root}{module}") for root in ROOTS)


@lru_cache(maxsize=64)
def _compiled(target: str) -> re.Pattern[str]:
    if len(target) > MOST_CHARACTERS or _NESTED.search(target):
        raise InputError(
            _("{target} is a pattern without bounds").format(target=target[:60]),
            where="lora targets",
            remedy=_("give names of linear layers, such as q_proj, or all-linear"),
        )
    try:
        return re.compile(target)
    except (re.error, RecursionError, OverflowError):
        raise InputError(
            _("{target} is no regular expression").format(target=target[:60]),
            where="lora targets",
            remedy=_("give names of linear layers, such as q_proj, or all-linear"),
        ) from None
