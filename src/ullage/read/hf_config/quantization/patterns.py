"""Module names of quantisation configs → regular expressions over parameter names.

Configs list modules one by one, by glob or by regular expression; the lists of large models have thousands of entries.
Equal entries of many layers are folded into one expression, so that matching stays fast and the rules can be read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

#: Prefixes that wrappers put before the text model; the same module is listed with and without them.
_WRAPPERS = re.compile(r"^(?:model\.)?(?:language_model\.)?(?:model\.)?(?=layers\.|embed_tokens|lm_head|norm\b)")
_WRAPPERS_PATTERN = r"^(?:(?:model|language_model|backbone)\.)*"
#: DeepSeek-V4's own names beside those of Hugging Face.
_SAME = {"ffn": "(?:ffn|mlp)", "attn": "(?:attn|self_attn)", "head": "(?:head|lm_head)"}
_LAYER = re.compile(r"^(.*?\b(?:layers|blocks)\.)(\d+)(?=\.|$)(.*)$")
MAX_NAMES = 500_000

#: Towers and projectors are quantised only where a config lists them by name.
TOWERS = (
    r"(?:^|\.)(?:visual|vision\w*|audio\w*|embed_vision|embed_audio|multi_modal_projector|mm_projector|projector)\."
)


def _piece(component: str) -> str:
    return _SAME.get(component) or re.escape(component)


def _dotted(name: str) -> str:
    """Return the pattern of a dotted name, its globs translated; an open end matches whole components."""
    closed = "" if name.endswith("*") else r"(?=\.|$)"
    text = r"\.".join(
        ".*".join(_piece(bit) for bit in component.split("*")) if "*" in component else _piece(component)
        for component in name.split(".")
    )
    return text + closed


def module_pattern(name: str) -> str:
    """Return the pattern of one module: ``lm_head``, ``model.layers.0.mlp.gate``, ``*.attn.*``.

    A name that starts at the text model is anchored there, whatever wraps the text model; another one may stand at any
    dot.
    """
    bare = _WRAPPERS.sub("", name)
    if bare != name or bare.startswith("layers."):
        return _WRAPPERS_PATTERN + _dotted(bare)
    if name.startswith("*"):
        return _dotted(name.lstrip("*").lstrip("."))
    return r"(?:^|\.)" + _dotted(name)


def fold_modules(names: Iterable[str], *, num_layers: int = 0) -> tuple[str, ...]:
    """Return few patterns for many module names: names that differ only in the layer's number share one.

    ``num_layers``: a list that covers all of them does not name layers at all.
    """
    layers_of: dict[tuple[str, str], set[int]] = {}
    patterns: list[str] = []
    for name in names:
        match = _LAYER.match(name)
        if match is None or "*" in match.group(1):
            patterns.append(module_pattern(name))
        else:
            layers_of.setdefault((match.group(1), match.group(3)), set()).add(int(match.group(2)))
    tails_of: dict[tuple[str, frozenset[int]], list[str]] = {}
    for (head, tail), layers in layers_of.items():
        tails_of.setdefault((head, frozenset(layers)), []).append(tail)
    for (head, layers_set), tails in tails_of.items():
        patterns.append(_layers_pattern(head, layers_set, tails, num_layers))
    return tuple(dict.fromkeys(patterns))


def _layers_pattern(head: str, layers: frozenset[int], tails: Sequence[str], num_layers: int) -> str:
    whole = num_layers and head.endswith("layers.") and layers >= set(range(num_layers))
    numbers = r"\d+" if whole else "|".join(map(str, sorted(layers)))
    ends = "|".join(_dotted(tail) for tail in tails)
    bare = _WRAPPERS.sub("", head)
    start = _WRAPPERS_PATTERN + re.escape(bare) if bare.startswith("layers.") else r"(?:^|\.)" + re.escape(head)
    return f"{start}(?:{numbers})(?:{ends})"
