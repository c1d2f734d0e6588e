"""GGUF headers, versions 2 and 3 → metadata and the table of tensors, without reading a weight.

Format: magic, version, counts; key-value pairs; tensor infos (name, axes, ggml type, offset); padding; data.
Source: ggml:docs/gguf.md; gguf@0.17:gguf/gguf_reader.py:GGUFReader.
"""

from __future__ import annotations

import mmap
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ullage.account.gguf_types import BY_NUMBER, GgmlType
from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _

if TYPE_CHECKING:
    from ullage.spec.model import Model

MAX_TENSORS = 1_000_000
MAX_KEYS = 100_000
MAX_STRING_BYTES = 2**26
MAX_ARRAY_VALUES = 8_000_000
KEPT_ARRAY_VALUES = 16_384
MAX_AXES = 8
MAX_FILES = 10_000
_SHARD = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$")
#: Value type -> struct code; 8 string and 9 array are read apart.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class Tensor(Frozen):
    """One tensor; ``shape`` slowest axis first, the row length last."""

    name: str
    shape: tuple[int, ...]
    kind: GgmlType
    num_bytes: int


class SkippedArray(Frozen):
    """A long array (a tokenizer's) of which only the length was kept."""

    length: int


class GgufFile(Frozen):
    """A GGUF, all its shards together.

    ``missing_bytes``: data that the table announces and the files do not hold (a header alone, a broken download).
    """

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    source: str
    missing_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, padding left out."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())


