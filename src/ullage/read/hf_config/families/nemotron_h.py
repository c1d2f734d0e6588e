"""Nemotron-H and Nemotron 3: each layer is one of Mamba-2, attention, dense block or experts, with one norm.

Source: transformers@5.23.0:models/nemotron_h/modeling_nemotron_h.py, configuration_nemotron_h.py; the MTP module:
vllm@0.33.0:vllm/model_executor/models/nemotron_h_mtp.py (checkpoint names ``mtp.layers.*``).
"""

from __future__ import annotations

from dataclasses import replace

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.hf_config import common
from ullage.read.hf_config.keys import MAX_LAYERS, Keys
from ullage.spec.model import (
    DenseFFN,
    ExtraTensor,
    FeedForward,
    Layer,
    Mamba2,
    Mixer,
    Model,
    MoEFFN,
    MtpModule,
    Norm,
)

_LETTERS = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
_KINDS = {"linear_attention": "mamba", "full_attention": "attention"} | {kind: kind for kind in _LETTERS.values()}

#: Routing, time steps and settings of the kernels.
_WITHOUT_EFFECT = (
    "chunk_size",
    "expand",
    "mamba_hidden_act",
    "mamba_proj_bias",
    "moe_shared_expert_overlap",
    "n_group",
    "norm_topk_prob",
    "num_logits_to_keep",
    "partial_rotary_factor",
    "rescale_prenorm_residual",
    "residual_in_fp32",
    "routed_scaling_factor",
    "time_step_floor",
    "time_step_limit",
    "time_step_max",
    "time_step_min",
    "time_step_rank",
    "topk_group",
    "use_mamba_kernels",
)


def read(keys: Keys) -> Model:
    """Read a Nemotron-H or Nemotron 3 config."""
    hidden = keys.integer("hidden_size")
    keys.skip(*_WITHOUT_EFFECT)
    common.only(keys, attention_bias=False, tie_word_embeddings=False)
    if keys.integer("sliding_window", None) is not None:
        raise InputError(_("a sliding window is not understood here"), where=keys.at("sliding_window"))
    kinds = _kinds(keys, "hybrid_override_pattern", "layers_block_type")
    if "num_hidden_layers" in keys and keys.layers() != len(kinds):
        raise InputError(
            _("the pattern has {count} layers").format(count=len(kinds)), where=keys.at("num_hidden_layers")
        )
    parts = _parts(keys, hidden)
    if "moe" in kinds and "moe" not in parts:
        raise InputError(_("the key is missing"), where=keys.at("n_routed_experts"))
    made = {kind: _layer(parts[kind], hidden) for kind in parts if kind in kinds}
    mtp = _mtp(keys, parts, hidden)
    return common.decoder(
        keys,
        hidden,
        tuple(made[kind] for kind in kinds),
        norm_name="backbone.norm_f",
        mtp=mtp,
        embedding_name="backbone.embeddings",
        layers_name="backbone.layers",
    )


def _kinds(keys: Keys, pattern_key: str, list_key: str, default: list[str] | None = None) -> list[str]:
    """Return the kind of each layer, from a pattern of letters or from a list of words."""
    pattern = keys.text(pattern_key, None)
    if pattern is not None:
        key, words = pattern_key, [_LETTERS.get(letter, letter) for letter in pattern]
    else:
        key, words = list_key, keys.texts(list_key) if default is None else keys.texts(list_key, default)
    if len(words) > MAX_LAYERS:
        raise InputError(_("has more than {limit} layers").format(limit=MAX_LAYERS), where=keys.at(key))
    for word in words:
        if word not in _KINDS:
            raise InputError(
                _("{kind} is no kind of layer known here").format(kind=repr(word)[:60]),
                where=keys.at(key),
                remedy=_("known are: {kinds}").format(kinds=", ".join(_KINDS)),
            )
    return [_KINDS[word] for word in words]


