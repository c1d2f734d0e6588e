"""A request's recurrent state, against numbers worked out by hand from the published configs."""

from __future__ import annotations

import pytest

from ullage.account.state import StateTensor, has_state, state_tensors
from ullage.errors import LayoutError
from ullage.spec import model as spec

# Qwen3-Next-80B-A3B: 16 key heads and 32 value heads of 128, convolution of 4.
QWEN3_NEXT = spec.GatedDeltaNet(num_k_heads=16, num_v_heads=32, k_head_dim=128, v_head_dim=128, conv_kernel=4)
# Nemotron-3-Nano-30B-A3B: 64 heads of 64, state 128, 8 groups, convolution of 4, float32 state.
NEMOTRON_NANO = spec.Mamba2(
    num_heads=64, head_dim=64, state_size=128, num_groups=8, conv_kernel=4, state_dtype="float32"
)
# Falcon-H1-0.5B: one group, which every rank needs whole.
FALCON_H1 = spec.Mamba2(num_heads=24, head_dim=64, state_size=128, num_groups=1, conv_kernel=4)
# Jamba v0.1: 2 x 4096 channels, state 16, convolution of 4.
JAMBA = spec.Mamba(inner_size=8192, state_size=16, conv_kernel=4, dt_rank=256)
# Kimi-Linear-48B-A3B: 32 heads of 128, convolution of 4.
KIMI_LINEAR = spec.KimiDeltaAttention(num_heads=32, head_dim=128, conv_kernel=4, gate_rank=128)
# MiniMax-M1: 64 heads of 128, no convolution.
MINIMAX_M1 = spec.LightningAttention(num_heads=64, head_dim=128)

# LFM2-1.2B: 2048 channels, convolution of 3, no recurrent state.
LFM2 = spec.ShortConvolution(size=2048, conv_kernel=3)


def shapes(part: spec.Mixer, ranks: int, **more: int) -> list[tuple[int, ...]]:
    return [tensor.shape for tensor in state_tensors(part, ranks, **more)]


@pytest.mark.parametrize(
    ("part", "ranks", "expected"),
    [
        (QWEN3_NEXT, 1, [(3, 8192), (32, 128, 128)]),
        (QWEN3_NEXT, 4, [(3, 2048), (8, 128, 128)]),
        (NEMOTRON_NANO, 1, [(3, 6144), (64, 64, 128)]),
        (NEMOTRON_NANO, 8, [(3, 768), (8, 64, 128)]),
        (FALCON_H1, 1, [(3, 1792), (24, 64, 128)]),
        (FALCON_H1, 4, [(3, 384 + 256), (6, 64, 128)]),
        (JAMBA, 1, [(3, 8192), (8192, 16)]),
        (JAMBA, 8, [(3, 1024), (1024, 16)]),
        (KIMI_LINEAR, 1, [(3, 12288), (32, 128, 128)]),
        (KIMI_LINEAR, 8, [(3, 1536), (4, 128, 128)]),
        (MINIMAX_M1, 8, [(8, 128, 128)]),
        (LFM2, 2, [(2, 1024)]),
    ],
)
def test_shapes(part: spec.Mixer, ranks: int, expected: list[tuple[int, ...]]) -> None:
    assert shapes(part, ranks) == expected


def test_bytes_of_one_request_of_qwen3_next() -> None:
    """36 of 48 layers: 3 x 8192 bfloat16 and 32 x 128 x 128 float32 each = 77,266,944 bytes."""
    conv, recurrent = state_tensors(QWEN3_NEXT)
    assert 36 * (conv.num_elements * 2 + recurrent.num_elements * 4) == 77_266_944


def test_dtype_is_given_only_where_it_is_fixed() -> None:
    assert [tensor.dtype for tensor in state_tensors(KIMI_LINEAR)] == [None, "float32"]
    assert [tensor.dtype for tensor in state_tensors(NEMOTRON_NANO)] == [None, "float32"]
    assert [tensor.dtype for tensor in state_tensors(QWEN3_NEXT)] == [None, None]


def test_speculative_tokens_widen_the_convolution_only() -> None:
    assert shapes(QWEN3_NEXT, 1, num_speculative_tokens=2) == [(5, 8192), (32, 128, 128)]
    assert shapes(NEMOTRON_NANO, 1, num_speculative_tokens=2) == [(5, 6144), (64, 64, 128)]
    assert shapes(JAMBA, 1, num_speculative_tokens=2) == shapes(JAMBA, 1)


def test_attention_has_no_state() -> None:
    attention = spec.Attention(num_heads=32, num_kv_heads=8, head_dim=128)
    assert not has_state(attention)
    assert state_tensors(attention, 8) == ()
    assert all(has_state(part) for part in (QWEN3_NEXT, NEMOTRON_NANO, JAMBA, KIMI_LINEAR, MINIMAX_M1, LFM2))


@pytest.mark.parametrize(
    ("part", "ranks"),
    [(QWEN3_NEXT, 32), (QWEN3_NEXT, 3), (KIMI_LINEAR, 64), (NEMOTRON_NANO, 16), (JAMBA, 3), (MINIMAX_M1, 128)],
)
def test_ranks_that_do_not_divide_are_refused(part: spec.Mixer, ranks: int) -> None:
    with pytest.raises(LayoutError, match=f"{ranks} tensor-parallel ranks"):
        state_tensors(part, ranks)


def test_zero_ranks_are_refused() -> None:
    with pytest.raises(LayoutError):
        state_tensors(JAMBA, 0)


def test_a_tensor_knows_its_size() -> None:
    assert StateTensor(name="conv", shape=(3, 5)).num_elements == 15
