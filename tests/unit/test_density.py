"""Ratios of a pass, against arithmetic by hand."""

import math

import pytest

from ullage.account.density import count_backward, count_pass, count_step, touched_share
from ullage.read.model_source import load_model


def test_a_dense_model_uses_all_its_parameters():
    counted = count_pass(load_model("llama-3.1-8b"), num_tokens=1, context=1, kv_dtype="bfloat16", num_sequences=1)
    assert counted.used_parameters == counted.parameters == 8_030_261_248 - 2 * 128_256 * 4096 - 4096


def test_one_token_reaches_top_k_experts_and_many_reach_all():
    assert math.isclose(touched_share(8, 256, 1), 8 / 256)
    assert touched_share(8, 256, 10_000) == pytest.approx(1.0)
    model = load_model("deepseek-v3")
    one, many = (
        count_pass(model, num_tokens=tokens, context=1, kv_dtype="bfloat16", num_sequences=1).parameter_utilisation
        for tokens in (1, 4096)
    )
    assert one < 0.06
    assert many == pytest.approx(1.0)


def test_decoding_one_token_moves_each_weight_for_two_flops():
    counted = count_pass(load_model("llama-3.1-8b"), num_tokens=1, context=1, kv_dtype="bfloat16", num_sequences=1)
    assert counted.compute_density == pytest.approx(1.0, rel=0.01)  # 2 FLOPs per weight of 2 bytes


def test_prefill_is_denser_and_a_long_cache_makes_decoding_thinner():
    model = load_model("llama-3.1-8b")
    decode = [
        count_pass(model, num_tokens=8, context=context, kv_dtype="bfloat16", num_sequences=8).compute_density
        for context in (128, 131072)
    ]
    prefill = count_pass(model, num_tokens=8192, context=8192, kv_dtype="bfloat16", num_sequences=1).compute_density
    assert decode[1] < decode[0] < prefill


def test_backward_computes_twice_what_forward_does():
    model = load_model("llama-3.1-8b")
    ahead = count_pass(model, num_tokens=4096, context=1, kv_dtype="bfloat16", num_sequences=1)
    settings = {"num_tokens": 4096, "context": 1, "grad_dtype": "bfloat16"}
    trained = count_backward(model, ahead, trained=True, recomputed=False, **settings)
    frozen = count_backward(model, ahead, trained=False, recomputed=False, **settings)
    again = count_backward(model, ahead, trained=True, recomputed=True, **settings)
    assert trained.flops == pytest.approx(2 * ahead.flops, rel=0.001)
    assert frozen.flops == pytest.approx(ahead.flops, rel=0.001)
    assert again.flops == pytest.approx(3 * ahead.flops, rel=0.001)
    # inputs and outputs of every product twice more, the weights once, their gradients in the same width
    assert trained.bytes_moved == pytest.approx(2 * ahead.bytes_moved, rel=0.001)


def test_an_optimizer_step_moves_more_than_it_computes():
    found = count_step(10, params="bfloat16", grads="float32", master="float32", moments="float32", num_moments=2)
    assert found.bytes_moved == 10 * (4 + 2 * (2 + 4) + 2 * 8)
    assert found.compute_density == pytest.approx(14 / 32)
