"""Towers of DeepSeek-VL2 (SigLIP) and DeepSeek-OCR (SAM, then CLIP).

Source: vllm@0.33.0:vllm/model_executor/models/deepseek_vl2.py, deepseek_ocr.py, deepencoder.py,
vllm/transformers_utils/configs/deepseek_vl2.py (defaults); deepseek-ai/DeepSeek-VL2:deepseek_vl2/models/siglip_vit.py;
deepseek-ai/DeepSeek-OCR:deepencoder.py.
"""

from __future__ import annotations

from dataclasses import replace

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.hf_config.families import vision
from ullage.read.hf_config.families.vision import EncoderLayer, Tensors, conv, linear, norm, table
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import Model, Tower

_SIGLIP_LAYER = EncoderLayer(
    qkv=("attn.qkv",), out="attn.proj", ups=("mlp.fc1",), down="mlp.fc2", norms=("norm1", "norm2")
)
_SAM_LAYER = replace(_SIGLIP_LAYER, ups=("mlp.lin1",), down="mlp.lin2", sharded=False)
_OCR_CLIP_LAYER = replace(
    _SIGLIP_LAYER, qkv=("self_attn.qkv_proj",), out="self_attn.out_proj", norms=("layer_norm1", "layer_norm2")
)
_SAM_WINDOW = 14  # deepseek-ai/DeepSeek-OCR:deepencoder.py:_build_sam; patches of 16, a neck of 256 channels
_SAM_PATCH, _SAM_NECK = 16, 256
_SIZES = {"layers": "layers", "hidden": "width", "heads": "heads"}


def read(keys: Keys) -> Model:
    """Read DeepSeek-VL2 or DeepSeek-OCR: the latter names two towers under ``vision_config.width``."""
    keys.skip("candidate_resolutions", "global_view_pos")
    part = vision.need_part(keys, "vision_config")
    language = vision.need_part(keys, "language_config")
    text = _text(language)
    keys.skip(*language.values)  # DeepSeek-OCR repeats the decoder's keys in the whole
    is_ocr = isinstance(part.raw("width"), dict)
    at, prefix = ("model.", "model.") if is_ocr else ("", "language.model.")
    towers = _ocr_towers(part) if is_ocr else [_siglip(part, "vision.")]
    tensors = _projector(vision.need_part(keys, "projector_config"), at + "projector.layers", text.hidden_size)
    if keys.text("tile_tag", "2D") != "2D":
        raise InputError(_("only 2D is understood"), where=keys.at("tile_tag"))
    tensors += table(at + "image_newline", text.hidden_size) + table(at + "view_seperator", text.hidden_size)
    towers.append(Tower(name="projector", tensors=tensors))
    return vision.assemble(keys, text, towers, prefix=prefix, head=None if is_ocr else "language.lm_head")


