"""Safetensors headers: files written by the format's own writer, and damaged ones."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ullage.errors import InputError, MissingExtraError
from ullage.read import safetensors_header
from ullage.read.safetensors_header import StoredTensor, read_header, read_hub, read_stored


def written(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str = "U8", shape: tuple[int, ...] = (4,), begin: int = 0, end: int = 4) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_what_the_writer_writes_is_read(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    writer = pytest.importorskip("safetensors.numpy")
    arrays = {
        "a.weight": numpy.zeros((3, 5), numpy.float32),
        "b": numpy.zeros((), numpy.int64),
        "empty": numpy.zeros((0, 7), numpy.float16),
        "flags": numpy.zeros((9,), numpy.bool_),
    }
    path = tmp_path / "model.safetensors"
    writer.save_file(arrays, path, metadata={"format": "np"})
    stored = read_header(path)
    assert {name: (tensor.shape, tensor.num_bytes) for name, tensor in stored.tensors.items()} == {
        name: (array.shape, array.nbytes) for name, array in arrays.items()
    }
    assert stored.tensors["a.weight"].dtype == "F32"
    assert stored.num_bytes == sum(array.nbytes for array in arrays.values())


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [("F8_E4M3", (2, 3), 6), ("F8_E8M0", (5,), 5), ("F4", (2, 4), 4), ("BF16", (3,), 6), ("C64", (2,), 16)],
)
def test_small_formats(tmp_path: Path, dtype: str, shape: tuple[int, ...], size: int) -> None:
    path = written(tmp_path / "x.safetensors", {"x": entry(dtype, shape, 0, size)}, bytes(size))
    assert read_header(path).tensors["x"] == StoredTensor(dtype=dtype, shape=shape, num_bytes=size)


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"x": entry(dtype="Q4")}, bytes(4)),
        ({"x": entry(shape=(5,))}, bytes(4)),
        ({"x": entry(shape=(-4,))}, bytes(4)),
        ({"x": entry(dtype="F4", shape=(3,), end=2)}, bytes(2)),
        ({"x": entry(begin=1, end=5)}, bytes(5)),  # a hole
        ({"x": entry(), "y": entry(begin=2, end=6)}, bytes(6)),  # an overlap
        ({"x": entry()}, bytes(3)),  # cut short
        ({"x": entry()}, bytes(5)),  # more than the header says
        ({"x": entry(shape=(2**61, 2**61))}, bytes(4)),
        ({"x": [1]}, b""),
        ({"x": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, b"\0"),
        (b'{"x": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}, "x": {}}', b""),  # a name twice
        (b"[" * 100_000, b""),
        (b"\xff\xfe", b""),
        ([], b""),
    ],
)
def test_damaged_headers_are_refused_in_one_sentence(tmp_path: Path, header: Any, data: bytes) -> None:
    with pytest.raises(InputError) as caught:
        read_header(written(tmp_path / "x.safetensors", header, data))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("length", [2**63, 2**32, 200])
def test_an_absurd_length_is_refused_before_it_is_read(tmp_path: Path, length: int) -> None:
    with pytest.raises(InputError, match="length"):
        read_header(written(tmp_path / "x.safetensors", {}, length=length))


def test_empty_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "empty.safetensors").write_bytes(b"\1\2")
    for name in ("empty.safetensors", "absent.safetensors"):
        with pytest.raises(InputError):
            read_header(tmp_path / name)


def sharded(folder: Path, weight_map: dict[str, str] | None = None) -> Path:
    for number, name in enumerate(("a", "b"), start=1):
        written(folder / f"model-{number}.safetensors", {name: entry()}, bytes(4))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map or {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    return index


def test_shards_are_read_together(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    assert set(read_stored(index).tensors) == set(read_stored(tmp_path).tensors) == {"a", "b"}
    index.unlink()
    assert read_stored(tmp_path).num_bytes == 8


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": "../outside.safetensors"},
        {"a": "/etc/passwd"},
        {"a": "absent.safetensors"},
        {"a": 3},
        {"c": "model-1.safetensors"},
    ],
)
def test_an_index_cannot_lead_astray(tmp_path: Path, weight_map: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        read_stored(sharded(tmp_path, weight_map))


def test_a_name_in_two_files_is_refused(tmp_path: Path) -> None:
    for number in (1, 2):
        written(tmp_path / f"{number}.safetensors", {"a": entry()}, bytes(4))
    with pytest.raises(InputError, match="two files"):
        read_stored(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no safetensors"):
        read_stored(tmp_path)


class FakeHub:
    """Stands for ``huggingface_hub.HfApi``: two files, one tensor each."""

    def get_safetensors_metadata(self, repo: str, *, revision: str | None = None) -> Any:
        if repo != "owner/model":
            raise OSError("404 not found\nlong page")
        info = SimpleNamespace(dtype="BF16", shape=[2, 3], data_offsets=(0, 12))
        files = {name: SimpleNamespace(tensors={f"{name}.weight": info}) for name in ("one", "two")}
        return SimpleNamespace(files_metadata=files)


def test_headers_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=FakeHub))
    stored = read_hub("owner/model")
    assert stored.num_bytes == 24 and set(stored.tensors) == {"one.weight", "two.weight"}
    with pytest.raises(InputError, match="404 not found"):
        read_hub("owner/other")


def test_the_hub_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"ullage\[hub\]"):
        read_hub("owner/model")
    assert "huggingface_hub" not in vars(safetensors_header)
