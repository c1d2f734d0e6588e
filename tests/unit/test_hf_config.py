"""What a config says about its layers is what the model holds; what it says and nobody understands is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import need_shared

from ullage.account.parameters import count, model_parameters
from ullage.errors import InputError, UnknownArchitectureError
from ullage.read.hf_config import FAMILIES, read_config, read_config_object
from ullage.read.hf_config.families import llama
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import Attention, CompressedAttention, LatentAttention, Model, MoEFFN

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "torch_dtype": "float16",
}
MLA: dict[str, Any] = {
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
}
V4: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "hidden_size": 256,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 1000,
    "q_lora_rank": 96,
    "o_lora_rank": 32,
    "o_groups": 4,
    "qk_rope_head_dim": 16,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "index_n_heads": 4,
    "index_head_dim": 32,
    "index_topk": 16,
    "sliding_window": 32,
    "hc_mult": 4,
    "compress_ratios": [0, 4, 128, 4, 128, 0],
    "num_hash_layers": 2,
    "num_nextn_predict_layers": 1,
}


def read(base: dict[str, Any] = LLAMA, *, assume: bool = False, **changes: Any) -> Model:
    values = {key: value for key, value in {**base, **changes}.items() if value is not ...}
    return read_config_object(values, where="config.json", name="a/b", assume=assume)


def mixers(model: Model) -> list[Any]:
    return [layer.mixers[0] for layer in model.layers]


def windows(model: Model) -> list[int | None]:
    return [mixer.window for mixer in mixers(model)]


# ------------------------------------------------------------------------------------------- windows, chunks, sharing


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "llama"}, [None] * 8),
        ({"model_type": "mistral"}, [4096] * 8),
        ({"model_type": "mistral", "sliding_window": None}, [None] * 8),
        ({"model_type": "mistral", "sliding_window": 512}, [512] * 8),
        ({"model_type": "ministral3"}, [None] * 8),
        ({"model_type": "qwen2", "sliding_window": 512, "use_sliding_window": False}, [None] * 8),
        (
            {"model_type": "qwen2", "sliding_window": 512, "use_sliding_window": True, "max_window_layers": 6},
            [None] * 6 + [512] * 2,
        ),
        ({"model_type": "gemma2", "sliding_window": 512}, [512, None] * 4),
        ({"model_type": "gemma3_text", "sliding_window": 512}, [512] * 5 + [None] + [512] * 2),
        ({"model_type": "gemma3_text", "sliding_window": 512, "sliding_window_pattern": 2}, [512, None] * 4),
        ({"model_type": "olmo3", "sliding_window": 512}, ([512] * 3 + [None]) * 2),
        ({"model_type": "cohere2", "sliding_window": 512}, ([512] * 3 + [None]) * 2),
        ({"model_type": "exaone4", "sliding_window": 512}, ([512] * 3 + [None]) * 2),
        ({"model_type": "exaone4", "sliding_window": None}, [None] * 8),
        (
            {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 128},
            [128, None] * 4,
        ),
        (
            {
                "model_type": "gpt_oss",
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "layer_types": ["full_attention"] * 7 + ["sliding_attention"],
            },
            [None] * 7 + [128],
        ),
    ],
)
def test_sliding_windows_follow_each_familys_rule(changes: dict[str, Any], expected: list[int | None]) -> None:
    assert windows(read(**changes)) == expected


def test_llama_4_attends_in_chunks_but_in_every_fourth_layer() -> None:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2}
    model = read(model_type="llama4_text", intermediate_size_mlp=1024, no_rope_layers=[], **experts)
    assert [mixer.chunk for mixer in mixers(model)] == [8192, 8192, 8192, None] * 2
    assert [isinstance(layer.ffns[0], MoEFFN) for layer in model.layers] == [False, True] * 4


def test_mimo_v2_windowed_layers_have_their_own_heads_and_sinks() -> None:
    model = read(
        model_type="mimo_v2_flash",
        num_hidden_layers=3,
        num_key_value_heads=2,
        head_dim=48,
        v_head_dim=32,
        swa_num_attention_heads=8,
        swa_num_key_value_heads=4,
        swa_head_dim=48,
        swa_v_head_dim=32,
        sliding_window=128,
        hybrid_layer_pattern=[0, 1, 0],
        moe_layer_freq=[0, 1, 1],
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
    )
    kinds = [(part.num_kv_heads, part.v_head_dim, part.window, part.sinks) for part in mixers(model)]
    assert kinds == [(2, 32, None, False), (4, 32, 128, True), (2, 32, None, False)]


def test_gemma_4_shares_keys_and_values_late_and_widens_those_blocks() -> None:
    model = read(
        model_type="gemma4_text",
        num_hidden_layers=12,
        num_kv_shared_layers=4,
        use_double_wide_mlp=True,
        head_dim=32,
        global_head_dim=64,
        hidden_size_per_layer_input=16,
    )
    parts: list[Attention] = mixers(model)
    assert [part.shared_kv for part in parts] == [False] * 8 + [True] * 4
    assert [part.head_dim for part in parts] == ([32] * 5 + [64]) * 2
    assert [layer.ffns[0].intermediate_size for layer in model.layers] == [512] * 8 + [1024] * 4
    names = {placed.name for placed in model_parameters(model)}
    assert "model.layers.7.self_attn.k_proj.weight" in names
    assert "model.layers.8.self_attn.k_proj.weight" not in names


def test_gemma_4_must_leave_keys_of_each_kind_to_share() -> None:
    with pytest.raises(InputError, match="num_kv_shared_layers"):
        read(model_type="gemma4_text", num_hidden_layers=6, num_kv_shared_layers=2)


def test_llama_3_2_vision_crosses_to_the_image_and_embeds_eight_rows_more() -> None:
    model = read(model_type="mllama_text_model", cross_attention_layers=[1, 5])
    assert [part.cross for part in mixers(model)] == [index in (1, 5) for index in range(8)]
    shapes = {placed.name: placed.parameter.shape for placed in model_parameters(model)}
    assert shapes["model.embed_tokens.weight"] == (1008, 256)
    assert shapes["lm_head.weight"] == (1000, 256)


def test_decilm_layers_without_attention_keep_no_keys() -> None:
    attention = {"n_heads_in_group": 4, "no_op": False, "replace_with_linear": False}
    ffn = {"ffn_mult": 2.0, "no_op": False, "replace_with_linear": False}
    blocks = [
        {"attention": attention, "ffn": ffn},
        {"attention": {"no_op": True}, "ffn": {"no_op": True}},
        {"attention": {"replace_with_linear": True, "no_op": False}, "ffn": {**ffn, "ffn_mult": 1.0}},
    ]
    model = read(model_type="nemotron-nas", num_hidden_layers=3, block_configs=blocks)
    assert [len(layer.mixers) for layer in model.layers] == [1, 0, 0]
    assert [len(layer.norms) for layer in model.layers] == [2, 0, 2]
    assert model.layers[0].mixers[0].num_kv_heads == 2  # type: ignore[union-attr]
    assert [layer.ffns[0].intermediate_size if layer.ffns else 0 for layer in model.layers] == [512, 0, 256]
    assert model.layers[2].extras[0].name == "self_attn.linear_attn.weight"


# --------------------------------------------------------------------------------------------------- latent attention


def test_a_missing_query_rank_is_the_class_default_and_null_is_none() -> None:
    v2 = {"model_type": "deepseek_v2", **MLA}
    assert mixers(read(**v2))[0].q_lora_rank == 1536
    assert mixers(read(**v2, q_lora_rank=None))[0].q_lora_rank is None


def test_v32_indexes_in_every_layer_and_in_the_mtp_module() -> None:
    index = {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
    model = read(model_type="deepseek_v32", q_lora_rank=96, num_nextn_predict_layers=1, **MLA, **index)
    parts: list[LatentAttention] = [*mixers(model), model.mtp[0].layer.mixers[0]]
    assert {(part.indexer.num_heads, part.indexer.head_dim) for part in parts if part.indexer} == {(64, 128)}
    assert all(part.indexer for part in parts)


@pytest.mark.parametrize(
    "sharing",
    [
        {"indexer_types": ["full"] * 3 + ["shared"] * 3 + ["full", "shared"]},
        {"index_topk_freq": 4, "index_skip_topk_offset": 3},
        {"index_topk_pattern": "FFFSSSFS"},
    ],
)
def test_glm_5_2_shares_the_choice_of_earlier_layers(sharing: dict[str, Any]) -> None:
    index = {"index_n_heads": 32, "index_head_dim": 128, "index_topk": 2048}
    model = read(model_type="glm_moe_dsa", q_lora_rank=96, **MLA, **index, **sharing)
    own = [index in (0, 1, 2, 6) for index in range(8)]
    assert [part.indexer is not None for part in mixers(model)] == own
    assert [part.shared_indexer for part in mixers(model)] == [not owns for owns in own]


def test_the_native_format_is_known_by_its_keys() -> None:
    native = {
        "vocab_size": 1000,
        "dim": 256,
        "inter_dim": 512,
        "moe_inter_dim": 64,
        "n_layers": 8,
        "n_dense_layers": 1,
        "n_heads": 8,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "n_activated_experts": 2,
        "q_lora_rank": 0,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "mscale": 0.707,
    }
    hugging_face = read(model_type="deepseek_v2", q_lora_rank=None, **MLA)
    assert count(read(native)) == count(hugging_face)
    with pytest.raises(UnknownArchitectureError, match="n_sparse_things"):
        read(native, n_sparse_things=3)


def test_the_native_format_of_v4_says_the_same_as_its_hugging_face_config() -> None:
    names = {
        "hidden_size": "dim",
        "moe_intermediate_size": "moe_inter_dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_experts_per_tok": "n_activated_experts",
        "num_hash_layers": "n_hash_layers",
        "num_nextn_predict_layers": "n_mtp_layers",
        "qk_rope_head_dim": "rope_head_dim",
        "sliding_window": "window_size",
    }
    left_out = ("model_type", "num_key_value_heads")
    native = {names.get(key, key): value for key, value in V4.items() if key not in left_out}
    assert read(native).layers == read(V4).layers
    assert read(native).mtp == read(V4).mtp
    assert read(native, dtype="fp8").quantization is not None


def test_step_takes_more_heads_in_sliding_layers_and_names_its_expert_layers() -> None:
    model = read(
        model_type="step3p5",
        head_dim=32,
        layer_types=["full_attention", "sliding_attention"] * 4,
        sliding_window=512,
        attention_other_setting={"attention_type": "sliding_attention", "num_attention_heads": 12},
        moe_layers_enum="2,3",
        moe_num_experts=8,
        moe_top_k=2,
        moe_intermediate_size=64,
        share_expert_dim=64,
    )
    assert [(part.num_heads, part.window) for part in mixers(model)] == [(8, None), (12, 512)] * 4
    assert [len(layer.ffns) for layer in model.layers] == [1, 1, 2, 2, 1, 1, 1, 1]


# -------------------------------------------------------------------------------------------------------- DeepSeek-V4


def test_v4_layers_are_what_their_ratios_say() -> None:
    model = read(V4)
    parts: list[CompressedAttention] = mixers(model)
    assert [(part.compress_ratio, part.overlap, part.indexer is not None) for part in parts] == [
        (0, False, False),
        (4, True, True),
        (128, False, False),
        (4, True, True),
        (128, False, False),
    ]
    by_types = read(
        V4,
        compress_ratios=...,
        layer_types=[
            "sliding_attention",
            *["compressed_sparse_attention", "heavily_compressed_attention"] * 2,
        ],
    )
    assert by_types.layers == model.layers


def test_v4_hash_layers_have_a_table_of_tokens_instead_of_a_correction_bias() -> None:
    model = read(V4)
    found = {placed.name: placed.parameter for placed in model_parameters(model)}
    tables = [name for name in found if name.endswith("tid2eid")]
    assert tables == ["layers.0.ffn.gate.tid2eid", "layers.1.ffn.gate.tid2eid"]
    assert (found[tables[0]].shape, found[tables[0]].dtype, found[tables[0]].buffer) == ((1000, 2), "int64", True)
    assert [name for name in found if name.endswith("gate.bias")] == [
        *(f"layers.{index}.ffn.gate.bias" for index in (2, 3, 4)),
        "mtp.0.ffn.gate.bias",
    ]


def test_v4_is_split_as_vllm_splits_it() -> None:
    """wq_b by heads, wo_a by groups, wo_b by its input; all that makes keys, entries and indices is replicated."""
    found = {placed.name: placed.parameter for placed in model_parameters(read(V4)) if placed.layer == 1}
    attention = {name.removeprefix("layers.1.attn."): part for name, part in found.items() if ".attn." in name}
    split = {name: (part.split, part.units) for name, part in attention.items() if part.split != "none"}
    assert split == {
        "attn_sink": ("out", 8),
        "wq_b.weight": ("out", 8),
        "wo_a.weight": ("out", 4),
        "wo_b.weight": ("in", 0),
    }
    assert attention["wo_a.weight"].shape == (4 * 32, 8 * 64 // 4)
    assert attention["compressor.wkv.weight"].shape == (2 * 64, 256)
    assert attention["indexer.compressor.ape"].shape == (4, 2 * 32)
    assert found["layers.1.hc_attn_fn"].shape == (24, 4 * 256)
    assert found["layers.1.hc_attn_fn"].dtype == "float32"


# ------------------------------------------------------------------------------------------------------------- errors


def test_an_unknown_model_type_is_named_with_its_keys() -> None:
    with pytest.raises(UnknownArchitectureError, match=r"'brand_new'.*hidden_size") as caught:
        read(model_type="brand_new")
    assert caught.value.exit_code == 5


def test_a_plain_decoder_of_unknown_type_is_read_on_the_users_word() -> None:
    model = read(model_type="brand_new", some_switch=True, assume=True)
    assert count(model) == count(read())
    assert model.ignored_keys == ("some_switch",)
    assert any("brand_new" in said for said in model.assumed)
    assert any("some_switch" in said for said in model.assumed)


def test_a_config_that_tells_too_little_is_not_assumed() -> None:
    with pytest.raises(UnknownArchitectureError, match="brand_new"):
        read(model_type="brand_new", num_key_value_heads=..., assume=True)


@pytest.mark.parametrize("key", ["kv_lora_rank", "num_experts", "sliding_window", "brand_new_thing"])
def test_evidence_against_the_family_is_an_error_that_names_it(key: str) -> None:
    with pytest.raises(UnknownArchitectureError, match=key):
        read(**{key: 64})
    assert read(**{key: 64}, assume=True).ignored_keys == (key,)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_key_value_heads": 16}, "num_key_value_heads"),
        ({"num_attention_heads": 7, "num_key_value_heads": 7}, "num_attention_heads"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": "big"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"vocab_size": ...}, "vocab_size"),
        ({"torch_dtype": "float99"}, "torch_dtype"),
        ({"torch_dtype": {"a": 1}}, "torch_dtype"),
        ({"architectures": [3]}, "architectures"),
        ({"model_type": 7}, "model_type"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "layer_types"),
        ({"model_type": "gemma2", "layer_types": "full"}, "layer_types"),
        ({"model_type": "mllama_text_model", "cross_attention_layers": [8]}, "cross_attention_layers"),
        ({**V4, "compress_ratios": [0, 4]}, "compress_ratios"),
        ({**V4, "o_groups": 3}, "o_groups"),
        ({"model_type": "nemotron-nas", "block_configs": [{}] * 8}, "block_configs"),
        ({"model_type": "nemotron-nas", "block_configs": ["a"] * 8}, "block_configs"),
    ],
)
def test_values_that_cannot_be_are_refused_with_their_key(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        read(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "gemma2", "layer_types": ["linear_attention"] * 8},
        {"model_type": "phi3", "mlp_bias": True},
        {"model_type": "opt", "word_embed_proj_dim": 64, "ffn_dim": 512},
    ],
)
def test_variants_that_are_not_understood_are_named(changes: dict[str, Any]) -> None:
    with pytest.raises(UnknownArchitectureError):
        read(**changes)


def test_two_names_for_one_thing_must_agree() -> None:
    experts = {"model_type": "gpt_oss", "num_local_experts": 8}
    read(**experts, num_experts_per_tok=2, experts_per_token=2)
    with pytest.raises(InputError, match="experts_per_token 4"):
        read(**experts, num_experts_per_tok=2, experts_per_token=4)


# -------------------------------------------------------------------------------------------------------------- frame


def test_a_part_takes_dtype_tying_and_name_from_the_whole() -> None:
    text = {key: LLAMA[key] for key in LLAMA if key not in ("torch_dtype", "architectures", "model_type")}
    whole = Keys(
        {"text_config": text, "dtype": "float32", "tie_word_embeddings": True, "architectures": ["Whole"]},
        "config.json",
    )
    part = whole.part("text_config")
    assert part is not None
    model = llama.read(part)
    assert (model.dtype, model.tied_embeddings, model.architecture) == ("float32", True, "Whole")


def test_tied_embeddings_are_counted_once() -> None:
    untied, tied = count(read(tie_word_embeddings=False)), count(read(tie_word_embeddings=True))
    assert untied.total - tied.total == 1000 * 256


def test_the_name_and_source_come_from_the_path(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    path = folder / "config.json"
    path.write_text(json.dumps(LLAMA))
    model = read_config(path)
    assert (model.name, model.source) == ("my-model", str(path))


def test_every_registered_reader_exists() -> None:
    from importlib import import_module

    for reader in set(FAMILIES.values()):
        module, function = reader.split(":")
        assert callable(getattr(import_module(f"ullage.read.hf_config.families.{module}"), function)), reader


@pytest.mark.parametrize(
    ("name", "sections"),
    [("Qwen__Qwen2.5-VL-7B-Instruct", True), ("Qwen__Qwen3-VL-2B-Instruct", True), ("Qwen__Qwen3-8B", False)],
)
def test_rotation_by_sections_is_told_from_the_plain_one(name: str, sections: bool) -> None:
    assert read_config(need_shared("configs", name + ".json"), assume=True).rotary_sections is sections


def test_gpt2_is_read_under_the_usual_names_too():
    own = {"model_type": "gpt2", "n_embd": 256, "n_layer": 4, "n_head": 8, "n_positions": 128, "vocab_size": 1000}
    usual = {
        "model_type": "gpt2",
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "max_position_embeddings": 128,
        "intermediate_size": 1024,
        "vocab_size": 1000,
    }
    first, second = (read_config_object(config, where="config.json", name="small") for config in (own, usual))
    assert first == second
    with pytest.raises(UnknownArchitectureError):  # n_inner alone is the width
        read_config_object({**usual, "intermediate_size": 1000}, where="config.json", name="small")
