"""The bytes of each tensor of the file: by the file type's rules, or by the mix that explains the stated size.

A name such as ``IQ3_K_R4`` on a file from a custom recipe says what the expert's up and gate projections are, not the
rest. With the file's size known, the recipes that reach this size are few: the rest is held in one better type, and
ffn_down in the same or a better one. What several recipes can explain becomes the range.

Source: llama.cpp@007dbbf3:src/llama-quant.cpp; ik_llama.cpp@8337e4cd:examples/quantize/quantize.cpp (``--custom-q``).
"""

from __future__ import annotations

import re

from ullage.account.gguf_types import ggml_type
from ullage.account.weights import stored_format
from ullage.engines.llamacpp import mixes
from ullage.engines.llamacpp.gguf_names import GgufTensor, LatentStorage, gguf_tensors
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.spec.model import Model
from ullage.units import GiB

_PLAIN = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
_SIZED = re.compile(r"\(\s*(\d+(?:\.(\d+))?)\s*(GiB|GB)\b", re.IGNORECASE)
_NAME = re.compile(r"(?<![A-Z0-9])(I?Q\d_[A-Z0-9]+(?:_[A-Z0-9]+)*|MXFP4_MOE|MXFP4|TQ[12]_0|BF16|F16|F32)(?![A-Z0-9])")
#: types that recipes give to everything but the experts, and to ffn_down
_REST = ("Q8_0", "IQ6_K", "Q6_K", "IQ5_K", "IQ5_KS", "Q5_K", "IQ4_K", "Q4_K")
_DOWN = (
    "IQ2_KS",
    "Q2_K",
    "IQ2_K",
    "IQ3_KS",
    "IQ3_K",
    "Q3_K",
    "IQ4_KSS",
    "IQ4_KS",
    "IQ4_K",
    "Q4_K",
    "IQ5_KS",
    "IQ5_K",
    "Q5_K",
    "IQ6_K",
    "Q6_K",
    "Q8_0",
)
#: a recipe explains a size that it meets this closely (logs print the size to 0.001 GiB, alignment comes on top)
_EXPLAINED = 0.004


class Contents(Frozen):
    """The file's tensors and their bytes. ``spread``: other byte lists that explain the file equally well."""

    tensors: tuple[GgufTensor, ...]
    types: tuple[str, ...]
    sizes: tuple[int, ...]
    spread: tuple[tuple[int, ...], ...]
    exact: bool
    how: str
    assumed: tuple[str, ...]


def stated_size(quantization: str) -> int | None:
    """Return the bytes in ``gguf:Q4_K_M (16.493 GiB)``, or None."""
    match = _SIZED.search(quantization)
    if not match:
        return None
    return int(float(match[1]) * (GiB if match[3].lower() == "gib" else 10**9))


def _rounding(quantization: str) -> float:
    """Return the bytes that the printed size may be off: half of its last digit."""
    match = _SIZED.search(quantization)
    return GiB * 0.5 / 10 ** len(match[2] or "") if match else 0.0


def file_type(quantization: str) -> str | None:
    """Return the file type in a description: ``gguf:UD-Q4_K_XL (...)`` → Q4_K_M, ``mix-IQ3_K`` → IQ3_K."""
    match = _NAME.search(quantization.upper())
    if not match:
        return None
    name = "MXFP4_MOE" if match[1] == "MXFP4" else match[1]  # experts in MXFP4, the rest in Q8_0
    for ending, instead in (("_XL", "_M"), ("_XXL", "_M"), ("_L", "_L")):
        if name.endswith(ending) and mixes.base_type(name) is None:
            name = name.removesuffix(ending) + instead
    while mixes.base_type(name) is None and "_" in name:
        name = name.rsplit("_", 1)[0]
    return name if mixes.base_type(name) else None


