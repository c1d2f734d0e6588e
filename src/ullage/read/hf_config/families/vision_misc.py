"""Towers of Kimi K2.5 and K3 (MoonViT), Mistral 3 (Pixtral) and LLaVA 1.5 (CLIP).

Source: transformers@5.23.0:models/kimi_k25/, pixtral/, mistral3/, llava/, clip/ modeling files; for K3 and the splits:
vllm@0.33.0:vllm/model_executor/models/kimi_k25_vit.py, pixtral.py, mistral3.py, clip.py, llava.py.
"""

from __future__ import annotations

from dataclasses import replace

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.hf_config.families import llama, vision
from ullage.read.hf_config.families.vision import CLIP_LAYER, EncoderLayer, Tensors, conv, linear, norm, table
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import Model

_TEXT, _HEAD = "language_model.model.", "language_model.lm_head"


# ---------------------------------------------------------------------------------------------------------------- Kimi

_MOONVIT_LAYER = EncoderLayer(qkv=("wqkv",), out="wo", ups=("mlp.fc0",), down="mlp.fc1", norms=("norm0", "norm1"))
_MOONVIT_SETTINGS = (
    "activation_func",
    "dtype",
    "init_pos_emb_time",
    "merge_type",
    "model_type",
    "pos_emb_interpolation_mode",
    "projector_hidden_act",
    "projector_ln_eps",
    "video_attn_type",
)


def read_kimi(keys: Keys) -> Model:
    """Read Kimi K2.5 and Kimi K3."""
    keys.skip("use_unified_vision_chunk")
    part = vision.need_part(keys, "vision_config")
    text = vision.read_text(vision.need_part(keys, "text_config"), "kimi_k2")
    tensors = _moonvit(part, "vision_tower.") + _kimi_projector(part, "mm_projector.", text.hidden_size)
    keys_of = {"layers": "vt_num_hidden_layers", "hidden": "vt_hidden_size", "heads": "vt_num_attention_heads"}
    tower = vision.tower(part, tensors, **keys_of)
    return vision.assemble(keys, text, [tower], prefix=_TEXT, head=_HEAD)


def _choice(part: Keys, key: str, *known: str) -> str:
    value: str = part.text(key, known[0])
    if value not in known:
        raise InputError(
            _("{value} is not understood").format(value=repr(value)[:60]),
            where=part.at(key),
            remedy=_("known are: {kinds}").format(kinds=", ".join(known)),
        )
    return value


def _moonvit(part: Keys, at: str) -> Tensors:
    """Return MoonViT; K3 leaves out biases, has root-mean-square norms and narrower or wider heads."""
    part.skip(*_MOONVIT_SETTINGS)
    _choice(part, "mlp_type", "mlp2")
    _choice(part, "pos_emb_type", "divided_fixed")
    hidden, inner = part.integer("vt_hidden_size"), part.integer("vt_intermediate_size")
    width = part.integer("qkv_hidden_size", hidden)
    vision.head_size(part, width, "vt_num_attention_heads")
    has_bias = _choice(part, "norm_type", "layernorm", "rmsnorm") == "layernorm"
    attention_bias = part.flag("attn_bias", True)
    layer = replace(
        _MOONVIT_LAYER,
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=part.flag("linear_bias", True),
        norm_bias=has_bias,
    )
    patch, side = part.integer("patch_size"), ("init_pos_emb_height", "init_pos_emb_width")
    tensors = conv(at + "patch_embed.proj", hidden, 3, patch, patch, bias=part.flag("patch_embed_proj_bias", True))
    tensors += table(at + "patch_embed.pos_emb.weight", *(part.integer(name) for name in side), hidden)
    tensors += layer.stack(at + "encoder.blocks", vision.num_layers(part, "vt_num_hidden_layers"), hidden, inner, width)
    return tensors + norm(at + "encoder.final_layernorm", hidden, bias=has_bias)


