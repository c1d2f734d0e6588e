"""The words of a preference or reinforcement job → :class:`~ullage.spec.rlhf.Rlhf`: ``dpo``, ``grpo,vllm=0.3``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast, get_args

from ullage.errors import InputError
from ullage.i18n import _
from ullage.spec.rlhf import KINDS, ON_POLICY, Reference, Rlhf, RlhfKind, Rollout

#: Other names of a kind. Source: llamafactory@0.9.5:hparams/finetuning_args.py (stage rm), trl's RewardTrainer,
#: axolotl@0.19.0:utils/schemas/enums.py:RLType (ipo is DPO with another loss).
ALIASES = {"reward": "rm", "reward_model": "rm", "ipo": "dpo", "gspo": "grpo", "dapo": "grpo", "gdpo": "grpo"}
_EXAMPLE = "dpo, kto, rm, grpo,completion=512,vllm=0.3,sleep"


def kind_of(word: str, where: str) -> RlhfKind:
    """Return the kind of that name.

    Raises:
        InputError: there is none.
    """
    name = ALIASES.get(word.strip().lower(), word.strip().lower())
    if name not in KINDS:
        raise InputError(
            _("unknown kind of preference or reinforcement training {word!r}").format(word=word[:40]),
            where=where,
            remedy=_("known are {known}").format(known=", ".join(KINDS)),
        )
    return cast(RlhfKind, name)


def is_kind(word: str) -> bool:
    """Return whether a word names a kind."""
    return ALIASES.get(word.lower(), word.lower()) in KINDS


def parse_rlhf(text: str, where: str = "--rlhf") -> Rlhf:
    """Parse a kind and what is said of it: ``reference=``, ``completion=``, ``steps=``, ``vllm=``, ``sleep`` ...

    Raises:
        InputError: not of that form.
    """
    first, *rest = text.split(",")
    fields: dict[str, Any] = {}
    for part in rest:
        name, equals, value = (one.strip() for one in part.partition("="))
        fields[name] = value if equals else True
    return rlhf_of({"kind": first, **fields}, where)


def rlhf_of(fields: Mapping[str, Any], where: str) -> Rlhf:
    """Build what the fields state (see :func:`parse_rlhf`).

    Raises:
        InputError: a field that is not known, or a value that it cannot have.
    """
    known = ("kind", "reference", "completion", "steps", "vllm", "sleep", "offload", "server", "reward_model")
    unknown = sorted(str(name)[:40] for name in fields if name not in known)
    if unknown or not isinstance(fields.get("kind"), str):
        raise _wrong(", ".join(unknown) or "kind", where)
    kind, reference = kind_of(fields["kind"], where), fields.get("reference")
    if reference not in (None, *get_args(Reference)):
        raise _wrong("reference", where)
    rollout = _rollout(fields, where)
    if rollout is not None and kind not in ON_POLICY:
        raise InputError(_("{kind} generates nothing while it trains").format(kind=kind), where=where)
    return Rlhf(
        kind=kind,
        reference=cast("Reference | None", reference),
        completion_len=_count(fields, "completion", where),
        steps_per_generation=_count(fields, "steps", where),
        rollout=rollout,
        reward_model=fields.get("reward_model") in (True, "true"),
    )


def _rollout(fields: Mapping[str, Any], where: str) -> Rollout | None:
    if fields.get("server") is True:
        return Rollout(engine="server")
    given = fields.get("vllm")
    if given is None:
        return None
    try:
        fraction = float(given)
    except (TypeError, ValueError):
        fraction = -1.0
    if not 0 < fraction < 1 or given is True:
        raise _wrong("vllm", where)
    sleeps, alone = (fields.get(key) in (True, "true") for key in ("sleep", "offload"))
    return Rollout(engine="vllm", memory_fraction=fraction, sleeps=sleeps, alone=alone)


def _count(fields: Mapping[str, Any], key: str, where: str) -> int | None:
    value = fields.get(key)
    if value is None:
        return None
    text = str(value)
    if isinstance(value, bool) or not text.isascii() or not text.isdigit() or not 0 < int(text[:10]) < 10**9:
        raise _wrong(key, where)
    return int(text[:10])


def _wrong(what: str, where: str) -> InputError:
    return InputError(
        _("{what} does not describe preference or reinforcement training").format(what=what[:60]),
        where=where,
        remedy=_("write for example {example}").format(example=_EXAMPLE),
    )