def _parts(keys: Keys, hidden: int) -> dict[str, Mixer | FeedForward]:
    """Return the part of each kind of layer that the config describes."""
    head_dim = keys.first_integer("head_dim", "attention_head_dim", default=128)
    parts: dict[str, Mixer | FeedForward] = {
        "mamba": _mamba(keys),
        "attention": common.gqa(keys, hidden, head_dim_default=head_dim, prefix="mixer"),
        "mlp": DenseFFN(
            intermediate_size=keys.integer("intermediate_size"),
            gated=False,
            bias=keys.flag("mlp_bias", False),
            prefix="mixer",
            activation=keys.text("mlp_hidden_act", "relu2"),
        ),
    }
    if keys.integer("n_routed_experts", 0, low=0):
        parts["moe"] = _moe(keys)
    return parts


def _mamba(keys: Keys) -> Mamba2:
    """Return the Mamba-2 layer. The state is float32 unless the config says otherwise.

    Source: vllm@0.33.0:vllm/model_executor/models/config.py:NemotronHForCausalLMConfig.
    """
    return Mamba2(
        num_heads=keys.integer("mamba_num_heads"),
        head_dim=keys.integer("mamba_head_dim"),
        state_size=keys.integer("ssm_state_size"),
        num_groups=keys.integer("n_groups"),
        conv_kernel=keys.integer("conv_kernel"),
        conv_bias=keys.flag("use_conv_bias", True),
        proj_bias=keys.flag("use_bias", False),
        state_dtype=keys.text("mamba_ssm_cache_dtype", "float32"),
    )


def _moe(keys: Keys) -> MoEFFN:
    """Return the experts: no gate projection; with ``moe_latent_size`` they work between two projections.

    ``mlp_bias`` gives biases to the shared expert and those projections alone, which is not understood here.
    """
    common.only(keys, mlp_bias=False)
    num_shared = keys.integer("n_shared_experts", 1, low=0)
    return common.moe(
        keys,
        shared_intermediate_size=keys.integer("moe_shared_expert_intermediate_size") if num_shared else 0,
        correction_bias=True,
        gated=False,
        latent_size=keys.integer("moe_latent_size", None),
        prefix="mixer",
        activation=keys.text("mlp_hidden_act", "relu2"),
    )


def _layer(part: Mixer | FeedForward, hidden: int) -> Layer:
    norms = (Norm(name="norm", size=hidden),)
    if isinstance(part, DenseFFN | MoEFFN):
        return Layer(mixers=(), ffns=(part,), norms=norms)
    return Layer(mixers=(part,), ffns=(), norms=norms)


def _mtp(keys: Keys, parts: dict[str, Mixer | FeedForward], hidden: int) -> tuple[MtpModule, ...]:
    """Return the MTP modules: a pattern of layers behind a projection, its norms, and a final norm."""
    count = keys.integer("num_nextn_predict_layers", 0, low=0, high=64)
    kinds = _kinds(keys, "mtp_hybrid_override_pattern", "mtp_layers_block_type", ["attention", "moe"])
    if not count:
        return ()
    missing = [kind for kind in kinds if kind not in parts]
    if missing or not kinds:
        raise InputError(
            _("the MTP pattern needs layers that the config does not describe"), where=keys.at("mtp_layers_block_type")
        )
    return tuple(_mtp_module([parts[kind] for kind in kinds], step * len(kinds), hidden) for step in range(count))


def _mtp_module(parts: list[Mixer | FeedForward], first: int, hidden: int) -> MtpModule:
    placed = [replace(part, prefix=f"layers.{first + index}.{part.prefix}") for index, part in enumerate(parts)]
    last = first + len(parts) - 1
    layer = Layer(
        mixers=tuple(part for part in placed if not isinstance(part, DenseFFN | MoEFFN)),
        ffns=tuple(part for part in placed if isinstance(part, DenseFFN | MoEFFN)),
        norms=tuple(Norm(name=f"layers.{first + index}.norm", size=hidden) for index in range(len(parts))),
    )
    names = (f"layers.{first}.enorm", f"layers.{first}.hnorm", f"layers.{last}.final_layernorm")
    return MtpModule(
        layer=layer,
        norms=tuple(Norm(name=name, size=hidden) for name in names),
        extras=(ExtraTensor(name=f"layers.{first}.eh_proj.weight", shape=(hidden, 2 * hidden)),),
        prefix="mtp.",
    )
