"""Models with CLIP or SigLIP towers and a small projector: LLaVA-NeXT and -OneVision, SmolVLM, PaliGemma, Command A.

Source: transformers@5.23.0:models/{llava_next,llava_onevision,smolvlm,idefics3,paligemma,cohere2_vision}/ modeling and
configuration files; splits of the towers: vllm@0.33.0:vllm/model_executor/models/siglip.py, clip.py.
"""

from __future__ import annotations

from ullage.read.hf_config import common
from ullage.read.hf_config.families import vision, vision_misc
from ullage.read.hf_config.families.vision import linear, table
from ullage.read.hf_config.families.vision_gemma import siglip
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import Model

_TEXT, _HEAD = "language_model.model.", "language_model.lm_head"


def read_llava_next(keys: Keys) -> Model:
    """Read LLaVA-NeXT: LLaVA 1.5 with a learned row of pixels between the tiles."""
    common.only(keys, use_image_newline_parameter=True)
    keys.skip("image_grid_pinpoints")
    return vision_misc.read_llava(keys, newline=True)


def read_llava_onevision(keys: Keys) -> Model:
    """Read LLaVA-OneVision: a SigLIP tower, a projector of two layers and a row of pixels between the tiles."""
    common.only(keys, use_image_newline_parameter=True)
    keys.skip("image_grid_pinpoints", "vision_aspect_ratio")
    part = vision.need_part(keys, "vision_config")
    text = vision.read_text(vision.need_part(keys, "text_config"), "qwen2")
    bias, hidden = keys.flag("multimodal_projector_bias", True), part.integer("hidden_size")
    tensors = siglip(part, "vision_tower.vision_model.") + table("image_newline", text.hidden_size)
    tensors += vision_misc.two_layers(keys, "multi_modal_projector.", hidden, text.hidden_size, bias)
    return vision.assemble(keys, text, [vision.tower(part, tensors)], prefix=_TEXT, head=_HEAD)


def read_smolvlm(keys: Keys) -> Model:
    """Read SmolVLM and Idefics 3: patches shuffled into ``scale_factor`` squared fewer, and one projection."""
    part = vision.need_part(keys, "vision_config")
    text = vision.read_text(vision.need_part(keys, "text_config"), "llama")
    for size in ("image_size", "patch_size"):
        part.integer(size)  # the class has other defaults than SigLIP's
    part.skip("size", "max_image_size", "use_base_siglip", "tie_word_embeddings")
    columns = part.integer("hidden_size") * keys.integer("scale_factor", 2) ** 2
    tensors = siglip(part, "model.vision_model.", has_head=False)
    tensors += linear("model.connector.modality_projection.proj", text.hidden_size, columns)
    return vision.assemble(keys, text, [vision.tower(part, tensors)], prefix="model.text_model.")


def read_paligemma(keys: Keys) -> Model:
    """Read PaliGemma 1 and 2: a SigLIP tower and one projection, of the width that the tower's config gives."""
    keys.skip("vocab_size", "hidden_size", "projection_dim")
    part, nested = vision.need_part(keys, "vision_config"), vision.need_part(keys, "text_config")
    part.skip("vocab_size", "num_image_tokens", "projector_hidden_act", "num_positions")
    nested.skip("num_image_tokens")
    text = vision.read_text(nested, "gemma")
    width = part.integer("projection_dim", 2048)
    tensors = siglip(part, "vision_tower.vision_model.")
    tensors += linear("multi_modal_projector.linear", width, part.integer("hidden_size"), bias=True)
    return vision.assemble(keys, text, [vision.tower(part, tensors)], prefix=_TEXT, head=_HEAD)


def read_cohere2(keys: Keys) -> Model:
    """Read Command A Vision: patches merged by ``downsample_factor``, a gated projector."""
    part = vision.need_part(keys, "vision_config")
    text = vision.read_text(vision.need_part(keys, "text_config"), "cohere2")
    merged = part.integer("hidden_size") * keys.integer("downsample_factor", 2) ** 2
    inner = keys.integer("alignment_intermediate_size", 36864)
    tensors = siglip(part, "model.vision_tower.")
    tensors += linear("model.multi_modal_projector.linear_1", inner, merged, bias=True)
    tensors += linear("model.multi_modal_projector.linear_2", text.hidden_size, inner // 2, bias=True)
    return vision.assemble(keys, text, [vision.tower(part, tensors)], prefix="model.language_model.")