def contents(
    model: Model, quantization: str | None, latent: LatentStorage, *, usual: tuple[str, ...] = ("Q4_K_M",)
) -> Contents:
    """Return every tensor of the file with its type and bytes.

    ``usual``: file types that are likely when none is stated, likeliest first.
    """
    tensors = gguf_tensors(model, latent)
    text = quantization or ""
    if not text and model.quantization is not None and model.quantization.method == "gguf":
        return _stored(model, tensors)
    name, size = file_type(text), stated_size(text)
    assumed: list[str] = []
    if name is None:
        name = usual[0] if size is None else _nearest_file_type(model, tensors, size)
        assumed.append(_("file type not stated, taken to be {name}").format(name=name))
    facts = mixes.mix_facts(model)
    types = _types(tensors, name, facts, size)
    sizes = _sizes(tensors, types)
    custom = any(sign in text.upper() for sign in ("_XL", "MIX", "UD-"))
    how = _("types of {name} by the quantiser's rules").format(name=name)
    if size is None:
        others = tuple(_sizes(tensors, _types(tensors, kind, facts, None)) for kind in usual[1:] if assumed)
        return _result(tensors, types, sizes, others, exact=not assumed and not custom, how=how, assumed=assumed)
    error = abs(sum(sizes) - size)
    if error <= _rounding(text) + size / 2000:
        return _result(tensors, types, sizes, (), exact=True, how=how, assumed=assumed)
    if error < size * _EXPLAINED / 2 and not custom:
        return _result(tensors, types, _scaled(tensors, sizes, size), (), exact=True, how=how, assumed=assumed)
    found = _recipes(tensors, name, types, size)
    if found:
        types, _recipe_sizes, how = found[0]
        assumed.append(_("types inferred from the file's size: {how}").format(how=how))
        lists = [_scaled(tensors, entry[1], size) for entry in found]
        return _result(tensors, types, lists[0], tuple(lists[1:]), exact=False, how=how, assumed=assumed)
    return _by_scaling(tensors, types, size, assumed, name=name, custom=custom, how=how)


def _stored(model: Model, tensors: tuple[GgufTensor, ...]) -> Contents:
    """Return what a GGUF's own table says: the model was read from the file."""
    types = []
    for tensor in tensors:
        assert tensor.placed is not None
        name = stored_format(model, tensor.placed).name
        types.append("F32" if tensor.vector else _PLAIN.get(name, name))
    kinds = tuple(types)
    return _result(
        tensors, kinds, _sizes(tensors, kinds), (), exact=True, how=_("types read from the file"), assumed=[]
    )


def _by_scaling(
    tensors: tuple[GgufTensor, ...],
    types: tuple[str, ...],
    size: int,
    assumed: list[str],
    *,
    name: str,
    custom: bool,
    how: str,
) -> Contents:
    """Return the rules' bytes fitted to a size that no recipe explains: the experts take the difference, or all do."""
    sizes = _sizes(tensors, types)
    assumed.append(
        _("the rules of {name} give {ours:.3f} GiB, the file has {size:.3f}: scaled").format(
            name=name, ours=sum(sizes) / GiB, size=size / GiB
        )
    )
    ends = _bounds(tensors, sizes, size)
    if custom and ends:
        better = tuple(
            _recipe_type(tensor, "", None, "Q6_K", kind) for tensor, kind in zip(tensors, types, strict=True)
        )
        ends = (*ends, _sizes(tensors, better))
    scaled = _scaled(tensors, sizes, size)
    # dynamic mixes save on the experts and keep attention: the first end is the likelier
    first, others = (ends[0], (scaled, *ends[1:])) if ends and sum(sizes) > size else (scaled, ends)
    return _result(tensors, types, first, others, exact=False, how=how, assumed=assumed)


def _types(tensors: tuple[GgufTensor, ...], name: str, facts: mixes.MixFacts, size: int | None) -> tuple[str, ...]:
    """Return the types by rule; with or without an importance matrix, whichever meets the stated size better."""
    plain, with_matrix = (
        tuple(mixes.tensor_type(tensor, name, facts, imatrix=imatrix) for tensor in tensors)
        for imatrix in (False, True)
    )
    if size is None or plain == with_matrix:
        return with_matrix if name.startswith("I") else plain
    return min((plain, with_matrix), key=lambda types: abs(sum(_sizes(tensors, types)) - size))


def _result(
    tensors: tuple[GgufTensor, ...],
    types: tuple[str, ...],
    sizes: tuple[int, ...],
    spread: tuple[tuple[int, ...], ...],
    *,
    exact: bool,
    how: str,
    assumed: list[str],
) -> Contents:
    return Contents(
        tensors=tensors, types=types, sizes=sizes, spread=spread, exact=exact, how=how, assumed=tuple(assumed)
    )


