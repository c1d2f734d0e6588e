"""Every ``quant_method`` of transformers: read, or refused by name; nonsense in it is one sentence, no traceback."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from ullage.errors import UllageError, UnknownArchitectureError
from ullage.read.hf_config import read_config_object
from ullage.spec.model import Quantization

LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1000,
}


def torchao(kind: str, **settings: Any) -> dict[str, Any]:
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": kind, "_data": settings}}}


GROUPS = {
    "group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}},
    "group_1": {
        "targets": ["re:.*down_proj"],
        "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128},
    },
}
READ: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8 128x128"),
    ({"quant_method": "fbgemm_fp8"}, "fp8 per row"),
    ({"quant_method": "awq", "bits": 4, "group_size": 64}, "awq int4 group 64"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {}}, "gptq int4 group 128"),
    ({"quant_method": "compressed-tensors", "config_groups": GROUPS, "format": "pack-quantized"}, "fp8 per row"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bnb nf4"),
    ({"load_in_8bit": True}, "int8 per row"),
    ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}}, "hqq int4 group 64"),
    ({"quant_method": "eetq"}, "int8 per row"),
    ({"quant_method": "auto-round", "bits": 2, "group_size": 128}, "gptq int2 group 128"),
    ({"quant_method": "bitnet", "linear_class": "autobitlinear"}, "bitnet ternary"),
    (torchao("Int4WeightOnlyConfig", group_size=64), "awq int4 group 64"),
    (torchao("Float8WeightOnlyConfig"), "fp8 per row"),
    (torchao("Float8DynamicActivationFloat8WeightConfig"), "fp8 per tensor"),
    (torchao("Float8DynamicActivationFloat8WeightConfig", granularity=[{"_type": "PerRow"}] * 2), "fp8 per row"),
    (
        {"quant_method": "torchao", "quant_type": "int4_weight_only", "quant_type_kwargs": {"group_size": 32}},
        "awq int4 group 32",
    ),
    (
        {
            "quant_method": "quark",
            "global_quant_config": {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}},
            "layer_quant_config": {},
        },
        "fp8 per tensor",
    ),
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    *(({"quant_method": name}, name) for name in ("quanto", "aqlm", "spqr", "vptq", "higgs", "fp_quant", "sinq")),
    (torchao("ModuleFqnToConfig"), "ModuleFqnToConfig"),
    ({**torchao("Int4WeightOnlyConfig"), "include_input_output_embeddings": True}, "include_input_output_embeddings"),
    (
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}, "lm_head": {}}},
        "lm_head",
    ),
    ({"quant_method": "hqq", "quant_config": {"self_attn.q_proj": {"weight_quant_params": {}}}}, "self_attn.q_proj"),
    ({"quant_method": "bitnet", "quantization_mode": "both"}, "both"),
]
NONSENSE = [None, True, False, 0, -1, 7, 1e300, float("nan"), "", "x", "re:(", [], [1], ["x"], [None], {}, {"x": 1}]
NONSENSE += [{"x": None}, [[1]], {"a": {"b": {"c": []}}}, 10**30, "4"]


def read(values: dict[str, Any]) -> Quantization:
    found = read_config_object({**LLAMA, "quantization_config": values}, where="config.json", name="x").quantization
    assert found is not None
    return found


@pytest.mark.parametrize(("values", "name"), READ, ids=[name for _values, name in READ])
def test_methods_that_are_read(values: dict[str, Any], name: str) -> None:
    everywhere = read(values).rules[-1]
    assert everywhere.pattern == ""
    assert everywhere.format is not None
    assert everywhere.format.name == name


@pytest.mark.parametrize(("values", "named"), REFUSED, ids=[named for _values, named in REFUSED])
def test_methods_that_are_not_understood_are_named(values: dict[str, Any], named: str) -> None:
    with pytest.raises(UnknownArchitectureError, match=named):
        read(values)


def test_ternary_weights_take_a_quarter_of_a_byte() -> None:
    form = read({"quant_method": "bitnet"}).rules[-1].format
    assert form is not None
    assert (form.dtype, form.block, form.tensor_scales) == ("int2", None, 1)
    assert read({"quant_method": "bitnet", "quantization_mode": "online"}).rules[-1].format is None


def spoilt(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for key, value in values.items():
        for junk in NONSENSE:
            yield {**values, key: junk}
        if isinstance(value, dict):
            for inner in spoilt(value):
                yield {**values, key: inner}


def refusal(values: dict[str, Any]) -> str:
    try:
        read_config_object({**LLAMA, "quantization_config": values}, where="config.json", name="x")
    except UllageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("values", [values for values, _name in READ], ids=[name for _values, name in READ])
def test_nonsense_is_refused_in_one_sentence_or_understood(values: dict[str, Any]) -> None:
    for broken in spoilt(values):
        assert "\n" not in refusal(broken)