class _Cursor:
    """A bounded reader over a mapped file."""

    def __init__(self, data: mmap.mmap, where: str) -> None:
        self.data, self.where, self.position, self.size = data, where, 0, len(data)

    def bad(self, what: str) -> InputError:
        return InputError(
            what, where=f"{self.where}: byte {self.position:,}", remedy=_("the file is damaged or no GGUF file")
        )

    def take(self, code: str) -> Any:
        width = struct.calcsize("<" + code)
        if self.position + width > self.size:
            raise self.bad(_("the file ends inside its header"))
        (value,) = struct.unpack_from("<" + code, self.data, self.position)
        self.position += width
        return value

    def count(self, limit: int, what: str) -> int:
        value = int(self.take("Q"))
        if value > limit:
            raise self.bad(_("{value:,} {what} are more than {limit:,}").format(value=value, what=what, limit=limit))
        return value

    def skip(self, width: int) -> None:
        if self.position + width > self.size:
            raise self.bad(_("the file ends inside its header"))
        self.position += width

    def string(self) -> str:
        length = self.count(MAX_STRING_BYTES, _("bytes in a string"))
        start = self.position
        self.skip(length)
        return self.data[start : self.position].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        raise self.bad(_("the value type {kind} is not known").format(kind=kind))

    def array(self) -> Any:
        kind = int(self.take("I"))
        length = self.count(MAX_ARRAY_VALUES, _("values in an array"))
        if kind in _SCALARS:
            code = _SCALARS[kind]
            start, width = self.position, struct.calcsize("<" + code)
            self.skip(length * width)
            if length > KEPT_ARRAY_VALUES:
                return SkippedArray(length=length)
            return list(struct.unpack_from(f"<{length}{code}", self.data, start))
        if kind != _STRING:
            raise self.bad(_("arrays of type {kind} are not understood").format(kind=kind))
        if length <= KEPT_ARRAY_VALUES:
            return [self.string() for _index in range(length)]
        for _index in range(length):
            self.skip(self.count(MAX_STRING_BYTES, _("bytes in a string")))
        return SkippedArray(length=length)


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF; of a split one (``-00001-of-00003.gguf``) all shards.

    Raises:
        InputError: not readable, damaged, or a shard is missing.
    """
    return _merge([_read_file(file) for file in _shards(path)], str(path))


def _shards(path: Path) -> list[Path]:
    match = _SHARD.match(path.name)
    if match is None:
        return [path]
    number = int(match.group(3))
    if not 1 <= number <= MAX_FILES:
        raise InputError(_("{number} shards are not usable").format(number=number), where=str(path))
    return [path.with_name(f"{match.group(1)}-{index:05d}-of-{number:05d}.gguf") for index in range(1, number + 1)]


def _merge(parts: list[GgufFile], where: str) -> GgufFile:
    tensors: dict[str, Tensor] = {}
    for part in parts:
        twice = next((name for name in part.tensors if name in tensors), None)
        if twice is not None:
            raise InputError(_("{name} is stored twice").format(name=twice[:200]), where=where)
        tensors.update(part.tensors)
    stated = parts[0].metadata.get("split.tensors.count")
    if len(parts) > 1 and isinstance(stated, int) and stated != len(tensors):
        raise InputError(
            _("the shards hold {got} tensors, {want} are announced").format(got=len(tensors), want=stated), where=where
        )
    missing = sum(part.missing_bytes for part in parts)
    return GgufFile(metadata=parts[0].metadata, tensors=tensors, source=where, missing_bytes=missing)


def _read_file(path: Path) -> GgufFile:
    where = str(path)
    try:
        if not path.is_file():
            raise InputError(_("no such file"), where=where)
        if path.stat().st_size < 24:
            raise InputError(_("the file is too short to be a GGUF"), where=where)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read_header(_Cursor(data, where))
    except OSError as error:
        raise InputError(_("cannot be read ({reason})").format(reason=error.strerror), where=where) from None


def _read_header(cursor: _Cursor) -> GgufFile:
    if cursor.data[:4] != b"GGUF":
        raise cursor.bad(_("the file does not begin with GGUF"))
    cursor.skip(4)
    version = int(cursor.take("I"))
    if version not in (2, 3):
        raise cursor.bad(_("GGUF version {version} is not understood (2 and 3 are)").format(version=version))
    num_tensors = cursor.count(MAX_TENSORS, _("tensors"))
    metadata: dict[str, Any] = {}
    for _index in range(cursor.count(MAX_KEYS, _("keys"))):
        key = cursor.string()
        if key in metadata:
            raise cursor.bad(_("the key {key} stands twice").format(key=key[:80]))
        metadata[key] = cursor.value(int(cursor.take("I")))
    tensors: dict[str, Tensor] = {}
    spans: list[tuple[int, int]] = []
    for _index in range(num_tensors):
        tensor, offset = _tensor(cursor)
        if tensor.name in tensors:
            raise cursor.bad(_("{name} is stored twice").format(name=tensor.name[:200]))
        tensors[tensor.name] = tensor
        spans.append((offset, offset + tensor.num_bytes))
    end = _check_spans(cursor, spans, metadata)
    return GgufFile(metadata=metadata, tensors=tensors, source=cursor.where, missing_bytes=max(0, end - cursor.size))


def _tensor(cursor: _Cursor) -> tuple[Tensor, int]:
    name = cursor.string()
    num_axes = int(cursor.take("I"))
    if num_axes > MAX_AXES:
        raise cursor.bad(_("{name} has {axes} axes").format(name=name[:80], axes=num_axes))
    axes = [int(cursor.take("Q")) for _axis in range(num_axes)]
    number, offset = int(cursor.take("I")), int(cursor.take("Q"))
    if number not in BY_NUMBER:
        raise cursor.bad(_("{name} has the unknown ggml type {number}").format(name=name[:80], number=number))
    kind, shape = BY_NUMBER[number], tuple(reversed(axes))
    if any(size >= 2**48 for size in shape) or (shape and shape[-1] % kind.block_size):
        raise cursor.bad(
            _("the shape {shape} of {name} is not usable for {kind}").format(
                shape=shape, name=name[:80], kind=kind.name
            )
        )
    return Tensor(name=name, shape=shape, kind=kind, num_bytes=kind.tensor_bytes(shape)), offset


def _check_spans(cursor: _Cursor, spans: list[tuple[int, int]], metadata: dict[str, Any]) -> int:
    """Check that tensors neither overlap nor stand unaligned; return where the data ends in the file."""
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise cursor.bad(_("the alignment {value} is not a power of two").format(value=repr(alignment)[:40]))
    position = 0
    for begin, end in sorted(spans):
        if begin < position or begin % alignment:
            raise cursor.bad(_("tensors overlap or are not aligned at offset {begin}").format(begin=begin))
        position = end
    start = -(-cursor.position // alignment) * alignment
    return start + position if spans else 0


def read_gguf_model(path: Path) -> Model:
    """Read the model that a GGUF describes, with the type of each tensor as its quantisation.

    Raises:
        InputError: not a usable GGUF.
        UnknownArchitectureError: tensors or settings that are not understood.
    """
    from ullage.read.gguf_model import model_of

    return model_of(read_gguf(path))
