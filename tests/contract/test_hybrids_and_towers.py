"""Hybrid decoders and multi-modal models: exact counts, checkpoint names, splits, and what is refused.

Counts come from transformers 5.23.0 on meta tensors, or from the element counts of published checkpoints.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import need_shared

from ullage.account.parameters import Placed, count, model_parameters
from ullage.account.sharding import split_shape
from ullage.errors import InputError, UllageError, UnknownArchitectureError
from ullage.read.hf_config import read_config, read_config_object
from ullage.spec.model import GatedDeltaNet, Mamba2, Model

# ------------------------------------------------------------------------------------------------- configs of our own

CLIP_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
}
LLAVA: dict[str, Any] = {
    "model_type": "llava",
    "text_config": {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096},
    "vision_config": CLIP_336,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -2,
    "tie_word_embeddings": False,
}
QWEN3_5_SMALL: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_value_head_dim": 8,
    "mamba_ssm_dtype": "float32",
    "mtp_num_hidden_layers": 1,
    "vocab_size": 96,
}
QWEN3_5_VISION: dict[str, Any] = {
    "model_type": "qwen3_5",
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "num_position_embeddings": 16,
    "out_hidden_size": 64,
    "patch_size": 4,
    "deepstack_visual_indexes": [],
}
NEMOTRON_SMALL: dict[str, Any] = {
    "model_type": "nemotron_h",
    "hidden_size": 64,
    "hybrid_override_pattern": "M*-E",
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
    "conv_kernel": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 64,
    "moe_latent_size": 24,
    "num_nextn_predict_layers": 1,
    "vocab_size": 96,
}
GEMMA_4_AUDIO: dict[str, Any] = {
    "model_type": "gemma4_audio",
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "subsampling_conv_channels": [128, 32],
    "conv_kernel_size": 5,
    "use_clipped_linears": True,
    "output_proj_dims": 1536,
}


LFM2_1_2B: dict[str, Any] = {
    "model_type": "lfm2",
    "hidden_size": 2048,
    "block_ff_dim": 12288,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "full_attn_idxs": [2, 5, 8, 10, 12, 14],
    "conv_L_cache": 3,
    "vocab_size": 65536,
}


def read(values: dict[str, Any], **changes: Any) -> Model:
    return read_config_object({**values, **changes}, where="config", name="test")


def by_name(model: Model) -> dict[str, Placed]:
    return {placed.name: placed for placed in model_parameters(model)}


def size_of(placed: Iterator[Placed] | list[Placed]) -> int:
    return sum(math.prod(one.parameter.shape) * one.parameter.copies for one in placed)


# -------------------------------------------------------------------------------------------------------- exact counts

EXACT = [
    "Qwen__Qwen3-Next-80B-A3B-Instruct",
    "Qwen__Qwen3.5-27B",
    "Qwen__Qwen3.5-397B-A17B",
    "nvidia__Qwen3.6-35B-A3B-NVFP4",
    "moonshotai__Kimi-Linear-48B-A3B-Instruct",
    "ai21labs__Jamba-v0.1",
    "nvidia__Nemotron-H-56B-Base-8K",
    "nvidia__NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "nvidia__NVIDIA-Nemotron-3-Super-120B-A12B-FP8",
    "nvidia__NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16",
    "Qwen__Qwen2.5-VL-7B-Instruct",
    "Qwen__Qwen3-VL-2B-Instruct",
    "Qwen__Qwen3-VL-30B-A3B-Instruct",
    "google__gemma-3-4b-it",
    "google__gemma-4-26B-A4B",
    "google__gemma-4-E4B",
    "meta-llama__Llama-4-Maverick-17B-128E-Instruct",
    "RedHatAI__Llama-4-Scout-17B-16E-Instruct-FP8-dynamic",
    "meta-llama__Llama-3.2-90B-Vision-Instruct",
    "zai-org__GLM-4.5V",
    "moonshotai__Kimi-K2.5",
    "mistralai__Devstral-Small-2-24B-Instruct-2512",
]


@pytest.mark.parametrize("name", EXACT)
def test_counts_equal_the_reference(name: str) -> None:
    truth = json.loads(need_shared("configs", "param_counts.json").read_text())[name]
    counts = count(read_config(need_shared("configs", f"{name}.json")))
    assert counts.total == truth["params"]
    if truth["active_params"] is not None:
        assert counts.active == truth["active_params"]
    if truth["non_text_params"] is not None:
        assert counts.towers == truth["non_text_params"]


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("Qwen__Qwen3.5-35B-A3B", 35_951_822_704),
        ("moonshotai__Kimi-Linear-48B-A3B-Instruct", 49_122_681_728),
        ("deepseek-ai__DeepSeek-OCR", 3_336_106_240),
        ("zai-org__GLM-4.5V", 107_710_933_120),
    ],
)
def test_inventory_holds_what_the_published_checkpoint_stores(name: str, stored: int) -> None:
    """Buffers and MTP modules included."""
    assert size_of(list(model_parameters(read_config(need_shared("configs", f"{name}.json"))))) == stored


def test_minimax_m3_with_its_tower_is_what_the_checkpoint_stores() -> None:
    text = json.loads(need_shared("configs", "MiniMaxAI__MiniMax-M3.json").read_text())
    tower = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    values = {"model_type": "minimax_m3_vl", "text_config": text, "vision_config": {**tower, "patch_size": 14}}
    assert size_of(list(model_parameters(read(values)))) == 427_040_140_160


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("MiniMaxAI__MiniMax-M1", 456_089_655_296),  # transformers' MiniMaxForCausalLM of the same sizes
        ("tiiuae__Falcon-H1-0.5B", 521_411_104),  # with mamba_d_ssm = 24 x 64, which the file leaves out
    ],
)
def test_counts_without_a_published_figure(name: str, total: int) -> None:
    assert count(read_config(need_shared("configs", f"{name}.json"))).total == total


def test_llava_takes_the_sizes_that_its_config_leaves_to_llama() -> None:
    counts = count(read(LLAVA))
    assert (counts.total, counts.towers) == (7_063_427_072, 303_507_456 + 1024 * 4096 + 4096 + 4096 * 4096 + 4096)


def test_lfm2_is_tied_and_rounds_its_block_up() -> None:
    """12288 x 2/3 = 8192; 1,170,340,608 parameters in LiquidAI/LFM2-1.2B."""
    model = read(LFM2_1_2B)
    assert count(model).total == 1_170_340_608
    assert by_name(model)["model.layers.0.feed_forward.w1.weight"].parameter.shape == (8192, 2048)


def test_gemma_4_audio_tower() -> None:
    """304,824,608 in the tower, and 1536 x 1536 into the decoder of E2B."""
    values = json.loads(need_shared("configs", "google__gemma-4-E2B.json").read_text())
    model = read(values, audio_config=GEMMA_4_AUDIO)
    (audio,) = [tower for tower in model.towers if tower.name == "audio"]
    assert sum(math.prod(one.shape) for one in audio.tensors if not one.buffer) == 304_824_608 + 1536 * 1536


def test_mtp_module_of_qwen3_next_by_hand() -> None:
    """H = 2048: q with gate 8192 H, k and v 1024 H, o 4096 H, norms 2 x 256; 512 experts of 3 x H x 512, router, shared
    expert and its gate; two norms of the layer, three of the module; 2 H². It is in the checkpoint, not in the config.
    """
    hidden = 2048
    attention = (8192 + 1024 + 4096) * hidden + 512
    moe = 512 * 3 * hidden * 512 + 512 * hidden + 3 * hidden * 512 + hidden
    model = read_config(need_shared("configs", "Qwen__Qwen3-Next-80B-A3B-Instruct.json"))
    assert count(model).mtp == attention + moe + 5 * hidden + 2 * hidden**2
    assert any("MTP" in sentence for sentence in model.assumed)


def test_mtp_module_of_nemotron_lightning_by_hand() -> None:
    """H = 2688: attention 23,396,352; router 344,064; 128 experts of 2 H x 1856; shared 2 H x 3712; norms 5 H; 2 H²."""
    name = "nvidia__NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4.json"
    hidden = 2688
    experts, shared = 128 * 2 * hidden * 1856, 2 * hidden * 3712
    expected = 23_396_352 + 344_064 + experts + shared + 5 * hidden + 2 * hidden**2
    assert count(read_config(need_shared("configs", name))).mtp == expected == 1_335_325_824


# --------------------------------------------------------------------------------------------------- names and splits


def test_names_are_unique_and_those_of_the_checkpoint() -> None:
    whole = {"model_type": "qwen3_5", "text_config": QWEN3_5_SMALL, "vision_config": QWEN3_5_VISION}
    placed = list(model_parameters(read(whole)))
    names = {one.name for one in placed}
    assert len(names) == len(placed)
    assert {
        "model.language_model.embed_tokens.weight",
        "model.language_model.layers.0.linear_attn.in_proj_qkv.weight",
        "model.language_model.layers.0.linear_attn.A_log",
        "model.language_model.layers.3.self_attn.q_proj.weight",
        "model.language_model.norm.weight",
        "lm_head.weight",
        "model.visual.blocks.1.attn.qkv.bias",
        "model.visual.merger.linear_fc2.weight",
        "mtp.fc.weight",
        "mtp.pre_fc_norm_hidden.weight",
        "mtp.layers.0.self_attn.k_norm.weight",
        "mtp.layers.0.mlp.gate_proj.weight",
    } <= names


def test_layers_of_nemotron_follow_the_pattern() -> None:
    model = read(NEMOTRON_SMALL)
    names = set(by_name(model))
    assert {
        "backbone.embeddings.weight",
        "backbone.layers.0.mixer.in_proj.weight",
        "backbone.layers.1.mixer.q_proj.weight",
        "backbone.layers.2.mixer.up_proj.weight",
        "backbone.layers.3.mixer.experts.{e}.up_proj.weight",
        "backbone.layers.3.mixer.fc1_latent_proj.weight",
        "backbone.norm_f.weight",
        "mtp.layers.0.eh_proj.weight",
        "mtp.layers.0.mixer.q_proj.weight",
        "mtp.layers.1.mixer.gate.weight",
        "mtp.layers.1.final_layernorm.weight",
    } <= names
    words = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
    listed = {key: value for key, value in NEMOTRON_SMALL.items() if key != "hybrid_override_pattern"}
    assert read(listed, layers_block_type=[words[letter] for letter in "M*-E"]) == model


def test_state_dtype_is_read_from_the_config() -> None:
    (delta,) = read(QWEN3_5_SMALL).layers[0].mixers
    (mamba,) = read(NEMOTRON_SMALL).layers[0].mixers
    assert isinstance(delta, GatedDeltaNet) and delta.state_dtype == "float32"
    assert isinstance(mamba, Mamba2) and mamba.state_dtype == "float32"
    (plain,) = read({key: value for key, value in QWEN3_5_SMALL.items() if key != "mamba_ssm_dtype"}).layers[0].mixers
    assert isinstance(plain, GatedDeltaNet) and plain.state_dtype is None


@pytest.mark.parametrize(
    ("name", "on_four_ranks"),
    [
        ("model.layers.0.linear_attn.in_proj_qkv.weight", (32, 64)),  # (2 x 4 x 8 + 8 x 8) / 4
        ("model.layers.0.linear_attn.in_proj_b.weight", (2, 64)),
        ("model.layers.0.linear_attn.conv1d.weight", (32, 1, 4)),
        ("model.layers.0.linear_attn.A_log", (2,)),
        ("model.layers.0.linear_attn.norm.weight", (8,)),
        ("model.layers.0.linear_attn.out_proj.weight", (64, 16)),
        ("model.layers.3.self_attn.q_proj.weight", (32, 64)),  # queries and gate: 2 x 4 x 16 / 4
        ("model.layers.3.self_attn.k_proj.weight", (16, 64)),  # two KV heads: each on two ranks
    ],
)
def test_splits_of_a_hybrid(name: str, on_four_ranks: tuple[int, ...]) -> None:
    assert split_shape(by_name(read(QWEN3_5_SMALL))[name].parameter, 4) == on_four_ranks


@pytest.mark.parametrize(
    ("name", "on_two_ranks"),
    [
        ("model.visual.blocks.0.attn.qkv.weight", (48, 32)),
        ("model.visual.blocks.0.attn.qkv.bias", (48,)),
        ("model.visual.blocks.0.attn.proj.weight", (32, 16)),
        ("model.visual.blocks.0.attn.proj.bias", (32,)),
        ("model.visual.blocks.0.mlp.linear_fc2.weight", (32, 24)),
        ("model.visual.patch_embed.proj.weight", (32, 3, 2, 4, 4)),
        ("model.visual.pos_embed.weight", (16, 32)),
    ],
)
def test_splits_of_a_tower(name: str, on_two_ranks: tuple[int, ...]) -> None:
    whole = {"model_type": "qwen3_5", "text_config": QWEN3_5_SMALL, "vision_config": QWEN3_5_VISION}
    assert split_shape(by_name(read(whole))[name].parameter, 2) == on_two_ranks


def test_a_single_mamba_2_group_is_on_every_rank() -> None:
    """Falcon-H1-0.5B on 4 ranks: in = (2 x 24 x 64 + 24) / 4 + 2 x 128; conv = 24 x 64 / 4 + 2 x 128."""
    names = by_name(read_config(need_shared("configs", "tiiuae__Falcon-H1-0.5B.json")))
    at = "model.layers.0.mamba."
    assert split_shape(names[at + "in_proj.weight"].parameter, 4) == (774 + 256, 1024)
    assert split_shape(names[at + "conv1d.weight"].parameter, 4) == (384 + 256, 1, 4)
    assert split_shape(names[at + "conv1d.bias"].parameter, 4) == (640,)
    assert split_shape(names[at + "in_proj.weight"].parameter, 1) == (2 * 1536 + 256 + 24, 1024)


def test_towers_state_the_sizes_that_engines_go_by() -> None:
    (tower,) = read(LLAVA).towers
    assert (tower.num_layers, tower.hidden_size, tower.num_heads) == (24, 1024, 16)


def test_the_whole_decides_whether_the_head_is_tied() -> None:
    whole = {"model_type": "qwen3_5", "text_config": QWEN3_5_SMALL, "vision_config": QWEN3_5_VISION}
    assert not read(whole).tied_embeddings
    assert read(whole, tie_word_embeddings=True).tied_embeddings


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("values", "changes", "named"),
    [
        (NEMOTRON_SMALL, {"hybrid_override_pattern": "M*-X"}, "'X'"),
        (NEMOTRON_SMALL, {"num_hidden_layers": 5}, "num_hidden_layers"),
        (NEMOTRON_SMALL, {"sliding_window": 128}, "sliding_window"),
        (NEMOTRON_SMALL, {"mtp_hybrid_override_pattern": ""}, "mtp_layers_block_type"),
        (NEMOTRON_SMALL, {"mamba_num_heads": 0}, "mamba_num_heads"),
        (QWEN3_5_SMALL, {"layer_types": ["full_attention"]}, "layer_types"),
        (QWEN3_5_SMALL, {"layer_types": ["convolution"] * 4}, "convolution"),
        (QWEN3_5_SMALL, {"mtp_use_dedicated_embeddings": True}, "mtp_use_dedicated_embeddings"),
        (QWEN3_5_SMALL, {"num_experts": 8, "num_experts_per_tok": 9, "moe_intermediate_size": 8}, "expert"),
        (QWEN3_5_SMALL, {"a_new_kind_of_layer": 3}, "a_new_kind_of_layer"),
        (LLAVA, {"vision_config": None}, "vision_config"),
        (LLAVA, {"text_config": {"model_type": "nobody_knows"}}, "nobody_knows"),
        (LLAVA, {"text_config": "llama"}, "text_config"),
        (LLAVA, {"vision_config": {**CLIP_336, "num_attention_heads": 7}}, "num_attention_heads"),
        (LLAVA, {"vision_config": {**CLIP_336, "a_new_tower_part": 2}}, "a_new_tower_part"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(values: dict[str, Any], changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UllageError, match=named) as caught:
        read(values, **changes)
    assert isinstance(caught.value, InputError | UnknownArchitectureError)


def test_a_llama_4_without_tower_sizes_says_what_it_assumed() -> None:
    model = read_config(need_shared("configs", "meta-llama__Llama-4-Scout-17B-16E-Instruct.json"))
    assert any("vision_config" in sentence for sentence in model.assumed)
