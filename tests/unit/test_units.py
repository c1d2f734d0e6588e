"""Bytes, counts, dtypes and stored formats."""

from __future__ import annotations

import pytest

from ullage.errors import InputError
from ullage.read.hf_config.quantization import formats
from ullage.units import (
    GiB,
    WeightFormat,
    canonical_dtype,
    cdiv,
    dtype_bytes,
    format_bytes,
    parse_count,
    parse_size,
    plain,
    round_up,
    tensor_bytes,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * GiB),
        ("80 GB", 80 * 10**9),
        ("512MiB", 512 * 2**20),
        ("1.5gib", 3 * 2**29),
        ("17", 17),
        ("0b", 0),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1e9", "24 Gi", "24GiBs", "1.5.2GB", "9" * 40 + "TiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "count"),
    [("32768", 32768), ("32k", 32000), ("32K", 32768), ("25.6k", 25600), ("1m", 10**6), ("1M", 2**20)],
)
def test_counts_as_vllm_types_them(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["25.6K", "1.0005k", "k", "-3", "1g", ""])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_count(text)


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("bf16", "bfloat16"),
        ("torch.bfloat16", "bfloat16"),
        ("BF16", "bfloat16"),
        ("fp8", "float8_e4m3"),
        ("F32", "float32"),
    ],
)
def test_dtypes_have_one_name(name: str, canonical: str) -> None:
    assert canonical_dtype(name) == canonical


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(InputError, match="known are"):
        dtype_bytes("float7")


def test_small_formats_round_up_to_bytes() -> None:
    assert tensor_bytes(3, "int4") == 2
    assert tensor_bytes(8, "int3") == 3
    assert (cdiv(7, 2), round_up(7, 4), round_up(8, 4)) == (4, 8, 8)


@pytest.mark.parametrize(
    ("size", "text"),
    [(17, "17 B"), (512 * 2**20, "512.0 MiB"), (26.1 * GiB, "26.10 GiB"), (1100 * GiB, "1,100.00 GiB")],
)
def test_printing(size: float, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("format_", "shape", "size"),
    [
        (plain("bfloat16"), (3, 5), 30),
        (plain("bfloat16"), (), 2),
        (formats.fp8_block(), (576, 7168), 576 * 7168 + 5 * 56 * 4),
        (formats.fp8_block(scale_dtype="float8_e8m0"), (128, 129), 128 * 129 + 2),
        (formats.fp8_per_tensor(static=True), (8, 8), 64 + 8),
        (formats.fp8_per_row(), (8, 16), 128 + 8 * 4),
        (formats.nvfp4(), (64, 128), 64 * 64 + 64 * 8 + 8),
        (formats.mxfp4(), (64, 128), 64 * 64 + 64 * 4),
        (formats.awq(), (256, 512), 256 * 256 + 256 * 4 * 2 + 256 * 4 // 2),
        (formats.gptq(), (256, 512), 256 * 256 + 256 * 4 * 2 + 256 * 4 // 2 + 512 * 4),
        (formats.gptq(group_size=-1), (256, 512), 256 * 256 + 256 * 2 + 256 // 2 + 512 * 4),
        (formats.int_packed(4, 32), (64, 128), 64 * 64 + 64 * 4 * 2 + 16),
        (formats.int8_per_row(), (64, 128), 64 * 128 + 64 * 2),
        (formats.bnb_4bit(double_quant=False), (64, 128), 64 * 64 + 128 * 4 + 16 * 4),
        (formats.bnb_4bit(), (64, 128), 64 * 64 + 128 + 4 + 4 * (16 + 257)),
        (formats.sparse(plain("bfloat16"), 2, 4), (8, 16), 128 * 2 * 9 // 16),
        (formats.sparse(plain("bfloat16"), 4, 8), (8, 16), 128 * 19 // 16),
        (WeightFormat(name="Q8_0", dtype="uint8", packed=(32, 34, 0)), (4, 64), 4 * 2 * 34),
        (WeightFormat(name="IQ4_KS", dtype="uint8", packed=(256, 136, 4)), (2, 3, 512), 6 * (2 * 136 + 4)),
        (
            WeightFormat(name="padded", dtype="float4_e2m1", block=(1, 32), scale_dtype="uint8", pad_columns_to=128),
            (2, 100),
            2 * (64 + 4),
        ),
    ],
)
def test_stored_bytes(format_: WeightFormat, shape: tuple[int, ...], size: int) -> None:
    assert format_.stored_bytes(shape) == size
