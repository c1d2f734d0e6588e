"""Step-3.5 and 3.7.

Source: transformers@5.23.0:models/step3p7/; tensor names of the experts and MTP modules:
vllm@0.33.0:model_executor/models/step3p5.py, step3p5_mtp.py.
"""

from __future__ import annotations

from dataclasses import replace

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.hf_config import common
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import Attention, DenseFFN, ExtraTensor, Layer, Model, Tower

KINDS = (common.FULL, common.SLIDING)
WITHOUT_EFFECT = (
    "att_impl_type",
    "max_seq_len",
    "moe_layer_offset",
    "moe_router_activation",
    "moe_router_scaling_factor",
    "mtp_mlp_layer_types",
    "need_fp32_gate",
    "norm_expert_weight",
    "partial_rotary_factors",
    "sink",
    "use_rope_layers",
    "yarn_only_types",
    "zero_centered",
)
#: vision tower of the config class (Step3p7VisionConfig): width, layers, block width, patch, positions, projector input
VISION = {"hidden": 1536, "layers": 47, "inner": 8960, "patch": 14, "positions": 2704, "merged": 6144}


def read_text(keys: Keys) -> Model:
    """Read the text part: gated heads, norms of queries and keys, experts after the first layers.

    Sliding layers may have a head count of their own (``attention_other_setting``). MTP layers have dense blocks.
    """
    hidden, num_layers = keys.integer("hidden_size"), keys.layers()
    num_mtp = keys.integer("num_nextn_predict_layers", 0, low=0, high=64)
    keys.skip(*WITHOUT_EFFECT, "swiglu_limits", "swiglu_limits_shared", "n_shared_experts", "mtp_layer_types")
    common.only(keys, use_moe=True, use_qk_norm=True, moe_every_n_layer=1, attention_bias=False, mlp_bias=False)
    window = keys.integer("sliding_window", None)
    kinds = common.layer_types(keys, num_layers, KINDS, lambda index: common.FULL, spare=num_mtp)
    sparse = common.moe(
        keys,
        num_experts=("n_routed_experts", "num_experts", "moe_num_experts", "num_local_experts"),
        top_k=("num_experts_per_tok", "moe_top_k"),
        prefix="moe",
        correction_bias=keys.flag("use_moe_router_bias", True),
        correction_bias_name="router_bias",
    )
    shared = DenseFFN(
        intermediate_size=keys.first_integer("share_expert_dim", "share_expert_dims"), prefix="share_expert"
    )
    dense, norms = common.dense(keys), common.pre_norms(hidden)
    has_experts = _has_experts(keys, num_layers)
    apart = [layer.get("num_attention_heads") for layer in common.per_layer(keys, num_layers, "num_attention_heads")]

    def make(kind: tuple[str, bool, int | None]) -> Layer:
        attention = _attention(keys, hidden, window if kind[0] == common.SLIDING else None, kind[2])
        return Layer(
            mixers=(attention,),
            ffns=(sparse, shared) if kind[1] else (dense,),
            norms=norms,
        )

    layers = common.by_kind(zip(kinds, has_experts, apart, strict=True), make)
    return common.decoder(keys, hidden, layers, mtp_layer=make((common.FULL, False, None)))


def _has_experts(keys: Keys, num_layers: int) -> list[bool]:
    """Layers with experts: those that ``moe_layers_enum`` (numbers with commas) names, else all after the first."""
    named = keys.text("moe_layers_enum", None)
    if named is None:
        return common.sparse_after(keys, num_layers, 3)
    numbers = named.split(",")
    if not all(number.strip().isdecimal() and len(number) < 8 for number in numbers):
        raise InputError(_("is no list of layer numbers"), where=keys.at("moe_layers_enum"))
    layers = {int(number) for number in numbers}
    return [index in layers for index in range(num_layers)]


