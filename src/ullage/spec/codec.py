"""Spec dataclasses ↔ plain JSON, both ways and strict.

An object is a JSON object of its fields; fields at their default are left out. Where a field may hold several classes
(the mixers of a layer), ``kind`` names the class. The layers of a model are run-length encoded:
``{"count": 58, "layer": {...}}``, where ``layer`` may also be the number of an earlier run that had the same layer.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

from ullage.errors import InputError
from ullage.i18n import _
from ullage.spec import model as spec

T = TypeVar("T")
MAX_LAYERS = 10_000
_Decoder = Callable[[Any, str], Any]


# -------------------------------------------------------------------------------------------------------------- encode


def encode(value: Any, *, tagged: bool = False) -> Any:
    """Return ``value`` (a spec object, tuple or plain value) as plain JSON values; ``tagged`` adds ``kind``."""
    if isinstance(value, tuple):
        return [encode(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    cls: Any = type(value)
    unions = _union_fields(cls)
    found: dict[str, Any] = {"kind": type(value).__name__} if tagged else {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if _is_default(field, item):
            continue
        if isinstance(value, spec.Model) and field.name == "layers":
            found["layers"] = _encode_layers(item)
        elif field.name in unions:
            found[field.name] = (
                [encode(part, tagged=True) for part in item] if isinstance(item, tuple) else encode(item, tagged=True)
            )
        else:
            found[field.name] = encode(item)
    return found


def _is_default(field: dataclasses.Field[Any], item: Any) -> bool:
    return field.default is not dataclasses.MISSING and type(item) is type(field.default) and item == field.default


def _encode_layers(layers: tuple[spec.Layer, ...]) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = []
    first_run: dict[spec.Layer, int] = {}
    previous: spec.Layer | None = None
    for layer in layers:
        if layer == previous:
            runs[-1]["count"] += 1
            continue
        known = first_run.setdefault(layer, len(runs))
        runs.append({"count": 1, "layer": encode(layer) if known == len(runs) else known})
        previous = layer
    return runs


# -------------------------------------------------------------------------------------------------------------- decode


def decode(cls: type[T], value: Any, *, where: str = "") -> T:
    """Build a ``cls`` from plain JSON values.

    Raises:
        InputError: a key that is not a field, a missing field, or a value of the wrong type; it names the place.
    """
    kind: Any = cls
    result: T = _object_decoder(kind)(value, where)
    return result


def decode_model(value: Any, *, where: str = "") -> spec.Model:
    """Build a :class:`ullage.spec.model.Model`."""
    return decode(spec.Model, value, where=where)


@lru_cache(maxsize=256)
def _object_decoder(cls: Any) -> _Decoder:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    decoders: dict[str, _Decoder] = {}
    required = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]

    def decode_object(value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            raise _wrong(value, _("an object"), where)
        filled = {}
        for name, item in value.items():
            if name not in fields:
                raise InputError(_("unknown key"), where=f"{where}: {name}", remedy=_known_keys(cls))
            decoder = decoders.get(name)
            if decoder is None:
                layers = cls is spec.Model and name == "layers"
                decoder = decoders[name] = _decode_layers if layers else _decoder_of(_hint(cls, name))
            filled[name] = decoder(item, f"{where}.{name}")
        for name in required:
            if name not in filled:
                raise InputError(_("the key is missing"), where=f"{where}.{name}")
        return cls(**filled)

    return decode_object


def _decode_layers(value: Any, where: str) -> tuple[spec.Layer, ...]:
    if not isinstance(value, list):
        raise _wrong(value, _("a list"), where)
    decode_layer = _object_decoder(spec.Layer)
    kinds: list[spec.Layer] = []
    layers: list[spec.Layer] = []
    for number, run in enumerate(value):
        at = f"{where}[{number}]"
        if not isinstance(run, dict) or set(run) != {"count", "layer"}:
            raise _wrong(run, '{"count": …, "layer": …}', at)
        count, layer = run["count"], run["layer"]
        if type(count) is not int or not 1 <= count <= MAX_LAYERS - len(layers):
            raise _wrong(count, _("a number of layers from 1 to {limit}").format(limit=MAX_LAYERS), f"{at}.count")
        if type(layer) is int:
            if not 0 <= layer < number:
                raise _wrong(layer, _("the number of an earlier run"), f"{at}.layer")
            kinds.append(kinds[layer])
        else:
            kinds.append(decode_layer(layer, f"{at}.layer"))
        layers += [kinds[-1]] * count
    return tuple(layers)


@lru_cache(maxsize=512)
def _decoder_of(hint: Any) -> _Decoder:
    """Return the decoder of a type hint: a plain type, Literal, tuple, union or dataclass."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return _choice(arguments)
    if origin is tuple:
        return _tuple(arguments)
    if origin in (Union, types.UnionType):
        return _union(arguments)
    if dataclasses.is_dataclass(hint):
        return _object_decoder(cast(Any, hint))
    return _plain(hint)


