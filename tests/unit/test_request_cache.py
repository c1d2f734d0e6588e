"""One request's cache as fixed + slope, against sums written out by hand."""

from fractions import Fraction

import pytest

from ullage.account.request_cache import cache_cost
from ullage.read.model_source import load_model as load


@pytest.mark.parametrize(
    ("name", "dtype", "fixed", "slope"),
    [
        ("deepseek-v3", "bfloat16", 0, 61 * (512 + 64) * 2),
        ("deepseek-v3", "fp8", 0, 61 * (512 + 64)),
        ("deepseek-v3", "q8_0", 0, Fraction(61 * 576 * 34, 32)),
        ("deepseek-v3.2", "fp8_ds_mla", 0, 61 * (512 + 4 * 4 + 64 * 2 + 128 + 4)),
        ("deepseek-v3.2", "bfloat16", 0, 61 * (576 * 2 + 128 + 4)),
        ("deepseek-v2-lite", "bfloat16", 0, 27 * 576 * 2),
        ("llama-3.1-8b", "bfloat16", 0, 32 * 8 * 256 * 2),
        # 43 windows of 128; 21 overlapping compressors with indexers; 20 plain ones
        (
            "deepseek-v4-flash",
            "fp8_ds_mla",
            43 * 128 * 584 + 21 * 8 * 2 * (2 * 512 + 2 * 128) * 4 + 20 * 128 * 2 * 512 * 4,
            Fraction(21 * (584 + 132), 4) + Fraction(20 * 584, 128),
        ),
        (
            "deepseek-v4-pro",
            "fp8_ds_mla",
            61 * 128 * 584 + 30 * 8 * 2 * (2 * 512 + 2 * 128) * 4 + 31 * 128 * 2 * 512 * 4,
            Fraction(30 * (584 + 132), 4) + Fraction(31 * 584, 128),
        ),
    ],
)
def test_cost_of_a_request(name, dtype, fixed, slope):
    cost = cache_cost(load(name), dtype)
    assert (cost.fixed_bytes, cost.bytes_per_token) == (fixed, slope)


def test_states_are_fixed_and_full_attention_grows():
    model = load("qwen3-next-80b-a3b-instruct")
    cost = cache_cost(model, "bfloat16")
    assert cost.bytes_per_token == 12 * 2 * (256 + 256) * 2
    # 36 layers: 32 heads x 128 x 128 states and 3 columns of 8,192 channels, bf16
    assert cost.fixed_bytes == 36 * (32 * 128 * 128 + 3 * 8192) * 2
