"""What one more token costs, against published figures and sums written out by hand."""

from __future__ import annotations

from fractions import Fraction

import pytest
from conftest import need_shared

from ullage.account.kv_cache import (
    attention_row,
    bytes_per_token,
    compressed_entry,
    compressed_rows,
    element_bytes,
    indexer_row,
    latent_row,
    mixer_rows,
)
from ullage.errors import InputError, LayoutError
from ullage.read.hf_config import read_config
from ullage.spec import model as spec

INDEXER = spec.Indexer(num_heads=64, head_dim=128, top_k=2048)
LATENT = spec.LatentAttention(
    num_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
)
GROUPED = spec.Attention(num_heads=32, num_kv_heads=8, head_dim=128)


def v4(ratio: int, indexer: spec.Indexer | None = None) -> spec.CompressedAttention:
    return spec.CompressedAttention(
        num_heads=128,
        head_dim=512,
        qk_rope_head_dim=64,
        q_lora_rank=1536,
        o_groups=16,
        o_lora_rank=1024,
        window=128,
        compress_ratio=ratio,
        indexer=indexer,
    )


@pytest.mark.parametrize(
    ("name", "dtype", "size"),
    [
        ("deepseek-ai__DeepSeek-V3", "bfloat16", 70_272),
        ("deepseek-ai__DeepSeek-V3", "fp8", 35_136),
        ("deepseek-ai__DeepSeek-V3", "q8_0", 37_332),
        ("deepseek-ai__DeepSeek-V3.2", "fp8_ds_mla", 48_068),
        ("deepseek-ai__DeepSeek-V3.2", "nvfp4_ds_mla", 29_524),
        ("deepseek-ai__DeepSeek-V3.2", "bfloat16", 78_324),
        ("deepseek-ai__DeepSeek-V2-Lite", "bfloat16", 31_104),
        ("meta-llama__Llama-3.1-8B-Instruct", "bfloat16", 131_072),
        ("Qwen__Qwen3-Next-80B-A3B-Instruct", "bfloat16", 24_576),
    ],
)
def test_bytes_of_a_token(name: str, dtype: str, size: int) -> None:
    model = read_config(need_shared("configs", f"{name}.json"))
    assert bytes_per_token(model, dtype) == size
    half = len(model.layers) // 2
    parts = [bytes_per_token(model, dtype, layers=span) for span in ((0, half), (half, len(model.layers)))]
    assert sum(parts) == size


@pytest.mark.parametrize(("tp", "heads"), [(1, 8), (2, 4), (8, 1), (16, 1)])
def test_key_value_heads_are_divided_then_replicated(tp: int, heads: int) -> None:
    assert attention_row(GROUPED, "bfloat16", attention_tp=tp).row_bytes == heads * 256 * 2


def test_uneven_heads_are_refused() -> None:
    with pytest.raises(LayoutError):
        attention_row(GROUPED, "bfloat16", attention_tp=3)


def test_latent_rows_are_replicated() -> None:
    assert [row.row_bytes for row in mixer_rows(LATENT, "bfloat16", attention_tp=8)] == [1152]


@pytest.mark.parametrize(
    ("dtype", "size", "formula"),
    [
        ("fp8_ds_mla", 656, "512 x 1 latent fp8 + 4 x 4 scales fp32 + 64 x 2 rope bf16"),
        ("nvfp4_ds_mla", 352, "512 x 1/2 latent e2m1 + 64 x 1 rope fp8 + 32 x 1 scales fp8"),
        ("fp8", 576, "512 x 1 latent + 64 x 1 rope"),
        ("q8_0", 612, "512 x 17/16 latent + 64 x 17/16 rope"),
    ],
)
def test_latent_layouts(dtype: str, size: int, formula: str) -> None:
    row = latent_row(LATENT, dtype)
    assert (row.row_bytes, row.formula) == (size, formula)


@pytest.mark.parametrize(("dtype", "size"), [("fp8", 132), ("mxfp4", 68), ("bfloat16", 256)])
def test_indexer_layouts(dtype: str, size: int) -> None:
    assert indexer_row(INDEXER, dtype).row_bytes == size


