"""Values of llama.cpp's flags: whole numbers, and ``-ot``, ``-cmoe`` and the like as patterns with their buffers.

Source: llama-cpp-python@0.3.36:vendor/llama.cpp/common/common.h:LLM_FFN_EXPS_REGEX, LLM_FFN_DENSE_REGEX.
"""

from __future__ import annotations

import re

from ullage.errors import InputError
from ullage.i18n import _


def overrides(flags: dict[str, list[str]]) -> tuple[tuple[str, str], ...]:
    """Return (pattern, buffer) pairs from ``-ot a=CPU,b=CUDA0``, ``--cpu-moe`` and ``--n-cpu-moe``."""
    found: list[tuple[str, str]] = []
    for value in flags.get("override_tensor", []):
        for piece in value.split(","):
            pattern, equals, buffer = piece.rpartition("=")
            if not equals or not buffer:
                raise InputError(
                    _("{piece!r} is not an override").format(piece=piece[:80]), remedy=_("write for example exps=CPU")
                )
            found.append((_checked(pattern), buffer.strip()))
    if "cpu_moe" in flags:
        found.append((r"\.ffn_(up|down|gate)_(ch|)exps", "CPU"))
    for name, tensors in (("n_cpu_moe", "_(ch|)exps"), ("n_cpu_ffn", r"\.weight")):
        num_host = min(integer(name, flags.get(name, ["0"])[-1]), 10_000)
        found += [(rf"blk\.{layer}\.ffn_(up|down|gate){tensors}", "CPU") for layer in range(num_host)]
    return tuple(found)


def _checked(pattern: str) -> str:
    """Return ``pattern`` if it is a regular expression of sane size."""
    if len(pattern) > 2000:
        raise InputError(_("an override pattern is longer than 2,000 characters"))
    try:
        re.compile(pattern)
    except re.error as error:
        raise InputError(_("{pattern!r} is not a regular expression").format(pattern=pattern[:80])) from error
    return pattern


def integer(name: str, value: str) -> int:
    """Return a whole number.

    Raises:
        InputError: none.
    """
    try:
        return int(float(str(value)))
    except (ValueError, OverflowError) as error:
        raise InputError(
            _("{name} = {value!r} is not a whole number").format(name=name, value=str(value)[:40])
        ) from error
