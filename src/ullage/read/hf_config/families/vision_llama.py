"""Towers of Llama 3.2 Vision (mllama) and Llama 4.

Source: transformers@5.23.0:models/mllama/modeling_mllama.py, models/llama4/modeling_llama4.py, configuration_llama4.py;
splits: vllm@0.33.0:vllm/model_executor/models/mllama4.py, vllm@0.9.2:vllm/model_executor/models/mllama.py.
"""

from __future__ import annotations

from dataclasses import replace

from ullage.i18n import _
from ullage.read.hf_config import common
from ullage.read.hf_config.families import vision
from ullage.read.hf_config.families.vision import EncoderLayer, Tensors, conv, linear, norm, table
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import Model

_LAYER = EncoderLayer(
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.o_proj",
    ups=("mlp.fc1",),
    down="mlp.fc2",
    norms=("input_layernorm", "post_attention_layernorm"),
)


# ----------------------------------------------------------------------------------------------------- Llama 3.2 Vision


def read_3_2(keys: Keys) -> Model:
    """Read Llama 3.2 Vision: a tower with global layers, and tables of positions per aspect ratio.

    Embedding and head have different numbers of rows, so that they are never tied.
    """
    part, nested = vision.need_part(keys, "vision_config"), vision.need_part(keys, "text_config")
    for where in (keys, nested):
        common.only(where, tie_word_embeddings=False)
    text = vision.read_text(nested, "mllama_text_model")
    tensors = _tower_3_2(part, "vision_model.")
    tensors += linear("multi_modal_projector", text.hidden_size, part.integer("vision_output_dim"), bias=True)
    return vision.assemble(
        keys,
        text,
        [vision.tower(part, tensors, heads="attention_heads")],
        prefix="language_model.model.",
        head="language_model.lm_head",
    )


def _tower_3_2(part: Keys, at: str) -> Tensors:
    hidden, inner, patch = part.integer("hidden_size"), part.integer("intermediate_size"), part.integer("patch_size")
    vision.head_size(part, hidden, "attention_heads")
    part.skip(
        "intermediate_layers_indices", "dtype", "torch_dtype", "tie_word_embeddings", "cross_attention_hidden_size"
    )
    tiles, ratios = part.integer("max_num_tiles"), len(part.items("supported_aspect_ratios")) + 1
    positions = (part.integer("image_size") // patch) ** 2 + 1
    tensors = conv(at + "patch_embedding", hidden, part.integer("num_channels", 3), patch, patch)
    tensors += table(at + "class_embedding", hidden)
    for name in ("pre_tile_positional_embedding", "post_tile_positional_embedding"):
        tensors += table(f"{at}{name}.embedding.weight", ratios, tiles * hidden) + table(f"{at}{name}.gate", 1)
    gated = at + "gated_positional_embedding."
    tensors += table(gated + "gate", 1) + table(gated + "embedding", positions, hidden)
    tensors += table(gated + "tile_embedding.weight", ratios, tiles * positions * hidden)
    tensors += norm(at + "layernorm_pre", hidden, bias=True) + norm(at + "layernorm_post", hidden, bias=True)
    layer = replace(_LAYER, qkv_bias=False, out_bias=False)
    tensors += layer.stack(at + "transformer.layers", vision.num_layers(part), hidden, inner)
    num_global = vision.num_layers(part, "num_global_layers")
    tensors += layer.stack(at + "global_transformer.layers", num_global, hidden, inner)
    for index in range(num_global):
        for name in ("gate_attn", "gate_ffn"):
            tensors += table(f"{at}global_transformer.layers.{index}.{name}", 1)
    return tensors


# ------------------------------------------------------------------------------------------------------------- Llama 4


def read_4(keys: Keys) -> Model:
    """Read Llama 4. Without a ``vision_config`` the tower is that of transformers' defaults, and the model says so."""
    part = keys.part("vision_config")
    assumed: tuple[str, ...] = ()
    if part is None:
        part = Keys({}, keys.at("vision_config"))
        assumed = (_("vision_config is missing: the tower is that of transformers' default Llama4VisionConfig"),)
    nested = vision.need_part(keys, "text_config")
    text = vision.read_text(nested, "llama4_text")
    output = part.integer("vision_output_dim", 7680)
    tensors = _tower_4(part, "vision_model.")
    tensors += linear("multi_modal_projector.linear_1", text.hidden_size, output, split="out")
    model = vision.assemble(
        keys,
        text,
        [vision.tower(part, tensors)],
        prefix="language_model.model.",
        head="language_model.lm_head",
        assumed=assumed,
    )
    # the whole holds the decoder with its head, so that the decoder's own key decides
    return replace(model, tied_embeddings=nested.flag("tie_word_embeddings", False))


def _tower_4(part: Keys, at: str) -> Tensors:
    """Return the tower. Defaults: transformers@5.23.0:models/llama4/configuration_llama4.py:Llama4VisionConfig."""
    hidden, inner, patch = (
        part.integer("hidden_size", 768),
        part.integer("intermediate_size", 5632),
        part.integer("patch_size", 14),
    )
    part.integer("num_attention_heads", 16)
    part.skip("multi_modal_projector_bias", "pixel_shuffle_ratio", "projector_dropout", "dtype", "torch_dtype")
    part.skip("vision_feature_layer", "vision_feature_select_strategy")
    positions = (part.integer("image_size", 448) // patch) ** 2 + 1
    first, last = part.integer("projector_input_dim", 4096), part.integer("projector_output_dim", 4096)
    columns = part.integer("num_channels", 3) * patch * patch
    tensors = linear(at + "patch_embedding.linear", hidden, columns, split="out")
    tensors += table(at + "class_embedding", hidden) + table(at + "positional_embedding_vlm", positions, hidden)
    tensors += norm(at + "layernorm_pre", hidden, bias=True) + norm(at + "layernorm_post", hidden, bias=True)
    tensors += _LAYER.stack(at + "model.layers", vision.num_layers(part, default=34), hidden, inner)
    tensors += linear(at + "vision_adapter.mlp.fc1", first, inner, split="out")
    return tensors + linear(at + "vision_adapter.mlp.fc2", last, last, split="in")
