"""``quantization_config`` of every common method → the stored format of each tensor."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import need_shared

from ullage.account.parameters import Placed, model_parameters
from ullage.account.weights import checkpoint_bytes, stored_format
from ullage.errors import InputError, UnknownArchitectureError
from ullage.read.hf_config import read_config
from ullage.read.hf_config.keys import Keys
from ullage.read.hf_config.quantization import read_quantization, read_quantization_values
from ullage.read.hf_config.quantization.patterns import fold_modules, module_pattern
from ullage.read.quantization_names import NAMES, assumption, named_quantization
from ullage.spec import model as spec

ATTENTION = spec.Attention(num_heads=4, num_kv_heads=2, head_dim=64)
NORMS = (spec.Norm(name="input_layernorm", size=256),)
DENSE = spec.Layer(mixers=(ATTENTION,), ffns=(spec.DenseFFN(intermediate_size=512),), norms=NORMS)
SPARSE = spec.Layer(
    mixers=(ATTENTION,),
    ffns=(spec.MoEFFN(num_experts=4, top_k=2, intermediate_size=128, shared_intermediate_size=128),),
    norms=NORMS,
)
TOWER = spec.Tower(name="vision", tensors=(spec.ExtraTensor(name="visual.blocks.0.qkv.weight", shape=(96, 64)),))
MODEL = spec.Model(
    name="small",
    architecture="test",
    hidden_size=256,
    vocab_size=1024,
    dtype="bfloat16",
    layers=(DENSE, DENSE, SPARSE),
    final_norms=(spec.Norm(name="model.norm", size=256),),
    towers=(TOWER,),
)


def formats(
    values: dict[str, Any], *, model: spec.Model = MODEL, config: dict[str, Any] | None = None
) -> dict[str, str]:
    """Return module -> name of its weight's format under a quantisation config."""
    config = {"num_hidden_layers": len(model.layers), **(config or {})}
    quantised = replace(model, quantization=read_quantization_values(values, config, "config.json"))
    placed: list[Placed] = [p for p in model_parameters(quantised) if p.name.endswith(".weight")]
    return {p.name.removesuffix(".weight"): stored_format(quantised, p).name for p in placed}


ALWAYS_PLAIN = (
    "model.embed_tokens",
    "lm_head",
    "model.layers.0.input_layernorm",
    "model.layers.2.mlp.gate",
    "visual.blocks.0.qkv",
)
LINEAR = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.2.mlp.experts.{e}.up_proj")

INT4_GROUP = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
CHANNEL_FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}


def compressed(weights: dict[str, Any] | None, layout: str, **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, **more.pop("group", {})}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        **more,
    }


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8 128x128"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "fp8 per tensor"),
        ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "fp8 per row"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, "awq int4 group 128"),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, "awq int4 group 64"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True}, "gptq int4 group 128"),
        ({"quant_method": "gptq", "bits": 3, "group_size": -1}, "gptq int3 group -1"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8 per row"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            "bnb nf4",
        ),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
            "bnb nf4 double quant",
        ),
        ({"quant_method": "auto-round", "bits": 4, "group_size": 128}, "gptq int4 group 128"),
        (
            {"quant_method": "auto-round", "bits": 4, "group_size": 64, "packing_format": "auto_round:auto_awq"},
            "awq int4 group 64",
        ),
        (
            {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}},
            "hqq int4 group 64",
        ),
        ({"quant_method": "eetq", "weights": "int8"}, "int8 per row"),
        (compressed(INT4_GROUP, "pack-quantized"), "int4 group 32"),
        (compressed({**INT4_GROUP, "strategy": "channel"}, "pack-quantized"), "int4 per row"),
        (compressed(CHANNEL_FP8, "float-quantized"), "fp8 per row"),
        (compressed({**CHANNEL_FP8, "strategy": "tensor"}, "naive-quantized"), "fp8 per tensor"),
        (compressed({**CHANNEL_FP8, "strategy": "block"}, "float-quantized"), "fp8 128x128"),
        (compressed(NVFP4, "nvfp4-pack-quantized"), "nvfp4"),
        (compressed({**NVFP4, "group_size": 32}, "mxfp4-pack-quantized"), "mxfp4"),
        (compressed({"num_bits": 8, "type": "int", "strategy": "channel"}, "int-quantized"), "int8 per row"),
        (compressed(INT4_GROUP, "marlin-24"), "int4 group 32 2:4 sparse"),
        (
            compressed(CHANNEL_FP8, "float-quantized", sparsity_config={"format": "sparse-24-bitmask"}),
            "fp8 per row 2:4 sparse",
        ),
        (
            compressed(None, "dense", sparsity_config={"format": "sparse-24-bitmask", "targets": ["Linear"]}),
            "bfloat16 2:4 sparse",
        ),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8 per tensor"),
        ({"quant_algo": "NVFP4", "producer": {"name": "modelopt"}, "ignore": ["lm_head"]}, "nvfp4"),
        ({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, "fp8 128x128"),
        ({"quant_method": "modelopt", "quant_algo": "MXFP8"}, "mxfp8"),
        (
            {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp8_e4m3"}}, "exclude": ["lm_head"]},
            "fp8 per tensor",
        ),
        (
            {
                "quant_method": "quark",
                "global_quant_config": {"weight": {"dtype": "fp4", "qscheme": "per_group", "group_size": 32}},
            },
            "mxfp4",
        ),
        ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "int8 per row"),
        (
            {
                "quant_method": "torchao",
                "quant_type": {"default": {"_type": "Int4WeightOnlyConfig", "_data": {"group_size": 64}}},
            },
            "awq int4 group 64",
        ),
    ],
)
def test_linear_layers_have_the_format_and_the_rest_stays(values: dict[str, Any], name: str) -> None:
    found = formats(values)
    assert {found[module] for module in LINEAR} == {name}
    assert {found[module] for module in ALWAYS_PLAIN} == {"bfloat16"}


