"""Stored tensors tell the same as the configs that describe them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from ullage.account.parameters import model_parameters
from ullage.account.weights import checkpoint_bytes
from ullage.read.hf_config.quantization import read_quantization_values
from ullage.read.safetensors_header import DTYPE_BITS, StoredTensor, StoredTensors
from ullage.read.stored import module_format, read_stored_quantization
from ullage.spec import model as spec

LAYER = spec.Layer(
    mixers=(spec.Attention(num_heads=4, num_kv_heads=2, head_dim=64, q_bias=True),),
    ffns=(spec.MoEFFN(num_experts=4, top_k=2, intermediate_size=192, shared_intermediate_size=192),),
    norms=(spec.Norm(name="input_layernorm", size=256),),
)
MODEL = spec.Model(
    name="small",
    architecture="test",
    hidden_size=256,
    vocab_size=1024,
    dtype="bfloat16",
    layers=(LAYER, LAYER),
    final_norms=(spec.Norm(name="model.norm", size=256),),
)


def tensor(dtype: str, *shape: int) -> StoredTensor:
    return StoredTensor(dtype=dtype, shape=shape, num_bytes=math.prod(shape) * DTYPE_BITS[dtype] // 8)


def fp8(rows: int, columns: int) -> dict[str, StoredTensor]:
    scale = tensor("F32", -(-rows // 128), -(-columns // 128))
    return {"weight": tensor("F8_E4M3", rows, columns), "weight_scale_inv": scale}


def int4(rows: int, columns: int) -> dict[str, StoredTensor]:
    return {
        "weight_packed": tensor("I32", rows, columns // 8),
        "weight_scale": tensor("BF16", rows, columns // 32),
        "weight_shape": tensor("I64", 2),
    }


def nvfp4(rows: int, columns: int) -> dict[str, StoredTensor]:
    return {
        "weight": tensor("U8", rows, columns // 2),
        "weight_scale": tensor("F8_E4M3", rows, columns // 16),
        "weight_scale_2": tensor("F32"),
        "input_scale": tensor("F32"),
    }


def gptq(rows: int, columns: int) -> dict[str, StoredTensor]:
    groups = columns // 64
    return {
        "qweight": tensor("I32", columns // 8, rows),
        "qzeros": tensor("I32", groups, rows // 8),
        "scales": tensor("F16", groups, rows),
        "g_idx": tensor("I32", columns),
    }


def rows_fp8(rows: int, columns: int) -> dict[str, StoredTensor]:
    return {"weight": tensor("F8_E4M3", rows, columns), "weight_scale": tensor("BF16", rows, 1)}


def stored_as(make: Any, *, norm_dtype: str = "BF16") -> StoredTensors:
    """Return the headers of MODEL with its linear layers as ``make`` stores them."""
    found: dict[str, StoredTensor] = {}
    for placed in model_parameters(MODEL):
        parameter = placed.parameter
        for copy in range(parameter.copies):
            name = parameter.name.replace("{e}", str(copy))
            linear = parameter.role.value in ("linear", "expert")
            if linear and name.endswith(".weight"):
                module = name.removesuffix("weight")
                found |= {module + key: value for key, value in make(*parameter.shape).items()}
            else:
                found[name] = tensor(norm_dtype if "norm" in name else "BF16", *parameter.shape)
    return StoredTensors(tensors=found, source="made")


GROUP = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (fp8, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
        (
            int4,
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": GROUP}},
            },
        ),
        (nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
        (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 64}),
        (
            rows_fp8,
            {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "config_groups": {"a": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}},
            },
        ),
    ],
)
def test_headers_and_config_agree(make: Any, values: dict[str, Any]) -> None:
    stored = stored_as(make)
    described = replace(MODEL, quantization=read_quantization_values(values, {"num_hidden_layers": 2}, "x"))
    assert checkpoint_bytes(described) == stored.num_bytes
    reading = read_stored_quantization(described, stored)
    assert reading.missing == reading.unexplained == ()
    assert checkpoint_bytes(replace(MODEL, quantization=reading.quantization)) == stored.num_bytes
    assert len(reading.quantization.rules) < 8


def test_another_dtype_of_norms_is_seen() -> None:
    stored = stored_as(fp8, norm_dtype="F32")
    reading = read_stored_quantization(MODEL, stored)
    assert checkpoint_bytes(replace(MODEL, quantization=reading.quantization)) == stored.num_bytes


def test_what_is_missing_or_strange_is_listed() -> None:
    stored = stored_as(fp8)
    tensors = dict(stored.tensors)
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    tensors["model.layers.0.surprise"] = tensor("BF16", 7)
    reading = read_stored_quantization(MODEL, StoredTensors(tensors=tensors))
    assert reading.missing == ("model.layers.1.mlp.experts.{e}.up_proj.weight",)
    assert "model.layers.0.surprise" in reading.unexplained


def test_a_layout_that_does_not_add_up_is_not_guessed() -> None:
    odd = {"weight": tensor("F8_E4M3", 256, 256), "weight_scale": tensor("F32", 3, 5)}
    assert module_format((256, 256), tuple(sorted(odd.items()))) is None
    assert module_format((256, 256), (("something", tensor("U8", 256, 256)),)) is None
    assert module_format((256, 256), (("weight", tensor("U8", 255, 256)),)) is None
