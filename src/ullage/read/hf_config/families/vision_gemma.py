"""Towers of Gemma 3 (SigLIP) and Gemma 4 (vision, and a Conformer for audio).

Source: transformers@5.23.0:models/siglip/modeling_siglip.py, models/gemma3/modeling_gemma3.py,
models/gemma4/modeling_gemma4.py. Splits: vllm@0.33.0:vllm/model_executor/models/siglip.py, gemma3_mm.py; gemma4_mm.py
runs the towers as transformers does, whole on every rank.
"""

from __future__ import annotations

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.hf_config.families import vision
from ullage.read.hf_config.families.vision import CLIP_LAYER, EncoderLayer, Tensors, conv, linear, norm, table
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import ExtraTensor, Model

# ------------------------------------------------------------------------------------------------------------- Gemma 3


def read_3(keys: Keys) -> Model:
    """Read Gemma 3. The 1B model has no tower and is ``gemma3_text``."""
    part = vision.need_part(keys, "vision_config")
    tensors = siglip(part, "vision_tower.vision_model.")
    size = part.integer("hidden_size")
    text = vision.read_text(vision.need_part(keys, "text_config"), "gemma3_text")
    at = "multi_modal_projector."
    tensors += table(at + "mm_input_projection_weight", size, text.hidden_size) + norm(at + "mm_soft_emb_norm", size)
    return vision.assemble(
        keys,
        text,
        [vision.tower(part, tensors)],
        prefix="language_model.model.",
        head="language_model.lm_head",
    )