def test_only_experts_are_mxfp4() -> None:
    found = formats({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]})
    assert {module for module, name in found.items() if name == "mxfp4"} == {
        f"model.layers.2.mlp.experts.{{e}}.{part}_proj" for part in ("gate", "up", "down")
    }


@pytest.mark.parametrize(
    ("listed", "spared"),
    [
        (["model.layers.0.mlp.down_proj"], {"model.layers.0.mlp.down_proj"}),
        (["layers.1.self_attn"], {f"model.layers.1.self_attn.{part}_proj" for part in "qkvo"}),
        (["model.language_model.layers.1.self_attn.q_proj"], {"model.layers.1.self_attn.q_proj"}),
        (["model.layers.*.self_attn.k_proj"], {f"model.layers.{index}.self_attn.k_proj" for index in range(3)}),
        (["shared_experts"], {f"model.layers.2.mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")}),
        (["gate"], set()),  # not gate_proj
    ],
)
def test_modules_left_out(listed: list[str], spared: set[str]) -> None:
    values = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    before, after = formats(values), formats({**values, "modules_to_not_convert": listed})
    assert {module for module in before if before[module] != after[module]} == spared


def test_regular_expressions_are_matched_from_the_start() -> None:
    values = compressed(CHANNEL_FP8, "float-quantized", ignore=["re:.*self_attn.*", "re:self_attn", "lm_head"])
    found = formats(values)
    assert found["model.layers.0.self_attn.q_proj"] == "bfloat16"
    assert found["model.layers.0.mlp.up_proj"] == "fp8 per row"
    assert formats({**values, "ignore": ["re:self_attn"]})["model.layers.0.self_attn.q_proj"] == "fp8 per row"


def test_groups_with_targets_of_their_own() -> None:
    values = compressed(INT4_GROUP, "pack-quantized")
    values["config_groups"]["group_1"] = {
        "targets": ["re:.*self_attn.*"],
        "weights": CHANNEL_FP8,
        "format": "float-quantized",
    }
    found = formats(values)
    assert found["model.layers.0.self_attn.q_proj"] == "fp8 per row"
    assert found["model.layers.0.mlp.up_proj"] == "int4 group 32"


def test_mixed_precision_lists_modules() -> None:
    values = {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {
            "lm_head": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
            "model.language_model.layers.0.self_attn.q_proj": {"quant_algo": "FP8"},
            "model.language_model.layers.2.mlp.experts": {"quant_algo": "NVFP4", "group_size": 16},
        },
    }
    found = {module: name for module, name in formats(values).items() if name != "bfloat16"}
    assert found.pop("lm_head") == "nvfp4"
    assert found.pop("model.layers.0.self_attn.q_proj") == "fp8 per tensor"
    assert set(found.values()) == {"nvfp4"} and all("experts" in module for module in found)


def test_gptq_overrides_by_module() -> None:
    values = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "dynamic": {r"-:.*layers\.0\.mlp.*": {}, r"+:.*layers\.1\.mlp.*": {"bits": 8}},
        "lm_head": True,
    }
    found = formats(values)
    assert found["model.layers.0.mlp.up_proj"] == "bfloat16"
    assert found["model.layers.1.mlp.up_proj"] == "gptq int8 group 128"
    assert found["lm_head"] == found["model.layers.0.self_attn.q_proj"] == "gptq int4 group 128"