def _plain(kind: type) -> _Decoder:
    def decode_plain(value: Any, where: str) -> Any:
        if type(value) is kind or (kind is float and type(value) is int):
            return value
        raise _wrong(value, kind.__name__, where)

    return decode_plain


def _choice(choices: tuple[Any, ...]) -> _Decoder:
    def decode_choice(value: Any, where: str) -> Any:
        if not isinstance(value, str) or value not in choices:
            raise _wrong(value, " | ".join(map(str, choices)), where)
        return value

    return decode_choice


def _tuple(arguments: tuple[Any, ...]) -> _Decoder:
    endless = arguments[-1] is Ellipsis
    inner = [_decoder_of(argument) for argument in arguments if argument is not Ellipsis]

    def decode_tuple(value: Any, where: str) -> Any:
        if not isinstance(value, list) or not (endless or len(value) == len(inner)):
            raise _wrong(value, _("a list"), where)
        decoders = inner * len(value) if endless else inner
        return tuple(
            decoder(item, f"{where}[{at}]") for at, (decoder, item) in enumerate(zip(decoders, value, strict=True))
        )

    return decode_tuple


def _union(arguments: tuple[Any, ...]) -> _Decoder:
    optional = type(None) in arguments
    rest = [argument for argument in arguments if argument is not type(None)]
    if len(rest) == 1:
        only = _decoder_of(rest[0])
        return lambda value, where: None if optional and value is None else only(value, where)
    named = {argument.__name__: argument for argument in rest}

    def decode_kind(value: Any, where: str) -> Any:
        if optional and value is None:
            return None
        kind = value.get("kind") if isinstance(value, dict) else None
        if not isinstance(kind, str) or kind not in named:
            raise _wrong(kind, _("a kind of {kinds}").format(kinds=", ".join(named)), f"{where}.kind")
        return _object_decoder(named[kind])({key: item for key, item in value.items() if key != "kind"}, where)

    return decode_kind


@lru_cache(maxsize=256)
def _union_fields(cls: Any) -> frozenset[str]:
    """Names of fields that hold one of several classes, alone or in a tuple."""
    return frozenset(field.name for field in dataclasses.fields(cls) if _holds_union(_hint(cls, field.name)))


def _hint(cls: Any, name: str) -> Any:
    """Return the type of a field. Only the fields that are met are looked at: all at once cost several ms."""
    return _evaluated(cls.__module__, cls.__dataclass_fields__[name].type)


@lru_cache(maxsize=512)
def _evaluated(module: str, annotation: str) -> Any:
    return eval(annotation, vars(sys.modules[module]))  # our own source, not input


def _holds_union(hint: Any) -> bool:
    if get_origin(hint) is tuple:
        return any(_holds_union(argument) for argument in get_args(hint))
    classes = [argument for argument in get_args(hint) if dataclasses.is_dataclass(argument)]
    return get_origin(hint) in (Union, types.UnionType) and len(classes) > 1


def _known_keys(cls: type) -> str:
    names = ", ".join(field.name for field in dataclasses.fields(cls))
    return _("known are {known}").format(known=names)


def _wrong(value: Any, wanted: str, where: str) -> InputError:
    return InputError(
        _("{value} cannot be used").format(value=repr(value)[:60]),
        where=where,
        remedy=_("expected {wanted}").format(wanted=wanted),
    )