def siglip(part: Keys, at: str, *, has_head: bool | None = None) -> Tensors:
    """Return a SigLIP tower, with its pooling head where ``vision_use_head`` (or ``has_head``) says so."""
    hidden, patch = part.integer("hidden_size"), part.integer("patch_size", 16)
    vision.head_size(part, hidden, "num_attention_heads")
    part.skip("dtype", "torch_dtype")
    inner, positions = part.integer("intermediate_size"), (part.integer("image_size", 224) // patch) ** 2
    tensors = conv(at + "embeddings.patch_embedding", hidden, part.integer("num_channels", 3), patch, patch, bias=True)
    tensors += table(at + "embeddings.position_embedding.weight", positions, hidden)
    tensors += CLIP_LAYER.stack(at + "encoder.layers", vision.num_layers(part), hidden, inner)
    tensors += norm(at + "post_layernorm", hidden, bias=True)
    return tensors + _pooling(at + "head.", hidden, inner) if _is_pooled(part, has_head) else tensors


def _is_pooled(part: Keys, has_head: bool | None) -> bool:
    return bool(part.flag("vision_use_head", True)) if has_head is None else has_head


def _pooling(at: str, hidden: int, inner: int) -> Tensors:
    """Return attention pooling by one learned query, whole on every rank.

    Source: transformers@5.23.0:models/siglip/modeling_siglip.py:SiglipMultiheadAttentionPoolingHead.
    """
    tensors = table(at + "probe", 1, 1, hidden) + table(at + "attention.in_proj_weight", 3 * hidden, hidden)
    tensors += table(at + "attention.in_proj_bias", 3 * hidden)
    tensors += linear(at + "attention.out_proj", hidden, hidden, bias=True) + norm(at + "layernorm", hidden, bias=True)
    tensors += linear(at + "mlp.fc1", inner, hidden, bias=True)
    return tensors + linear(at + "mlp.fc2", hidden, inner, bias=True)


# ------------------------------------------------------------------------------------------------------------- Gemma 4

_LAYER_4 = EncoderLayer(
    qkv=("self_attn.q_proj.linear", "self_attn.k_proj.linear", "self_attn.v_proj.linear"),
    out="self_attn.o_proj.linear",
    ups=("mlp.gate_proj.linear", "mlp.up_proj.linear"),
    down="mlp.down_proj.linear",
    norms=("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    norm_bias=False,
    sharded=False,
)
_AUDIO_SETTINGS = (
    "attention_chunk_size",
    "attention_context_left",
    "attention_context_right",
    "attention_invalid_logits_value",
    "attention_logit_cap",
    "dtype",
    "gradient_clipping",
    "residual_weight",
)


def read_4(keys: Keys) -> Model:
    """Read Gemma 4: vision in all, audio in the small ones."""
    text = vision.read_text(vision.need_part(keys, "text_config"), "gemma4_text")
    keys.skip("eoa_token_index")
    towers = []
    part = keys.part("vision_config")
    if part is not None:
        tensors = _vision_4(part, "model.vision_tower.") + _embedder("vision", text.hidden_size, part, "hidden_size")
        towers.append(vision.tower(part, tensors))
    part = keys.part("audio_config")
    if part is not None:
        tensors = _audio_4(part, "model.audio_tower.") + _embedder("audio", text.hidden_size, part, "output_proj_dims")
        towers.append(vision.tower(part, tensors, name="audio"))
    return vision.assemble(keys, text, towers, prefix="model.language_model.")


def _embedder(name: str, text_size: int, part: Keys, size_key: str) -> Tensors:
    return linear(f"model.embed_{name}.embedding_projection", text_size, part.integer(size_key))


def _clips(tensors: Tensors) -> Tensors:
    """Return the four bounds stored beside each clipped linear layer: buffers, no parameters."""
    bounds = ("input_min", "input_max", "output_min", "output_max")
    names = [tensor.name.removesuffix("linear.weight") for tensor in tensors if tensor.name.endswith(".linear.weight")]
    return tuple(ExtraTensor(name=name + bound, shape=(), buffer=True) for name in names for bound in bounds)


def _vision_4(part: Keys, at: str) -> Tensors:
    """Return the vision tower: rotary, with a table of positions along each axis and norms of queries and keys."""
    hidden, inner, dim = part.integer("hidden_size"), part.integer("intermediate_size"), part.integer("head_dim")
    heads = part.integer("num_attention_heads")
    part.skip(
        "image_seq_length",
        "video_seq_length",
        "dtype",
        "default_output_length",
        "global_head_dim",
        "max_position_embeddings",
        "pooling_kernel_size",
    )
    if part.integer("num_key_value_heads", heads) != heads or part.flag("attention_bias", False):
        raise InputError(_("grouped or biased attention is not understood in a tower"), where=part.where)
    tensors = linear(at + "patch_embedder.input_proj", hidden, 3 * part.integer("patch_size") ** 2)
    positions = part.integer("position_embedding_size", 10240)
    tensors += table(at + "patch_embedder.position_embedding_table", 2, positions, hidden)
    for index in range(vision.num_layers(part)):
        layer = f"{at}encoder.layers.{index}."
        tensors += _LAYER_4.tensors(layer, hidden, inner, heads * dim)
        tensors += norm(layer + "self_attn.q_norm", dim) + norm(layer + "self_attn.k_norm", dim)
    if part.flag("use_clipped_linears", False):
        tensors += _clips(tensors)
    if part.flag("standardize", False):
        tensors += tuple(
            ExtraTensor(name=at + name, shape=(hidden,), buffer=True) for name in ("std_bias", "std_scale")
        )
    return tensors


def _audio_4(part: Keys, at: str) -> Tensors:
    """Return the audio tower: two strided convolutions, Conformer layers, a projection."""
    part.skip(*_AUDIO_SETTINGS)
    hidden = part.integer("hidden_size", 1024)
    channels = part.integers("subsampling_conv_channels", [128, 32], length=2, low=1)
    at_conv, before = at + "subsample_conv_projection.", 1
    tensors: Tensors = ()
    for index, after in enumerate(channels):
        tensors += conv(f"{at_conv}layer{index}.conv", after, before, 3, 3) + norm(f"{at_conv}layer{index}.norm", after)
        before = after
    tensors += linear(at_conv + "input_proj_linear", hidden, channels[0] // 4 * channels[1])
    heads, kernel = vision.head_size(part, hidden, "num_attention_heads"), part.integer("conv_kernel_size", 5)
    for index in range(vision.num_layers(part, default=12)):
        tensors += _conformer(f"{at}layers.{index}.", hidden, heads, kernel)
    if part.flag("use_clipped_linears", True):
        tensors += _clips(tensors)
    return tensors + linear(at + "output_proj", part.integer("output_proj_dims", 1536), hidden, bias=True)


def _conformer(at: str, hidden: int, head_dim: int, kernel: int) -> Tensors:
    """Return a Conformer layer: half a feed-forward block, attention, a light convolution, the other half."""
    tensors: Tensors = ()
    for block in ("feed_forward1.", "feed_forward2."):
        tensors += linear(f"{at}{block}ffw_layer_1.linear", 4 * hidden, hidden)
        tensors += linear(f"{at}{block}ffw_layer_2.linear", hidden, 4 * hidden)
        tensors += norm(f"{at}{block}pre_layer_norm", hidden) + norm(f"{at}{block}post_layer_norm", hidden)
    for name in ("q_proj.linear", "k_proj.linear", "v_proj.linear", "post.linear", "relative_k_proj"):
        tensors += linear(f"{at}self_attn.{name}", hidden, hidden)
    tensors += table(at + "self_attn.per_dim_scale", head_dim)
    tensors += linear(at + "lconv1d.linear_start.linear", 2 * hidden, hidden)
    tensors += linear(at + "lconv1d.linear_end.linear", hidden, hidden)
    tensors += conv(at + "lconv1d.depthwise_conv1d", hidden, 1, kernel)
    for name in ("lconv1d.pre_layer_norm", "lconv1d.conv_norm", "norm_pre_attn", "norm_post_attn", "norm_out"):
        tensors += norm(at + name, hidden)
    return tensors
