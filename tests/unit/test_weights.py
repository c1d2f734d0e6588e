"""The weights term, against sums worked out by hand and totals of published checkpoints and engine logs."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
from conftest import need_shared

from ullage.account.parameters import Parameter, Role
from ullage.account.sharding import RankShare, whole
from ullage.account.weights import KEEP, checkpoint_bytes, format_of, weights_term
from ullage.ledger import Certainty
from ullage.read.hf_config import read_config
from ullage.read.quantization_names import named_quantization
from ullage.spec import model as spec
from ullage.units import GiB, WeightFormat

FP8 = WeightFormat(name="fp8 128x128", dtype="float8_e4m3", block=(128, 128))


def small(**more: object) -> spec.Model:
    layer = spec.Layer(
        mixers=(spec.Attention(num_heads=4, num_kv_heads=4, head_dim=64),),
        ffns=(spec.DenseFFN(intermediate_size=512),),
        norms=(spec.Norm(name="input_layernorm", size=256), spec.Norm(name="post_attention_layernorm", size=256)),
    )
    values = {
        "name": "small",
        "architecture": "test",
        "hidden_size": 256,
        "vocab_size": 1024,
        "dtype": "bfloat16",
        "layers": (layer,) * 3,
        "final_norms": (spec.Norm(name="model.norm", size=256),),
    }
    return spec.Model(**{**values, **more})


def config(name: str) -> spec.Model:
    return read_config(need_shared(f"configs/{name}.json"))


def tensor_parallel(model: spec.Model, tp: int) -> RankShare:
    return RankShare(
        layers=(0, len(model.layers)),
        embedding=True,
        head=True,
        final=True,
        mtp=False,
        towers=True,
        attention_tp=tp,
        dense_tp=tp,
        shared_expert_tp=tp,
        expert_tp=tp,
        vocab_tp=tp,
        head_tp=tp,
    )


def test_children_are_the_components() -> None:
    model = small()
    term = weights_term(model, whole(model))
    sizes = {child.name: child.bytes for child in term.children}
    assert sizes == {
        "embedding": 1024 * 256 * 2,
        "attention": 3 * 4 * 256 * 256 * 2,
        "dense_ffn": 3 * 3 * 512 * 256 * 2,
        "norms": (3 * 2 + 1) * 256 * 2,
        "lm_head": 1024 * 256 * 2,
    }
    assert term.bytes == sum(sizes.values())
    assert term.certainty is Certainty.EXACT
    attention = next(child for child in term.children if child.name == "attention")
    assert attention.formula == "3 x 262,144 values in bfloat16"


def test_rules_decide_in_order_and_spare_what_is_no_linear_layer() -> None:
    quantization = spec.Quantization(
        method="test",
        rules=(spec.QuantRule(pattern=r"layers\.0\.mlp", format=None), spec.QuantRule(pattern="", format=FP8)),
    )
    model = small(quantization=quantization)
    sizes = {child.name: child.bytes for child in weights_term(model, whole(model)).children}
    one_ffn = 3 * 512 * 256
    assert sizes["dense_ffn"] == 2 * one_ffn + 2 * (one_ffn + 3 * 8 * 4)  # 8 blocks of 128 x 128 in 512 x 256
    assert sizes["attention"] == 3 * 4 * (256 * 256 + 4 * 4)
    assert sizes["embedding"] == sizes["lm_head"] == 1024 * 256 * 2
    assert checkpoint_bytes(model) == weights_term(model, whole(model), quantization=KEEP).bytes
    plain = weights_term(model, whole(model), quantization=None).bytes
    assert plain == checkpoint_bytes(small())


def test_another_dtype_changes_all_but_tensors_with_their_own() -> None:
    model = small(extras=(spec.ExtraTensor(name="table", shape=(3, 5), dtype="int64"),))
    wide, narrow = (weights_term(model, whole(model), dtype=dtype).bytes for dtype in ("float32", "float16"))
    assert wide - 3 * 5 * 8 == 2 * (narrow - 3 * 5 * 8)


@pytest.mark.parametrize(
    ("role", "shape", "own", "expected"),
    [
        (Role.LINEAR, (4, 4), None, "fp8 128x128"),
        (Role.EXPERT, (4, 4), None, "fp8 128x128"),
        (Role.EMBEDDING, (4, 4), None, "bfloat16"),
        (Role.ROUTER, (4, 4), None, "bfloat16"),
        (Role.BIAS, (4,), None, "bfloat16"),
        (Role.LINEAR, (4, 4), "float32", "float32"),
    ],
)
def test_an_empty_pattern_means_linear_layers(
    role: Role, shape: tuple[int, ...], own: str | None, expected: str
) -> None:
    rules = spec.Quantization(method="test", rules=(spec.QuantRule(pattern="", format=FP8),))
    parameter = Parameter(name="x.weight", shape=shape, role=role, dtype=own)
    assert format_of(parameter, dtype="bfloat16", quantization=rules).name == expected


def test_a_named_embedding_is_quantised() -> None:
    rules = spec.Quantization(method="test", rules=(spec.QuantRule(pattern="lm_head", format=FP8),))
    parameter = Parameter(name="lm_head.weight", shape=(256, 256), role=Role.EMBEDDING)
    assert format_of(parameter, dtype="bfloat16", quantization=rules) == FP8


def test_block_scales_are_counted_per_slice() -> None:
    """A slice of 512/8 = 64 rows still has one row of scales: 8 ranks store more scales than one."""
    model = small(quantization=spec.Quantization(method="test", rules=(spec.QuantRule(pattern="", format=FP8),)))
    term = weights_term(model, replace(tensor_parallel(model, 4), dense_tp=8))
    ffn = next(child for child in term.children if child.name == "dense_ffn")
    assert ffn.bytes == 3 * 3 * (64 * 256 + 2 * 4)


@pytest.mark.parametrize(
    ("name", "gib"),
    [
        ("deepseek-ai__DeepSeek-R1", 641.29),
        ("deepseek-ai__DeepSeek-V3.2", 642.12),
        ("deepseek-ai__DeepSeek-V4-Pro", 805.32),
        ("moonshotai__Kimi-Linear-48B-A3B-Instruct", 91.50),
        ("zai-org__GLM-4.5V", 200.63),
        ("deepseek-ai__DeepSeek-OCR", 6.21),
    ],
)
def test_totals_of_published_checkpoints(name: str, gib: float) -> None:
    facts = json.loads(need_shared("configs/checkpoint_truth.json").read_text())
    assert any(fact["bytes_GiB"] == gib for fact in facts)
    assert checkpoint_bytes(config(name)) / GiB == pytest.approx(gib, abs=0.005)


@pytest.mark.parametrize(
    ("name", "words", "tp", "gib"),
    [
        # "Model loading took" of engine logs; what an engine adds (padding, tables) is some per mille and its own term.
        ("meta-llama__Meta-Llama-3-70B", "fp8 (compressed-tensors, dynamic)", 1, 67.72),
        ("meta-llama__Meta-Llama-3-70B", "fp8 (compressed-tensors, dynamic)", 2, 33.88),
        ("meta-llama__Meta-Llama-3-70B", "awq_int4", 2, 18.55),
        ("Qwen__Qwen3-30B-A3B-Instruct-2507", "fp8 (online, from bf16)", 1, 29.08),
        ("zai-org__GLM-4.5", "nvfp4 (modelopt_fp4)", 4, 47.11),
    ],
)
def test_weights_that_engines_logged(name: str, words: str, tp: int, gib: float) -> None:
    model = config(name)
    term = weights_term(model, tensor_parallel(model, tp), quantization=named_quantization(words, model))
    assert gib * 0.993 < term.bytes / GiB <= gib


def test_a_large_model_is_counted_in_milliseconds() -> None:
    model = config("deepseek-ai__DeepSeek-V3")
    share = tensor_parallel(model, 8)
    weights_term(model, share)
    start = time.perf_counter()
    for _round in range(5):
        weights_term(model, share)
    assert (time.perf_counter() - start) / 5 < 0.05  # under 1 ms alone; room for a busy machine


def test_every_config_counts_its_stored_bytes() -> None:
    described = [read_config(path) for path in sorted(need_shared("configs").glob("nvidia__*NVFP4.json"))]
    described = [model for model in described if model.quantization is not None]  # one has no sidecar here
    assert len(described) > 15
    for model in described:
        share = checkpoint_bytes(model) / checkpoint_bytes(replace(model, quantization=None))
        assert 0.25 < share < 0.9, model.name