def test_v4_rows_cost_a_share_of_a_row() -> None:
    assert compressed_entry(v4(4), "fp8_ds_mla").row_bytes == 448 + 64 * 2 + 7 + 1 == 584
    assert compressed_entry(v4(4), "bfloat16").row_bytes == 1024
    assert compressed_rows(v4(0), "fp8_ds_mla") == ()
    rows = compressed_rows(v4(4, INDEXER), "fp8_ds_mla")
    assert [row.bytes_per_token for row in rows] == [146, 33]
    assert [row.bytes_per_token for row in compressed_rows(v4(128), "fp8_ds_mla")] == [Fraction(584, 128)]


def test_v4_models_have_the_slopes_of_their_layers() -> None:
    flash = read_config(need_shared("configs", "deepseek-ai__DeepSeek-V4-Flash.json"))
    pro = read_config(need_shared("configs", "deepseek-ai__DeepSeek-V4-Pro.json"))
    assert bytes_per_token(flash, "fp8_ds_mla") == 21 * 179 + 20 * Fraction(584, 128)
    assert bytes_per_token(pro, "fp8_ds_mla") == 30 * 179 + 31 * Fraction(584, 128)


def test_layers_without_a_row() -> None:
    for part in (
        spec.Attention(num_heads=8, num_kv_heads=8, head_dim=64, shared_kv=True),
        spec.Attention(num_heads=8, num_kv_heads=8, head_dim=64, cross=True),
        spec.Mamba(inner_size=64, state_size=16, conv_kernel=4, dt_rank=8),
    ):
        assert mixer_rows(part, "bfloat16") == ()
    window = spec.Attention(num_heads=8, num_kv_heads=8, head_dim=64, window=1024)
    assert mixer_rows(window, "bfloat16", windows=False) == ()
    assert [row.row_bytes for row in mixer_rows(window, "bfloat16")] == [8 * 128 * 2]


def test_values_may_be_narrower_than_keys() -> None:
    part = spec.Attention(num_heads=8, num_kv_heads=2, head_dim=192, v_head_dim=128)
    assert attention_row(part, "bfloat16").row_bytes == 2 * (192 + 128) * 2


def test_a_packed_latent_layout_is_refused_elsewhere() -> None:
    with pytest.raises(LayoutError, match="latent"):
        mixer_rows(GROUPED, "fp8_ds_mla")


def test_element_bytes() -> None:
    assert element_bytes("q8_0") == Fraction(34, 32)
    assert element_bytes("q4_0") == Fraction(18, 32)
    assert element_bytes("f16") == element_bytes("bf16") == 2
    with pytest.raises(InputError):
        element_bytes("q9_9")


def test_keys_that_choose_blocks_are_cached_besides_on_every_rank() -> None:
    """MiniMax-M3's sparse layers: 4 KV heads of 128 twice, and one key of 128, in bf16."""
    sparse = spec.Attention(num_heads=64, num_kv_heads=4, head_dim=128, index_key_dim=128)
    for ranks, heads in ((1, 4), (4, 1), (8, 1)):
        rows = mixer_rows(sparse, "bfloat16", attention_tp=ranks)
        assert sum(row.bytes_per_token for row in rows) == 2 * heads * 128 * 2 + 128 * 2
    fp8 = mixer_rows(sparse, "fp8", attention_tp=4)
    assert sum(row.bytes_per_token for row in fp8) == 2 * 128 + 128 * 2


def test_layers_that_reuse_a_choice_cache_no_index_keys() -> None:
    reused = spec.LatentAttention(**{**vars(LATENT), "shared_indexer": True})
    chosen = spec.LatentAttention(**{**vars(LATENT), "indexer": INDEXER})
    assert [row.row_bytes for row in mixer_rows(reused, "fp8_ds_mla")] == [656]
    assert [row.row_bytes for row in mixer_rows(chosen, "fp8_ds_mla")] == [656, 132]
