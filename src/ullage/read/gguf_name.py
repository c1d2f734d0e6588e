"""The name of a GGUF file or repository that is not at hand → the catalog's model and the type of its tensors.

``-hf unsloth/DeepSeek-R1-GGUF:UD-Q2_K_XL``, ``/models/Qwen_Qwen3-30B-A3B-IQ4_XS-00001-of-00002.gguf``. Where the file's
own name says nothing (``model.gguf``), the folders above it do. What is taken from a name is assumed, and said.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ullage.catalog import models as catalog
from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _

_PART = re.compile(r"-\d{5}-of-\d{5}$")
#: The type at the end of a name; makers put ``UD-``, ``mix-``, ``i1-`` and the like before it.
_TYPE = re.compile(
    r"(?:^|[-._])(?P<type>(?:UD-|mix-|i1-|smol-|pure-)*D?(?:I?Q\d(?:_[A-Z0-9]+)*|BF16|F16|F32|MXFP4(?:_MOE)?|TQ[12]_0))$",
    re.IGNORECASE,
)
#: Endings that say how a file was made, and nothing of the model's shape.
_MAKING = re.compile(r"[-_.](?:GGUF|merged|imat|imatrix|pure|fixed|bartowski-imat|128K|1M)$", re.IGNORECASE)


class NamedGguf(Frozen):
    """What a name says: the model's name in the catalog, and the type of the file (empty: not said)."""

    model: str
    file_type: str


def named_gguf(text: str) -> NamedGguf | None:
    """Return what the name of a file or a repository says, None where no model of the catalog is meant."""
    place, colon, tag = text.partition(":") if "://" not in text else (text.partition("?")[0], "", "")
    parts = [part for part in re.split(r"[/\\]", place) if part]
    file_type = tag if colon and _TYPE.fullmatch(f"-{tag}") else ""
    for part in reversed(parts):
        name, found = _without_type(part)
        file_type = file_type or found
        for candidate in _candidates(name):
            if catalog.find(candidate) is not None:
                return NamedGguf(model=candidate, file_type=file_type)
    return None


def _without_type(part: str) -> tuple[str, str]:
    name = _PART.sub("", re.sub(r"\.gguf$", "", part, flags=re.IGNORECASE))
    file_type = ""
    while True:
        match = _TYPE.search(name)
        making = _MAKING.search(name)
        if match is not None:
            name, file_type = name[: match.start()], file_type or match["type"]
        elif making is not None:
            name = name[: making.start()]
        else:
            return name, file_type


def _candidates(name: str) -> Iterator[str]:
    """Yield the name, the name without its owner (``Qwen_Qwen3-8B``, ``models--owner--name``), and with its size."""
    if len(name) < 4 or not any(sign.isdigit() for sign in name):
        return
    yield name
    if "--" in name:
        yield name.rpartition("--")[2]
    if "_" in name:
        yield name.partition("_")[2]


def not_here(text: str) -> InputError:
    """Return the error for a file that is not here and whose name says nothing."""
    return InputError(
        _("the file {name} is not here, and its name is that of no model in the catalog").format(name=text[-80:]),
        remedy=_("name the model before the line, as in ullage fit serve deepseek-r1 --from …, or give the file"),
    )
