"""Vision towers of Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5, GLM-4.1V and GLM-4.5V.

Source: transformers@5.23.0:models/qwen2_vl/, qwen2_5_vl/, qwen3_vl/, qwen3_5/, glm4v_moe/ modeling files; splits:
vllm@0.33.0:vllm/model_executor/models/qwen2_vl.py, qwen2_5_vl.py, qwen3_vl.py, glm4_1v.py.
"""

from __future__ import annotations

from dataclasses import replace

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.hf_config.families import vision
from ullage.read.hf_config.families.vision import EncoderLayer, Tensors, conv, linear, norm, table
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import Model, Tower

_LAYER = EncoderLayer(qkv=("attn.qkv",), out="attn.proj", ups=("mlp.fc1",), down="mlp.fc2", norms=("norm1", "norm2"))
_SETTINGS = ("dtype", "torch_dtype", "fullatt_block_indexes", "spatial_patch_size", "tokens_per_second", "window_size")


def _sizes(part: Keys, hidden_key: str = "hidden_size") -> tuple[int, int, int, tuple[int, int, int, int]]:
    """Take depth, hidden size, patches merged into one token, and the shape of a patch."""
    part.skip(*_SETTINGS)
    hidden = part.integer(hidden_key)
    vision.head_size(part, hidden, "num_heads")
    channels = part.first_integer("in_channels", "in_chans", default=3)
    patch = part.integer("patch_size")
    merged = part.integer("spatial_merge_size", 2) ** 2
    return (
        vision.num_layers(part, "depth"),
        hidden,
        merged,
        (channels, part.integer("temporal_patch_size", 2), patch, patch),
    )


def _tower(part: Keys, tensors: Tensors, hidden: str = "hidden_size") -> Tower:
    return vision.tower(part, tensors, layers="depth", hidden=hidden, heads="num_heads")


# ---------------------------------------------------------------------------------------------------- Qwen2-VL, 2.5-VL


def read_2_vl(keys: Keys) -> Model:
    """Read Qwen2-VL. Its tower's ``hidden_size`` is that of the decoder, ``embed_dim`` its own."""
    part = vision.need_part(keys, "vision_config")
    depth, hidden, merged, patch = _sizes(part, "embed_dim")
    inner = hidden * part.integer("mlp_ratio", 4)
    tensors = conv("visual.patch_embed.proj", hidden, *patch) + _LAYER.stack("visual.blocks", depth, hidden, inner)
    tensors += _merger_2(hidden, merged, part.integer("hidden_size"), norm_bias=True)
    return _assemble_2(keys, _tower(part, tensors, "embed_dim"))


def read_2_5_vl(keys: Keys) -> Model:
    """Read Qwen2.5-VL."""
    part = vision.need_part(keys, "vision_config")
    depth, hidden, merged, patch = _sizes(part)
    layer = replace(_LAYER, ups=("mlp.gate_proj", "mlp.up_proj"), down="mlp.down_proj", norm_bias=False)
    tensors = conv("visual.patch_embed.proj", hidden, *patch)
    tensors += layer.stack("visual.blocks", depth, hidden, part.integer("intermediate_size"))
    tensors += _merger_2(hidden, merged, part.integer("out_hidden_size"), norm_bias=False)
    return _assemble_2(keys, _tower(part, tensors))


def _merger_2(hidden: int, merged: int, out: int, *, norm_bias: bool) -> Tensors:
    width = hidden * merged
    return (
        norm("visual.merger.ln_q", hidden, bias=norm_bias)
        + linear("visual.merger.mlp.0", width, width, bias=True, split="out")
        + linear("visual.merger.mlp.2", out, width, bias=True, split="in")
    )


def _assemble_2(keys: Keys, tower: Tower) -> Model:
    """Add the decoder, a Qwen2: nested in newer configs, in the whole in older ones."""
    nested = keys.part("text_config")
    text = vision.read_as("qwen2", keys if nested is None else nested)
    return vision.assemble(keys, text, [tower], prefix="model.")


# -------------------------------------------------------------------------------------------------- Qwen3-VL, Qwen3.5


def read_3_vl(keys: Keys) -> Model:
    """Read Qwen3-VL and Qwen3.5, whose towers differ only in the mergers of inner layers (deepstack)."""
    keys.skip("language_model_only")
    part = vision.need_part(keys, "vision_config")
    depth, hidden, merged, patch = _sizes(part)
    width, out = hidden * merged, part.integer("out_hidden_size")
    layer = replace(_LAYER, ups=("mlp.linear_fc1",), down="mlp.linear_fc2")
    at = "model.visual."
    tensors = conv(at + "patch_embed.proj", hidden, *patch, bias=True)
    tensors += table(at + "pos_embed.weight", part.integer("num_position_embeddings"), hidden)
    tensors += layer.stack(at + "blocks", depth, hidden, part.integer("intermediate_size"))
    tensors += _merger_3(at + "merger", width, out, norm_size=hidden)
    for index in range(len(part.integers("deepstack_visual_indexes", []))):
        tensors += _merger_3(f"{at}deepstack_merger_list.{index}", width, out, norm_size=width)
    text = vision.read_text(vision.need_part(keys, "text_config"))
    return vision.assemble(keys, text, [_tower(part, tensors)], prefix="model.language_model.")


def _merger_3(at: str, width: int, out: int, *, norm_size: int) -> Tensors:
    return (
        norm(f"{at}.norm", norm_size, bias=True)
        + linear(f"{at}.linear_fc1", width, width, bias=True, split="out")
        + linear(f"{at}.linear_fc2", out, width, bias=True, split="in")
    )


# ------------------------------------------------------------------------------------------------------------ GLM-4.5V


def read_glm4v_moe(keys: Keys) -> Model:
    """Read GLM-4.1V and GLM-4.5V.

    The blocks' inner size is the decoder's hidden size; ``intermediate_size`` is the merger's.
    """
    part = vision.need_part(keys, "vision_config")
    depth, hidden, _merged, patch = _sizes(part)
    out, inner = part.integer("out_hidden_size"), part.integer("intermediate_size")
    merge, bias = part.integer("spatial_merge_size"), part.flag("attention_bias", False)
    layer = replace(
        _LAYER,
        ups=("mlp.gate_proj", "mlp.up_proj"),
        down="mlp.down_proj",
        qkv_bias=bias,
        out_bias=False,
        mlp_bias=False,
        norm_bias=False,
    )
    at = "model.visual."
    positions = (part.integer("image_size") // patch[-1]) ** 2
    tensors = conv(at + "patch_embed.proj", hidden, *patch, bias=True)
    tensors += table(at + "embeddings.position_embedding.weight", positions, hidden)
    tensors += layer.stack(at + "blocks", depth, hidden, out)
    tensors += norm(at + "post_conv_layernorm", hidden) + norm(at + "post_layernorm", hidden)
    tensors += conv(at + "downsample", out, hidden, merge, merge, bias=True)
    tensors += linear(at + "merger.proj", out, out) + norm(at + "merger.post_projection_norm", out, bias=True)
    for name in ("gate_proj", "up_proj"):
        tensors += linear(f"{at}merger.{name}", inner, out, split="out")
    tensors += linear(at + "merger.down_proj", out, inner, split="in")
    text = vision.read_text(vision.need_part(keys, "text_config"))
    if text.hidden_size != out:
        raise InputError(_("is not the decoder's hidden_size"), where=part.at("out_hidden_size"))
    return vision.assemble(keys, text, [_tower(part, tensors)], prefix="model.language_model.")
