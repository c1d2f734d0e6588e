"""A model of the catalog with a few keys of its config changed, as cut-down measured runs name it.

Only what leaves the width of every layer as it is can be told without the full config: the depth, the number of dense
layers before the experts, the vocabulary and its tying, KV heads and the bias of q, k and v. Other keys are an honest
"not comparable" that names them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ullage.errors import InputError
from ullage.i18n import _
from ullage.records.compare import NotComparableError
from ullage.spec.model import Attention, DenseFFN, Layer, Model, MoEFFN

#: Keys that are understood: with a number, with yes or no.
NUMBERS = (
    "num_hidden_layers",
    "first_k_dense_replace",
    "num_nextn_predict_layers",
    "vocab_size",
    "max_position_embeddings",
    "num_key_value_heads",
)
FLAGS = ("tie_word_embeddings", "qkv_bias")
#: Beyond what any model has; a larger number is a mistake.
MOST = {"num_hidden_layers": 10_000, "num_nextn_predict_layers": 64}


def with_overrides(model: Model, overrides: Any, *, where: str) -> Model:
    """Return the model with the changes of a record.

    Raises:
        InputError: the changes are not an object, or a value is not of its key's type.
        NotComparableError: a key whose effect cannot be told from the catalog's entry.
    """
    if not overrides:
        return model
    if not isinstance(overrides, dict):
        raise InputError(_("model_overrides is not an object"), where=where)
    unknown = sorted(str(key)[:40] for key in overrides if key not in NUMBERS + FLAGS)
    if unknown:
        raise NotComparableError(
            _("a model of the catalog with changed dimensions (model_overrides: {keys})").format(
                keys=", ".join(unknown[:10])
            )
        )
    for key, value in overrides.items():
        number = isinstance(value, int) and not isinstance(value, bool) and 0 < value + 1 <= MOST.get(key, 10_000_000)
        if not (number if key in NUMBERS else isinstance(value, bool)):
            raise InputError(_("{value} is not a value of it").format(value=repr(value)[:60]), where=f"{where}: {key}")
    layers = tuple(_attention_changed(layer, overrides) for layer in _layers(model, overrides))
    frame: dict[str, Any] = {
        "vocab_size": overrides.get("vocab_size", model.vocab_size),
        "tied_embeddings": overrides.get("tie_word_embeddings", model.tied_embeddings),
        "max_position_embeddings": overrides.get("max_position_embeddings", model.max_position_embeddings),
        "mtp": _mtp(model, overrides.get("num_nextn_predict_layers")),
    }
    return replace(model, layers=layers, **frame)


def _layers(model: Model, overrides: dict[str, Any]) -> tuple[Layer, ...]:
    """Cut the layers from the end; dense layers before the experts stay as many as they were, or as said."""
    depth = int(overrides.get("num_hidden_layers", len(model.layers)))
    layers = model.layers
    if "first_k_dense_replace" in overrides:
        dense, sparse = _dense_then_sparse(layers)
        first = min(int(overrides["first_k_dense_replace"]), depth)
        return (dense,) * first + (sparse,) * (depth - first)
    if depth > len(layers):
        if len(set(layers)) > 1:
            raise NotComparableError(_("more layers than the model has, and its layers differ"))
        return layers[:1] * depth
    return layers[:depth]


def _dense_then_sparse(layers: tuple[Layer, ...]) -> tuple[Layer, Layer]:
    """Return the two kinds of layer of a model whose first layers are dense and whose others hold experts."""
    sparse = [any(isinstance(ffn, MoEFFN) for ffn in layer.ffns) for layer in layers]
    first = sparse.index(True) if True in sparse else 0
    dense = [layer for layer in layers[:first] if any(isinstance(ffn, DenseFFN) for ffn in layer.ffns)]
    if not first or len(set(dense)) != 1 or len(set(layers[first:])) != 1:
        raise NotComparableError(_("first_k_dense_replace of a model that is not dense layers and then experts"))
    return dense[0], layers[first]


def _attention_changed(layer: Layer, overrides: dict[str, Any]) -> Layer:
    changes: dict[str, Any] = {}
    if "num_key_value_heads" in overrides:
        changes["num_kv_heads"] = overrides["num_key_value_heads"]
    if "qkv_bias" in overrides:
        changes |= dict.fromkeys(("q_bias", "k_bias", "v_bias"), overrides["qkv_bias"])
    if not changes:
        return layer
    if not all(isinstance(mixer, Attention) for mixer in layer.mixers):
        raise NotComparableError(_("changed heads or biases of an attention that is not grouped-query"))
    heads = changes.get("num_kv_heads", 1)
    if any(not heads or mixer.num_heads % heads for mixer in layer.mixers if isinstance(mixer, Attention)):
        raise NotComparableError(_("KV heads that do not divide the attention heads"))
    return replace(layer, mixers=tuple(replace(mixer, **changes) for mixer in layer.mixers))


def _mtp(model: Model, number: int | None) -> Any:
    if number is None or number == len(model.mtp):
        return model.mtp
    if number > len(model.mtp):
        raise NotComparableError(_("more MTP modules than the model has"))
    return model.mtp[:number]