def _kimi_projector(part: Keys, at: str, hidden: int) -> Tensors:
    """Return the projector over merged patches: norm before (K2.5) or after, and without biases (K3)."""
    if part.integer("text_hidden_size", hidden) != hidden:
        raise InputError(_("is not the decoder's hidden_size"), where=part.at("text_hidden_size"))
    size = part.integer("mm_hidden_size")
    rows, columns = part.integers("merge_kernel_size", length=2, low=1)
    merged, is_second = (
        size * rows * columns,
        _choice(part, "mm_projector_type", "patchmerger", "patchmergerv2") == "patchmergerv2",
    )
    tensors = linear(at + "proj.0", merged, merged, bias=not is_second)
    tensors += linear(at + "proj.2", hidden, merged, bias=not is_second)
    return tensors + (norm(at + "post_norm", hidden) if is_second else norm(at + "pre_norm", size, bias=True))


# ------------------------------------------------------------------------------------------------------------- Mistral

_PIXTRAL_LAYER = EncoderLayer(
    qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    out="attention.o_proj",
    ups=("feed_forward.gate_proj", "feed_forward.up_proj"),
    down="feed_forward.down_proj",
    norms=("attention_norm", "ffn_norm"),
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    norm_bias=False,
)


def read_ministral3(keys: Keys) -> Model:
    """Read Ministral 3: the decoder alone, or the whole with a Pixtral tower where there is a ``text_config``."""
    return read_mistral3(keys) if "text_config" in keys else llama.read_ministral3(keys)


def read_mistral3(keys: Keys) -> Model:
    """Read Mistral Small 3.1, Devstral Small 2, Ministral 3: a Pixtral tower and a projector that merges patches."""
    part = vision.need_part(keys, "vision_config")
    text = vision.read_text(vision.need_part(keys, "text_config"), "mistral")
    hidden, merged = part.integer("hidden_size"), keys.integer("spatial_merge_size", 2) ** 2
    at, bias = "multi_modal_projector.", keys.flag("multimodal_projector_bias", False)
    tensors = _pixtral(part, "vision_tower.") + norm(at + "norm", hidden)
    tensors += linear(at + "patch_merger.merging_layer", hidden, merged * hidden)
    tensors += two_layers(keys, at, hidden, text.hidden_size, bias)
    return vision.assemble(keys, text, [vision.tower(part, tensors)], prefix=_TEXT, head=_HEAD)


def two_layers(keys: Keys, at: str, hidden: int, out: int, bias: bool) -> Tensors:
    """Return a projector of two linear layers, over one or several layers' features side by side."""
    keys.skip("projector_hidden_act", "vision_feature_select_strategy")
    features = keys.raw("vision_feature_layer", -1)
    width = hidden * (len(features) if isinstance(features, list) and features else 1)
    return linear(at + "linear_1", out, width, bias=bias, split="out") + linear(
        at + "linear_2", out, out, bias=bias, split="in"
    )


def _pixtral(part: Keys, at: str) -> Tensors:
    hidden, patch = part.integer("hidden_size"), part.integer("patch_size")
    part.skip("dtype", "torch_dtype", "image_size", "head_dim", "vocab_size")
    vision.head_size(part, hidden, "num_attention_heads")
    tensors = conv(at + "patch_conv", hidden, part.integer("num_channels", 3), patch, patch)
    tensors += norm(at + "ln_pre", hidden)
    layers = vision.num_layers(part)
    return tensors + _PIXTRAL_LAYER.stack(at + "transformer.layers", layers, hidden, part.integer("intermediate_size"))


# --------------------------------------------------------------------------------------------------------------- LLaVA

#: transformers@5.23.0:models/llama/configuration_llama.py:LlamaConfig, what LLaVA's text_config leaves out.
_LLAMA_DEFAULTS = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}


