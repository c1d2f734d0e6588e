"""A model type that is not known, read on the user's word as a plain pre-norm decoder with grouped-query attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ullage.i18n import _
from ullage.read.hf_config.families import llama
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import Model

#: what a plain decoder's config must tell
EVIDENCE = frozenset(
    {
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "vocab_size",
    }
)


def is_plain(values: dict[str, Any]) -> bool:
    """Return whether the config tells everything a plain decoder needs; nothing is guessed."""
    return all(values.get(key) is not None for key in EVIDENCE)


def read(keys: Keys) -> Model:
    """Read it as Llama. Keys that Llama does not know end up in ``ignored_keys``, as always with ``--assume``."""
    model = llama.read(keys)
    said = _("the model type {model_type!r} is not known: read as a plain pre-norm decoder, as Llama is").format(
        model_type=str(keys.values.get("model_type"))[:80]
    )
    return replace(model, assumed=(*model.assumed, said))