def _text(language: Keys) -> Model:
    """Read the decoder: DeepSeek-V2 with latent attention, or with plain attention where ``use_mla`` is false."""
    language.skip("lm_head", "rm_head", "model_type")
    if language.flag("use_mla", True):
        return vision.read_as("deepseek_v2", language)
    language.skip("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return vision.read_as("deepseek", language)


def _projector(part: Keys, at: str, hidden: int) -> Tensors:
    """Return the projector: one linear layer, or a stack over downsampled patches."""
    kind, size = part.text("projector_type", "downsample_mlp_gelu"), part.integer("n_embed", 2048)
    columns = part.integer("input_dim", 1152)
    if size != hidden:
        raise InputError(_("is not the decoder's hidden_size"), where=part.at("n_embed"))
    if kind == "linear":
        return linear(at, size, columns, bias=True)
    if kind != "downsample_mlp_gelu":
        raise InputError(_("{value} is not understood").format(value=repr(kind)[:60]), where=part.at("projector_type"))
    depth, inner = part.integer("depth", 2, low=2, high=64), size * part.integer("mlp_ratio", 1)
    tensors = linear(f"{at}.0", inner, columns * part.integer("downsample_ratio", 2) ** 2, bias=True)
    for index in range(1, depth - 1):
        tensors += linear(f"{at}.{2 * index}", inner, inner, bias=True)
    return tensors + linear(f"{at}.{2 * depth - 2}", size, inner, bias=True)


def _siglip(part: Keys, at: str) -> Tower:
    """Return the SigLIP tower as timm names it, with the attention pool that the checkpoint holds.

    The inner size is the truncated product of width and ``mlp_ratio``.
    """
    part.skip("model_name", "class_token", "global_pool", "ignore_head", "num_classes", "weight_init")
    width, patch = part.integer("width", 1024), part.integer("patch_size", 16)
    inner = int(width * _ratio(part))
    positions = (part.integer("image_size", 384) // patch) ** 2
    tensors = conv(at + "patch_embed.proj", width, 3, patch, patch, bias=True)
    tensors += table(at + "pos_embed", 1, positions, width)
    tensors += _SIGLIP_LAYER.stack(at + "blocks", vision.num_layers(part, "layers", default=24), width, inner)
    tensors += norm(at + "norm", width, bias=True)
    pool = at + "attn_pool."
    tensors += table(pool + "latent", 1, 1, width) + norm(pool + "norm", width, bias=True)
    for name, rows, columns in (("q", width, width), ("kv", 2 * width, width), ("proj", width, width)):
        tensors += linear(pool + name, rows, columns, bias=True)
    tensors += linear(pool + "mlp.fc1", inner, width, bias=True)
    tensors += linear(pool + "mlp.fc2", width, inner, bias=True)
    return vision.tower(part, tensors, **_SIZES)


def _ratio(part: Keys) -> float:
    ratio = part.raw("mlp_ratio", 4)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 64:
        raise InputError(_("is not a number from 0 to 64"), where=part.at("mlp_ratio"))
    return ratio


def _ocr_towers(part: Keys) -> list[Tower]:
    """Return SAM and CLIP of DeepSeek-OCR; their inner sizes are four times their widths, whatever ``mlp_ratio``."""
    part.skip("mlp_ratio", "model_name")
    widths = vision.need_part(part, "width")
    towers: list[Tower] = []
    for name in widths.values:
        tower = vision.need_part(widths, name)
        if name.startswith("sam_vit"):
            tensors = _sam(tower, "model.sam_model.", part.integer("image_size"))
        elif name.startswith("clip-"):
            tensors = _ocr_clip(tower, "model.vision_model.")
        else:
            raise InputError(_("this tower is not understood"), where=widths.at(name))
        towers.append(vision.tower(tower, tensors, name=name, **_SIZES))
    return towers


def _sam(part: Keys, at: str, image_size: int) -> Tensors:
    """Return SAM's image encoder: windowed layers, a few global ones, a neck, two convolutions that downsample."""
    width, layers = part.integer("width"), vision.num_layers(part, "layers")
    head_dim, side = vision.head_size(part, width, "heads"), image_size // _SAM_PATCH
    whole = part.integers("global_attn_indexes")
    tensors = conv(at + "patch_embed.proj", width, 3, _SAM_PATCH, _SAM_PATCH, bias=True)
    tensors += table(at + "pos_embed", 1, side, side, width)
    for index in range(layers):
        block = f"{at}blocks.{index}."
        reach = 2 * (side if index in whole else _SAM_WINDOW) - 1
        tensors += _SAM_LAYER.tensors(block, width, 4 * width)
        tensors += table(block + "attn.rel_pos_h", reach, head_dim) + table(block + "attn.rel_pos_w", reach, head_dim)
    tensors += conv(at + "neck.0", _SAM_NECK, width, 1, 1) + norm(at + "neck.1", _SAM_NECK, bias=True)
    tensors += conv(at + "neck.2", _SAM_NECK, _SAM_NECK, 3, 3) + norm(at + "neck.3", _SAM_NECK, bias=True)
    before = _SAM_NECK
    for number, after in enumerate(part.integers("downsample_channels", low=1), start=2):
        tensors += conv(f"{at}net_{number}", after, before, 3, 3)
        before = after
    return tensors


def _ocr_clip(part: Keys, at: str) -> Tensors:
    """Return CLIP as DeepSeek-OCR has it: the layers behind a first norm, no last one."""
    width, patch = part.integer("width"), part.integer("patch_size")
    vision.head_size(part, width, "heads")
    positions = (part.integer("image_size") // patch) ** 2 + 1
    tensors = table(at + "embeddings.class_embedding", width)
    tensors += conv(at + "embeddings.patch_embedding", width, 3, patch, patch)
    tensors += table(at + "embeddings.position_embedding.weight", positions, width)
    tensors += norm(at + "pre_layrnorm", width, bias=True)
    return tensors + _OCR_CLIP_LAYER.stack(
        at + "transformer.layers", vision.num_layers(part, "layers"), width, 4 * width
    )