def read_llava(keys: Keys, *, newline: bool = False) -> Model:
    """Read LLaVA 1.5: a CLIP tower and a Llama, whose published config leaves the default sizes out.

    ``newline``: with a learned row between tiles (LLaVA-NeXT).
    """
    part, nested = vision.need_part(keys, "vision_config"), vision.need_part(keys, "text_config")
    if nested.text("model_type", "llama") == "llama":
        nested.values = {**_LLAMA_DEFAULTS, **nested.values}
    keys.skip("vocab_size", "projection_dim")
    text = vision.read_text(nested, "llama")
    tensors = _clip(part, "vision_tower.vision_model.") + (table("image_newline", text.hidden_size) if newline else ())
    bias = keys.flag("multimodal_projector_bias", True)
    tensors += two_layers(keys, "multi_modal_projector.", part.integer("hidden_size"), text.hidden_size, bias)
    return vision.assemble(keys, text, [vision.tower(part, tensors)], prefix=_TEXT, head=_HEAD)


def _clip(part: Keys, at: str) -> Tensors:
    hidden, patch = part.integer("hidden_size"), part.integer("patch_size")
    part.skip("dtype", "torch_dtype", "projection_dim", "vocab_size")
    vision.head_size(part, hidden, "num_attention_heads")
    positions = (part.integer("image_size") // patch) ** 2 + 1
    tensors = table(at + "embeddings.class_embedding", hidden)
    tensors += conv(at + "embeddings.patch_embedding", hidden, part.integer("num_channels", 3), patch, patch)
    tensors += table(at + "embeddings.position_embedding.weight", positions, hidden)
    for name in ("pre_layrnorm", "post_layernorm"):
        tensors += norm(at + name, hidden, bias=True)
    return tensors + CLIP_LAYER.stack(
        at + "encoder.layers", vision.num_layers(part), hidden, part.integer("intermediate_size")
    )


# ---------------------------------------------------------------------------------------------------------- MiniMax-M3


def read_minimax_m3(keys: Keys) -> Model:
    """Read MiniMax-M3 with its tower: rotary CLIP layers, a projector, and a second one over merged patches.

    Source: transformers@5.23.0:models/minimax_m3_vl/modeling_minimax_m3_vl.py; vllm@0.33.0:vllm/models/minimax_m3/
    common/vision_tower.py, whose names these are.
    """
    part, nested = vision.need_part(keys, "vision_config"), vision.need_part(keys, "text_config")
    keys.skip("projector_hidden_act", "img_token_compression_config")
    nested.skip("model_type")
    text = vision.read_as("minimax_m3", nested)
    hidden, patch, merge = (
        part.integer("hidden_size"),
        part.integer("patch_size"),
        part.integer("spatial_merge_size", 2),
    )
    vision.head_size(part, hidden, "num_attention_heads")
    part.skip("dtype", "torch_dtype", "image_size")
    inner, at = keys.integer("projector_hidden_size", text.hidden_size), "vision_tower.vision_model."
    time = part.integer("temporal_patch_size", 2)
    tensors = conv(at + "embeddings.patch_embedding", hidden, part.integer("num_channels", 3), time, patch, patch)
    tensors += norm(at + "pre_layrnorm", hidden, bias=True)
    tensors += CLIP_LAYER.stack(
        at + "encoder.layers", vision.num_layers(part), hidden, part.integer("intermediate_size")
    )
    out = text.hidden_size
    for name, columns in (
        ("multi_modal_projector", hidden),
        ("patch_merge_mlp", keys.integer("merged_hidden_size", out * merge * merge)),
    ):
        tensors += linear(f"{name}.linear_1", inner, columns, bias=True, split="out")
        tensors += linear(f"{name}.linear_2", out, inner, bias=True, split="in")
    return vision.assemble(keys, text, [vision.tower(part, tensors)], prefix=_TEXT, head=_HEAD)


# ------------------------------------------------------------------------------------------------------------ InternVL

_INTERN_LAYER = EncoderLayer(
    qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    out="attention.projection_layer",
    ups=("mlp.fc1",),
    down="mlp.fc2",
    norms=("layernorm_before", "layernorm_after"),
)


def read_internvl(keys: Keys) -> Model:
    """Read InternVL 2.5 to 3.5 in transformers' layout (``model_type`` internvl).

    Source: transformers@5.23.0:models/internvl/modeling_internvl.py, configuration_internvl.py (defaults);
    vllm@0.33.0:vllm/model_executor/models/interns1_vit.py (attention whole on each rank, feed-forward split).
    """
    part = vision.need_part(keys, "vision_config")
    text = vision.read_text(vision.need_part(keys, "text_config"), "qwen2")
    hidden, at = part.integer("hidden_size", 1024), "model.multi_modal_projector."
    ratio = keys.raw("downsample_ratio", 0.5)
    if ratio not in (0.5, 0.25, 1, 1.0):
        raise InputError(_("is not 1, 0.5 or 0.25"), where=keys.at("downsample_ratio"))
    merged = hidden * int(1 / ratio) ** 2
    tensors = _intern_vit(part, "model.vision_tower.", hidden) + norm(at + "layer_norm", merged, bias=True)
    keys.skip("projector_hidden_act", "vision_feature_layer", "vision_feature_select_strategy")
    tensors += linear(at + "linear_1", text.hidden_size, merged, bias=True)
    tensors += linear(at + "linear_2", text.hidden_size, text.hidden_size, bias=True)
    return vision.assemble(keys, text, [vision.tower(part, tensors)], prefix="model.language_model.")


def _square(part: Keys, key: str, default: int) -> int:
    """Take a side, given as a number or as two equal ones."""
    if not isinstance(part.raw(key, default), list):
        side: int = part.integer(key, default)
        return side
    sides = part.integers(key, length=2, low=1)
    if sides[0] != sides[1]:
        raise InputError(_("only squares are understood"), where=part.at(key))
    return int(sides[0])


def _intern_vit(part: Keys, at: str, hidden: int) -> Tensors:
    """Return InternViT: layer scales beside CLIP-like layers; norms of queries and keys in the 6B tower."""
    part.skip("dtype", "torch_dtype", "hidden_dropout_prob", "projection_dropout", "layer_scale_init_value")
    vision.head_size(part, hidden, "num_attention_heads")
    patch = _square(part, "patch_size", 14)
    has_bias = _choice(part, "norm_type", "layer_norm", "rms_norm") == "layer_norm"
    layer = replace(_INTERN_LAYER, qkv_bias=part.flag("attention_bias", False), norm_bias=has_bias)
    channels = part.integer("num_channels", 3)
    tensors = conv(at + "embeddings.patch_embeddings.projection", hidden, channels, patch, patch, bias=True)
    tensors += table(at + "embeddings.cls_token", 1, 1, hidden)
    if part.flag("use_mask_token", False):
        tensors += table(at + "embeddings.mask_token", 1, 1, hidden)
    if part.flag("use_absolute_position_embeddings", True):
        positions = (_square(part, "image_size", 448) // patch) ** 2 + 1
        tensors += table(at + "embeddings.position_embeddings", 1, positions, hidden)
    inner, has_qk_norm = part.integer("intermediate_size", 4096), part.flag("use_qk_norm", False)
    for index in range(vision.num_layers(part, default=24)):
        block = f"{at}encoder.layer.{index}."
        tensors += layer.tensors(block, hidden, inner)
        tensors += table(block + "lambda_1", hidden) + table(block + "lambda_2", hidden)
        if has_qk_norm:
            tensors += norm(block + "attention.q_norm", hidden) + norm(block + "attention.k_norm", hidden)
    if not part.flag("use_mean_pooling", True):
        tensors += norm(at + "layernorm", hidden, bias=True)
    part.skip("image_size")
    return tensors