def _sizes(tensors: tuple[GgufTensor, ...], types: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(ggml_type(kind).tensor_bytes(tensor.shape) for tensor, kind in zip(tensors, types, strict=True))


def _scaled(tensors: tuple[GgufTensor, ...], sizes: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Scale everything but the vectors so that the sum is ``size``."""
    kept = sum(amount for tensor, amount in zip(tensors, sizes, strict=True) if tensor.vector)
    movable = sum(sizes) - kept
    factor = (size - kept) / movable if movable else 1.0
    return tuple(
        amount if tensor.vector else int(amount * factor) for tensor, amount in zip(tensors, sizes, strict=True)
    )


def _bounds(tensors: tuple[GgufTensor, ...], sizes: tuple[int, ...], size: int) -> tuple[tuple[int, ...], ...]:
    """Return the two ends when no recipe is found: all of the difference in the experts, or all in the rest."""
    if not any(tensor.experts for tensor in tensors):
        return ()
    ends = []
    for in_experts in (True, False):
        moved = sum(amount for tensor, amount in zip(tensors, sizes, strict=True) if tensor.experts is in_experts)
        factor = (size - (sum(sizes) - moved)) / moved if moved else 1.0
        if 0.5 < factor < 2.0:
            ends.append(
                tuple(
                    int(amount * factor) if tensor.experts is in_experts and not tensor.vector else amount
                    for tensor, amount in zip(tensors, sizes, strict=True)
                )
            )
    return tuple(ends)


def _recipes(
    tensors: tuple[GgufTensor, ...], name: str, nominal: tuple[str, ...], size: int
) -> list[tuple[tuple[str, ...], tuple[int, ...], str]]:
    """Return the recipes that reach ``size``, closest first."""
    if not any(tensor.experts for tensor in tensors):
        return []
    base = mixes.base_type(name) or name
    suffix = base[len(mixes.plain_of(base)) :]
    floor = ggml_type(base).block_bytes / ggml_type(base).block_size
    found = []
    ik_types = ggml_type(base).number > 96
    for rest in (None, *(kind for kind in _REST if ik_types or ggml_type(kind).number <= 96)):
        for down in (None, *(kind for kind in _DOWN if ik_types or ggml_type(kind).number <= 96)):
            kind = None if down is None else down + suffix if suffix and _known(down + suffix) else down
            if kind and ggml_type(kind).block_bytes / ggml_type(kind).block_size < floor:
                continue
            types = tuple(
                _recipe_type(tensor, base, kind, rest, plain) for tensor, plain in zip(tensors, nominal, strict=True)
            )
            sizes = _sizes(tensors, types)
            error = abs(sum(sizes) - size) / size
            if error < _EXPLAINED:
                how = _("experts {base}, ffn_down {down}, the rest {rest}").format(
                    base=base, down=kind or _("by rule"), rest=rest or _("by rule")
                )
                found.append((error, types, sizes, how))
    found.sort(key=lambda entry: entry[0])
    return [entry[1:] for entry in found]


def _known(name: str) -> bool:
    return mixes.base_type(name) is not None


def _recipe_type(tensor: GgufTensor, base: str, down: str | None, rest: str | None, plain: str) -> str:
    if plain == "F32":
        return plain
    if tensor.experts:
        return plain if down is None else down if "ffn_down" in tensor.name else base
    if rest is None:
        return plain
    return rest if tensor.shape[-1] % ggml_type(rest).block_size == 0 else "Q8_0"


def _nearest_file_type(model: Model, tensors: tuple[GgufTensor, ...], size: int) -> str:
    """Return the usual file type whose size is nearest to ``size``."""
    facts = mixes.mix_facts(model)
    names = ("Q2_K", "Q3_K_M", "IQ4_XS", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "BF16")

    def distance(name: str) -> int:
        types = tuple(mixes.tensor_type(tensor, name, facts) for tensor in tensors)
        return abs(sum(_sizes(tensors, types)) - size)

    return min(names, key=distance)