def test_auto_round_overrides_by_module() -> None:
    extra = {"model.layers.0.mlp.up_proj": {"bits": 16}, "model.layers.1.mlp.up_proj": {"bits": 8}}
    found = formats({"quant_method": "auto-round", "bits": 4, "group_size": 128, "extra_config": extra})
    assert found["model.layers.0.mlp.up_proj"] == "bfloat16"
    assert found["model.layers.1.mlp.up_proj"] == "gptq int8 group 128"


def test_v4_experts_are_fp4_and_its_scales_e8m0() -> None:
    values = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    config = {"model_type": "deepseek_v4", "expert_dtype": "fp4"}
    found = formats(values, config=config)
    assert found["model.layers.2.mlp.experts.{e}.up_proj"] == "mxfp4"
    assert found["model.layers.2.mlp.shared_experts.up_proj"] == "fp8 128x128"
    quantization = read_quantization_values(values, config, "x")
    assert quantization.rules[-1].format is not None and quantization.rules[-1].format.scale_dtype == "float8_e8m0"
    v32 = read_quantization_values(values, {"model_type": "deepseek_v32"}, "x")  # powers of two, stored in fp32
    assert v32.rules[-1].format is not None and v32.rules[-1].format.scale_dtype == "float32"


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ({"quant_method": "fp8"}, None),
        (compressed(CHANNEL_FP8, "float-quantized", kv_cache_scheme={"num_bits": 8, "type": "float"}), "fp8"),
        ({"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}, "fp8"),
        ({"quant_algo": "FP8", "kv_cache_scheme": "FP8"}, "fp8"),
    ],
)
def test_the_cache_format_that_is_asked_for(values: dict[str, Any], dtype: str | None) -> None:
    assert read_quantization_values(values, {}, "x").kv_cache_dtype == dtype


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"quant_method": "aqlm"}, "aqlm"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "_": 1}, ""),
        (compressed({"num_bits": 4, "type": "complex"}, "pack-quantized"), "complex4"),
        (compressed(INT4_GROUP, "x", sparsity_config={"format": "sparse-99"}), "sparse-99"),
        ({"quant_method": "modelopt", "quant_algo": "INT1"}, "INT1"),
        ({"quant_method": "torchao", "quant_type": "int1_dream"}, "int1_dream"),
        ({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp6"}}}, "fp6"),
        ({"quant_method": "gptq", "bits": 7}, "7 bits"),
        ({}, "quant_method"),
    ],
)
def test_what_is_not_understood_is_named(values: dict[str, Any], named: str) -> None:
    if not named:
        assert read_quantization_values(values, {}, "x").method == "fp8"
        return
    with pytest.raises(UnknownArchitectureError, match=named):
        read_quantization_values(values, {}, "config.json: quantization_config")


@pytest.mark.parametrize(
    "values",
    [
        [],
        {"quant_method": "fp8", "modules_to_not_convert": "lm_head"},
        {"quant_method": "fp8", "modules_to_not_convert": [1]},
        {"quant_method": "fp8", "weight_block_size": [0, "x"]},
        {"quant_method": "fp8", "modules_to_not_convert": ["*a*a*a*a*a*a*a*a*a*b"]},
        {"quant_method": "compressed-tensors", "ignore": ["re:("]},
        {"quant_method": "compressed-tensors", "ignore": ["re:(a+)+$"]},
        {"quant_method": "compressed-tensors", "config_groups": [1]},
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": [1]},
        {"quant_method": "gptq", "bits": 4, "group_size": "x"},
        {"quant_method": 4},
    ],
)
def test_unusable_descriptions_are_refused_in_one_sentence(values: Any) -> None:
    with pytest.raises(InputError) as caught:
        read_quantization_values(values, {}, "config.json: quantization_config")
    assert "\n" not in str(caught.value)


def test_no_description_is_no_quantisation() -> None:
    assert read_quantization(Keys({"hidden_size": 3}, "x")) is None


# ---------------------------------------------------------------------------------------------------------- patterns