def _attention(keys: Keys, hidden: int, window: int | None, apart: int | None) -> Attention:
    """Build attention with a gate of one value per head beside the projections; sliding layers may have more heads.

    ``apart``: the heads that ``per_layer_config`` gives this layer, if any.
    """
    num_kv_heads = keys.first_integer("num_key_value_heads", "num_attention_groups", default=8)
    heads = keys.integer("num_attention_heads")
    other = keys.part("attention_other_setting")
    sliding_heads = keys.integer("num_sliding_attention_heads", heads)
    if other is not None:
        other.skip("head_dim", "true_head_dim")
        common.only(other, attention_type=common.SLIDING, num_attention_groups=num_kv_heads)
        sliding_heads = other.integer("num_attention_heads", sliding_heads)
    heads = apart or (heads if window is None else sliding_heads)
    if heads % num_kv_heads:
        raise InputError(
            _("{kv} KV heads do not divide {heads} attention heads").format(kv=num_kv_heads, heads=heads),
            where=keys.where,
        )
    gate = ExtraTensor(name="g_proj.weight", shape=(heads, hidden), split="out")
    return Attention(
        num_heads=heads,
        num_kv_heads=num_kv_heads,
        head_dim=keys.integer("head_dim", 128),
        qk_norm="head",
        window=window,
        extras=(gate,) if keys.flag("use_head_wise_attn_gate", True) else (),
    )


def read(keys: Keys) -> Model:
    """Read Step-3.7: the text keys in ``text_config`` or, flattened, beside the rest; and the vision tower."""
    text = keys.part("text_config")
    model = read_text(keys if text is None else text)
    tied = keys.flag("tie_word_embeddings", model.tied_embeddings if text is None else False)
    vision = keys.part("vision_config")
    if vision is not None:
        sizes = {"width": VISION["hidden"], "hidden_size": VISION["hidden"], "layers": VISION["layers"]}
        sizes |= {
            "max_position_embeddings": VISION["positions"],
            "num_hidden_layers": VISION["layers"],
            "patch_size": VISION["patch"],
        }
        common.only(vision, intermediate_size=VISION["inner"], num_channels=3, image_size=728, **sizes)
        vision.skip("heads", "num_attention_heads", "ls_init_value", "mlp_ratio")
        vision.skip(
            "layer_scale_init_value",
            "output_dim",
            "pool_type",
            "ues_cls_token",
            "use_ln_post",
            "use_ln_pre",
        )
        vision.skip("use_abs_posemb", "use_rope2d")
    common.only(keys, projector_bias=False)
    keys.skip("image_token_len", "patch_token_len", "understand_projector_stride", "vision_select_layer")
    said = _("no vision_config: the tower has the sizes of the class Step3p7VisionConfig (transformers 5.23.0)")
    return replace(
        model, tied_embeddings=tied, towers=_towers(model.hidden_size), assumed=() if vision is not None else (said,)
    )


def _towers(hidden: int) -> tuple[Tower, ...]:
    """Source: transformers@5.23.0:models/step3p7/modeling_step3p7.py:Step3p7VisionModel, Step3p7Model."""
    width, inner, merged = VISION["hidden"], VISION["inner"], VISION["merged"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.patch_embedding.weight": (width, 3, VISION["patch"], VISION["patch"]),
        "embeddings.position_embedding.weight": (VISION["positions"], width),
        "pre_layernorm.weight": (width,),
        "pre_layernorm.bias": (width,),
        "downsampler1.weight": (2 * width, width, 3, 3),
        "downsampler1.bias": (2 * width,),
        "downsampler2.weight": (merged, 2 * width, 3, 3),
        "downsampler2.bias": (merged,),
    }
    block: dict[str, tuple[int, ...]] = {"lambda_1": (width,), "lambda_2": (width,)}
    linears = {f"self_attn.{name}": (width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    linears |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    for name, shape in linears.items():
        block |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in ("layernorm_before", "layernorm_after"):
        block |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    def tensors(found: dict[str, tuple[int, ...]], at: str) -> tuple[ExtraTensor, ...]:
        return tuple(ExtraTensor(name=at + name, shape=shape, linear=False) for name, shape in found.items())

    projector = tensors({"multi_modal_projector.weight": (hidden, merged)}, "model.")
    return (
        Tower(name="vision", tensors=tensors(shapes, "model.vision_model.") + projector),
        Tower(name="vision layers", tensors=tensors(block, "model.vision_model.layers.N."), copies=VISION["layers"]),
    )
