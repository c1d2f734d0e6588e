"""Parameter-efficient methods in words: ``r=16,targets=q_proj+v_proj`` with a method's name, or PEFT's own file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ullage.account.adapters.names import LORA_NAMES, canonical, method_names, rule_of
from ullage.errors import InputError
from ullage.i18n import _
from ullage.spec.training import Lora

MOST_RANK = 65536
MOST_OPTION = 1 << 24
#: Options of which a rule divides by, or that count something there must be.
_ABOVE_ZERO = (
    "gralora_k", "vector_length", "num_vectors", "topk", "block_size", "boft_block_size", "boft_n_butterfly_factor",
    "num_virtual_tokens", "adapter_len", "stride_A", "num_B", "num_tokens", "u", "theta_d_length",
    "n_frequency", "encoder_num_layers", "num_subspaces", "subspace_rank",
)  # fmt: skip
#: Settings of PEFT's file that make every layer's adapters differ: better refused than left out.
_NOT_FOLLOWED = (
    "rank_pattern", "layers_to_transform", "layer_replication", "target_parameters", "trainable_token_indices",
    "use_bdlora", "arrow_config", "eva_config", "alora_invocation_tokens", "n_frequency_pattern",
    "block_size_pattern", "exclude_modules", "target_svd_config", "use_qalora", "lora_ga_config",
)  # fmt: skip


def parse_adapters(method: str | None, text: str | None) -> tuple[Lora | None, str]:
    """Return the adapters and the method's name; ``text``: settings, or a file ``adapter_config.json``.

    Raises:
        InputError: an unknown method, settings that it does not have, or settings without a method.
    """
    if text is not None and text.strip().endswith(".json"):
        return _from_file(method, text.strip())
    if method is not None and method.strip().lower() == "full":
        if text is not None:
            raise InputError(_("a full training has no adapters"), where="--lora", remedy=_("leave out --lora"))
        return None, "full"
    if method is None and text is None:
        return None, "full"
    kind = canonical(method or "lora")
    found = _settings(kind, text or "")
    return found, kind


def _settings(kind: str, text: str) -> Lora:
    """Read ``name=value`` pairs: the rank, targets, dropout of LoRA, and the method's own settings by PEFT's names."""
    pairs: dict[str, str] = {}
    for part in text.split(",") if text.strip() else ():
        name, _equals, value = part.partition("=")
        pairs[name.strip()] = value.strip()
    lora = kind in LORA_NAMES
    options = {} if lora else rule_of(kind).options
    known = {"targets", "r", "rank", *options, *(("dropout",) if lora else ())}
    unknown = sorted(pairs.keys() - known)
    rank = pairs.get("r") or pairs.get("rank") or ("" if lora else str(rule_of(kind).rank))
    dropout = _number(pairs.get("dropout") or "0")
    good = rank.isdigit() and (1 if lora else 0) <= int(rank) <= MOST_RANK and dropout is not None and 0 <= dropout < 1
    if unknown or not good:
        example = "r=16,targets=q_proj+v_proj,dropout=0.05" if lora else _example(kind)
        raise InputError(
            _("{text!r} does not describe adapters").format(text=text[:60]),
            where="--lora",
            remedy=_("write r=16 or {example}").format(example=example) if lora or rule_of(kind).rank else example,
        )
    targets = tuple(name for name in (pairs.get("targets") or ("all-linear" if lora else "")).split("+") if name)
    given = {name: pairs[name] for name in options if name in pairs}
    return checked(
        Lora(
            kind="lora" if lora else kind,
            rank=int(rank),
            targets=targets,
            dropout=dropout or 0.0,
            dora=kind == "dora",
            options=tuple((name, _value(kind, name, value)) for name, value in given.items()),
        )
    )


def _example(kind: str) -> str:
    rule = rule_of(kind)
    settings = [*(["r=16"] if rule.rank else []), *(["targets=q_proj+v_proj"] if rule.targets else [])]
    return ",".join([*settings, *(f"{name}={value}" for name, value in rule.options.items())])


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _value(kind: str, name: str, value: Any) -> int | float | str:
    """Return a setting in the type of its default.

    Raises:
        InputError: it has another type.
    """
    default = rule_of(kind).options[name]
    if isinstance(default, str):
        return str(value)
    words = {"true": "1", "false": "0"}
    number = _number(words.get(str(value).lower(), str(value)))
    whole = isinstance(default, int)
    if number is None or number != number or (whole and number != int(number)) or abs(number) > MOST_OPTION:
        raise InputError(
            _("{name} has a value that it cannot have").format(name=name),
            where="--lora",
            remedy=_("write a number, such as {default}").format(default=default),
        )
    return int(number) if whole else number


def checked(lora: Lora) -> Lora:
    """Return adapters whose settings the rules can work with.

    Raises:
        InputError: a rank, a share or a count outside its range.
    """
    rule = None if lora.kind == "lora" else rule_of(lora.kind)
    if rule is not None and rule.rank and lora.rank < 1:
        raise InputError(_("{method} needs a rank").format(method=lora.kind), where="--lora", remedy="r=16")
    for name, value in lora.options:
        share = rule is not None and isinstance(rule.options.get(name), float)
        if (name in _ABOVE_ZERO and isinstance(value, int) and value < 1) or (share and not 0 <= float(value) <= 1):
            raise InputError(
                _("{name} has a value that it cannot have").format(name=name),
                where="--lora",
                remedy=_("write a number from 0 to 1") if share else _("write a whole number above zero"),
            )
    return lora


def _from_file(method: str | None, path: str) -> tuple[Lora, str]:
    from pathlib import Path

    from ullage.read.jsonfile import read_json_object

    found, kind = adapter_config(read_json_object(Path(path)), where=path)
    if method is not None and canonical(method) != kind:
        raise InputError(
            _("the file says {kind}, not {method}").format(kind=kind, method=method[:40]),
            where=path,
            remedy=_("leave out --method"),
        )
    return found, kind


def adapter_config(values: Mapping[str, Any], *, where: str) -> tuple[Lora, str]:
    """Return the adapters of PEFT's ``adapter_config.json``, and the method's name.

    Source: peft@0.21.2:config.py:PeftConfigMixin.to_dict; tuners/*/config.py for names and defaults.

    Raises:
        InputError: no method of PEFT that is known, or a setting that is not followed.
    """
    said = values.get("peft_type")
    if not isinstance(said, str):
        raise InputError(
            _("peft_type is missing"),
            where=where,
            remedy=_("known are {known}").format(known=", ".join(one.upper() for one in method_names())),
        )
    kind = canonical(said)
    for name in _NOT_FOLLOWED:
        if values.get(name) not in (None, {}, [], False):
            raise InputError(_("{key} is not followed").format(key=name), where=where)
    lora = kind in LORA_NAMES
    rule = None if lora else rule_of(kind)
    rank = values.get("init_r" if kind == "adalora" else "r", rule.rank if rule else 8)
    dropout = values.get("lora_dropout", 0.0) if lora else 0.0
    if isinstance(rank, bool) or not isinstance(rank, (int, type(None))) or not isinstance(dropout, (int, float)):
        raise InputError(_("r is not a whole number"), where=where)
    options = [] if lora else list(options_of(kind, values))
    tokens = values.get("token_indices")
    if kind == "trainable_tokens" and isinstance(tokens, list):
        options.append(("num_tokens", len(tokens)))
    found = Lora(
        kind="lora" if lora else kind,
        rank=rank or 0,
        targets=_names(values.get("target_modules"), where),
        dropout=float(dropout),
        dora=values.get("use_dora") is True,
        trained_modules=_names(values.get("modules_to_save"), where),
        options=tuple(options),
    )
    if lora and not found.targets:
        found = Lora(**{**vars(found), "targets": ("q_proj", "v_proj")})
    return checked(found), "dora" if found.dora else kind


def options_of(kind: str, values: Mapping[str, Any]) -> tuple[tuple[str, int | float | str], ...]:
    """Return a method's own settings among others, by PEFT's names.

    Raises:
        InputError: a value that a setting cannot have.
    """
    found = []
    for name in rule_of(kind).options:
        value = values.get(name)
        if value is not None:
            found.append((name, _value(kind, name, "+".join(map(str, value)) if isinstance(value, list) else value)))
    return tuple(found)


def _names(value: Any, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,) if value != "all-linear" else ("all-linear",)
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return tuple(value)
    raise InputError(_("target_modules is neither a name nor a list of names"), where=where)
