"""Safetensors headers → name, dtype, shape and bytes of every stored tensor, without reading a weight.

Format: 8 bytes little-endian header length, a JSON header, then the tensors without holes.
Source: safetensors@0.5:README.md "Format"; safetensors/src/tensor.rs:Metadata.validate.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import field
from pathlib import Path
from typing import Any

from ullage.errors import InputError, MissingExtraError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.read.jsonfile import read_json_object

MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own reader
MAX_INDEX_BYTES = 256 * 2**20
MAX_SHARDS = 10_000
MAX_AXES = 64

#: dtype of the header -> bits of one value.
DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E4M3FNUZ": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
}


class StoredTensor(Frozen):
    """One tensor as a checkpoint stores it; ``dtype`` as the header names it (``BF16``, ``F8_E4M3``)."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


class StoredTensors(Frozen):
    """All tensors of a checkpoint by name."""

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    source: str = ""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, headers left out."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())


def _bad(what: str, where: str) -> InputError:
    return InputError(what, where=where, remedy=_("the file is damaged or no safetensors file"))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def read_header(path: Path) -> StoredTensors:
    """Read the header of one file and check it against the file's size.

    Raises:
        InputError: not readable, or not a sound safetensors file.
    """
    where = str(path)
    try:
        if not path.is_file():
            raise InputError(_("no such file"), where=where)
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            if len(first) < 8:
                raise _bad(_("the file has no header"), where)
            (length,) = struct.unpack("<Q", first)
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise _bad(_("the header's length {length} does not fit the file").format(length=length), where)
            text = file.read(length)
    except OSError as error:
        raise InputError(_("cannot be read ({reason})").format(reason=error.strerror), where=where) from None
    return parse_header(text, where=where, data_bytes=size - 8 - length)


def parse_header(text: bytes, *, where: str, data_bytes: int) -> StoredTensors:
    """Parse a header; the tensors must fill ``data_bytes`` without holes.

    Raises:
        InputError: anything else.
    """
    try:
        values = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _bad(_("the header is not sound JSON ({reason})").format(reason=str(error)[:80]), where) from None
    if not isinstance(values, dict):
        raise _bad(_("the header is not a JSON object"), where)
    values.pop("__metadata__", None)
    spans, tensors = [], {}
    for name, entry in values.items():
        tensor, begin, end = _entry(entry, f"{where}: {name[:200]}")
        tensors[name] = tensor
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise _bad(_("the tensors overlap or leave holes at byte {position}").format(position=position), where)
        position = end
    if position != data_bytes:
        raise _bad(_("the tensors end at byte {end}, the data at {size}").format(end=position, size=data_bytes), where)
    return StoredTensors(tensors=tensors, source=where)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _entry(entry: Any, where: str) -> tuple[StoredTensor, int, int]:
    """Check one entry; return the tensor and its span."""
    if not isinstance(entry, dict):
        raise _bad(_("the entry is not an object"), where)
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if dtype not in DTYPE_BITS:
        raise _bad(_("the dtype {dtype} is not known").format(dtype=repr(dtype)[:40]), where)
    if not isinstance(shape, list) or len(shape) > MAX_AXES or not all(map(_is_count, shape)):
        raise _bad(_("the shape {shape} is not usable").format(shape=repr(shape)[:80]), where)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise _bad(_("the offsets {offsets} are not usable").format(offsets=repr(offsets)[:80]), where)
    num_bits = math.prod(shape) * DTYPE_BITS[dtype]
    if num_bits % 8 or offsets[1] - offsets[0] != num_bits // 8:
        raise _bad(
            _("{dtype} {shape} takes {want} bytes, the offsets span {got}").format(
                dtype=dtype, shape=str(shape)[:80], want=num_bits // 8, got=offsets[1] - offsets[0]
            ),
            where,
        )
    return StoredTensor(dtype=dtype, shape=tuple(shape), num_bytes=num_bits // 8), offsets[0], offsets[1]


def read_stored(path: Path) -> StoredTensors:
    """Read a checkpoint: one file, an index with its shards, or a folder of either.

    Raises:
        InputError: no checkpoint there, a shard is missing, or a name is stored twice.
    """
    if path.is_dir():
        index = path / "model.safetensors.index.json"
        if index.is_file():
            return _read_index(index)
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise InputError(_("there is no safetensors file"), where=str(path))
        return _merge((read_header(file) for file in files[:MAX_SHARDS]), str(path))
    if path.name.endswith(".index.json"):
        return _read_index(path)
    return read_header(path)


def _read_index(index: Path) -> StoredTensors:
    weight_map = read_json_object(index, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(_("weight_map is not an object of file names"), where=str(index))
    names = sorted(set(weight_map.values()))
    if len(names) > MAX_SHARDS or any(Path(name).name != name or name in ("", ".", "..") for name in names):
        raise InputError(_("weight_map names a file outside its folder"), where=str(index))
    stored = _merge((read_header(index.with_name(name)) for name in names), str(index))
    missing = next((name for name in weight_map if name not in stored.tensors), None)
    if missing is not None:
        raise InputError(_("no shard holds {name}").format(name=missing[:200]), where=str(index))
    return stored


def _merge(parts: Iterable[StoredTensors], where: str) -> StoredTensors:
    tensors: dict[str, StoredTensor] = {}
    for part in parts:
        twice = next((name for name in part.tensors if name in tensors), None)
        if twice is not None:
            raise InputError(_("{name} is stored in two files").format(name=twice[:200]), where=where)
        tensors.update(part.tensors)
    return StoredTensors(tensors=tensors, source=where)


def read_hub(repo: str, *, revision: str | None = None) -> StoredTensors:
    """Read the headers of a checkpoint on the hub over HTTP ranges: some MB for the largest models.

    Raises:
        MissingExtraError: huggingface_hub is not installed.
        InputError: no such repository, no safetensors in it, or the network fails.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise MissingExtraError("huggingface_hub", "hub") from None
    try:
        found = HfApi().get_safetensors_metadata(repo, revision=revision)
    except Exception as error:  # the client raises many kinds, some not its own
        raise InputError(
            _("headers cannot be fetched ({reason})").format(reason=str(error).split("\n", 1)[0][:200]), where=repo
        ) from None
    return _merge((_of_hub_file(file.tensors, f"{repo}/{name}") for name, file in found.files_metadata.items()), repo)


def _of_hub_file(tensors: dict[str, Any], where: str) -> StoredTensors:
    checked = {}
    for name, info in tensors.items():
        entry = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": list(info.data_offsets)}
        checked[name] = _entry(entry, f"{where}: {name[:200]}")[0]
    return StoredTensors(tensors=checked, source=where)
