"""Keys of a model's config that a launch line overrides → the model as the engine will see it.

Followed are the longest context and the rope that stretches it; of every other key the answer says that it was not.

Source: vllm@0.33.0:vllm/config/model.py:_get_and_verify_max_len (rope of type yarn: the original length times the
factor; other types with a factor: the length times the factor; llama3, longrope, su and mrope: the length);
sglang@0.5.23:srt/configs/model_config.py:ModelConfig (``context_len`` of the overridden config).
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from ullage.errors import InputError
from ullage.i18n import _
from ullage.spec.model import Model
from ullage.units import MAX_COUNT

_ROPE = ("rope_scaling", "rope_parameters")
_LENGTH_KEPT = ("su", "longrope", "llama3", "mrope", "default")
_TEXT = ("text_config", "language_config", "llm_config")
#: Keys that say how positions are computed, and take no memory.
_FREE = frozenset(("rope_theta", "partial_rotary_factor", "matryoshka_dimensions", "jina_task"))


def parse_overrides(text: str, flag: str) -> dict[str, Any]:
    """Return the JSON object of ``flag``.

    Raises:
        InputError: it is none.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(_("the value is not JSON: {error}").format(error=str(error)[:80]), where=flag) from None
    if not isinstance(values, dict):
        raise InputError(_("the value is not a JSON object"), where=flag)
    return values


def overridden(model: Model, values: dict[str, Any], flag: str) -> Model:
    """Return the model with the keys that are followed; what is not is added to its ``assumed``."""
    own = {key: value for key, value in values.items() if key not in _TEXT}
    for key in _TEXT:
        nested = values.get(key)
        own.update(nested if isinstance(nested, dict) else {})
    length = _length(model, own, flag)
    left = [key for key in own if key not in (*_ROPE, *_FREE, "max_position_embeddings")]
    said = tuple(_("{flag}: {key} is not followed").format(flag=flag, key=key[:60]) for key in left)
    if not said and length == model.max_position_embeddings:
        return model
    return replace(model, max_position_embeddings=length, assumed=(*model.assumed, *said))


def _length(model: Model, values: dict[str, Any], flag: str) -> int:
    """Return the longest context: of the overridden key, stretched by the overridden rope."""
    length = _number(values.get("max_position_embeddings"), model.max_position_embeddings, flag)
    rope: dict[str, Any] = next((values[key] for key in _ROPE if isinstance(values.get(key), dict)), {})
    kind = str(rope.get("rope_type", rope.get("type", "default"))).lower()
    if kind in _LENGTH_KEPT:
        return int(length)
    if kind == "yarn":
        length = _number(rope.get("original_max_position_embeddings"), length, flag)
    return int(length * _number(rope.get("factor"), 1, flag))


def _number(value: Any, fallback: float, flag: str) -> float:
    if value is None:
        return fallback
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= MAX_COUNT:
        raise InputError(_("{value!r} is not a length or a factor").format(value=str(value)[:40]), where=flag)
    return value