def test_long_lists_fold_into_few_patterns() -> None:
    names = [f"model.layers.{index}.{tail}" for index in range(94) for tail in ("mlp.gate", "input_layernorm")]
    assert fold_modules(names, num_layers=94) == (
        r"^(?:(?:model|language_model|backbone)\.)*layers\.(?:\d+)(?:\.mlp\.gate(?=\.|$)|\.input_layernorm(?=\.|$))",
    )
    assert len(fold_modules(names[:-2], num_layers=94)) == 1
    start = time.perf_counter()
    many = [f"model.layers.{index}.mlp.experts.{e}.up_proj" for index in range(60) for e in range(500)]
    assert len(fold_modules(many)) == 1
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("name", "hit", "missed"),
    [
        ("lm_head", "lm_head.weight", "my_lm_head.weight"),
        ("*.attn.*", "model.layers.3.self_attn.q_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("model.layers.1*", "model.layers.1.x.weight", "model.layers.2.x.weight"),
        ("vision_model.layers.0.mlp", "vision_model.layers.0.mlp.fc1.weight", "model.layers.0.mlp.fc1.weight"),
    ],
)
def test_module_patterns(name: str, hit: str, missed: str) -> None:
    import re

    assert re.search(module_pattern(name), hit) and not re.search(module_pattern(name), missed)


# -------------------------------------------------------------------------------------------------- sidecars and names


def test_a_sidecar_beside_the_config_is_read(tmp_path: Path) -> None:
    plain = need_shared("configs", "nvidia__Llama-3.1-70B-Instruct-FP8.json").read_text()
    (tmp_path / "config.json").write_text(plain)
    assert read_config(tmp_path / "config.json").quantization is None
    sidecar = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(sidecar))
    model = read_config(tmp_path / "config.json")
    assert model.quantization is not None and model.quantization.method == "modelopt"
    assert checkpoint_bytes(model) < 0.55 * checkpoint_bytes(replace(model, quantization=None))


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_name_makes_the_linear_layers_smaller_and_spares_the_rest(name: str) -> None:
    quantised = replace(MODEL, quantization=named_quantization(name, MODEL))
    assert checkpoint_bytes(quantised) < checkpoint_bytes(MODEL)
    found = {p.name: stored_format(quantised, p).name for p in model_parameters(quantised)}
    assert {found[f"{module}.weight"] for module in ALWAYS_PLAIN} == {"bfloat16"}


@pytest.mark.parametrize(
    ("words", "method"),
    [
        ("fp8 (online, from bf16)", "fp8"),
        ("fp8 (fbgemm)", "fbgemm_fp8"),
        ("fp8 (compressed-tensors, dynamic)", "fp8_dynamic"),
        ("nvfp4 (modelopt_fp4)", "nvfp4"),
        ("int4 (AutoRound)", "autoround_int4"),
        ("int4 (compressed-tensors, Marlin)", "int4"),
        ("AWQ", "awq_int4"),
        ("gptq-marlin", "gptq_int4"),
        ("2:4", "2:4"),
    ],
)
def test_words_of_people(words: str, method: str) -> None:
    assert named_quantization(words, MODEL).method == method


def test_a_checkpoint_keeps_its_own_rules() -> None:
    own = read_quantization_values({"quant_method": "fp8", "weight_block_size": [128, 128]}, {}, "x")
    model = replace(MODEL, quantization=own)
    assert named_quantization("fp8_block", model) is own
    assert named_quantization("awq_int4", model).method == "awq_int4"


def test_an_unknown_name_is_refused_with_those_known() -> None:
    with pytest.raises(InputError, match="awq_int4"):
        named_quantization("fp3", MODEL)
    assert "128" in assumption("awq") and assumption("fp8") == assumption("fp3") == ""


def test_fbgemm_leaves_attention_and_the_first_and_last_layer() -> None:
    quantised = replace(MODEL, quantization=named_quantization("fbgemm_fp8", MODEL))
    found = {p.name for p in model_parameters(quantised) if stored_format(quantised, p).name == "fp8 per row"}
    assert found == {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}


def test_nvfp4_leaves_the_way_to_and_from_latents() -> None:
    latent = spec.LatentAttention(
        num_heads=8, q_lora_rank=64, kv_lora_rank=64, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16
    )
    layer = replace(MODEL.layers[1], mixers=(latent,))
    model = replace(MODEL, layers=(layer,))
    model = replace(model, quantization=named_quantization("nvfp4", model))
    found = {
        p.name for p in model_parameters(model) if stored_format(model, p).name == "nvfp4" and "self_attn" in p.name
    }
    assert found == {"model.layers.0.self_attn.o_proj.weight"}
    plain = replace(MODEL, quantization=named_quantization("nvfp4", MODEL))
    assert any(stored_format(plain, p).name == "nvfp4" for p in model_parameters(plain) if "q_proj" in p.name)
