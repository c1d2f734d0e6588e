"""What all families share: the frame of a decoder, its norms and its multi-token-prediction modules."""

from __future__ import annotations

from typing import Literal

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import ExtraTensor, Layer, Model, MtpModule, Norm
from ullage.units import canonical_dtype

NormKind = Literal["rms", "layer"]


def pre_norms(hidden: int, kind: NormKind = "rms", *, bias: bool = False) -> tuple[Norm, ...]:
    """Return the two norms of a pre-norm block under their Llama names."""
    return tuple(
        Norm(name=name, size=hidden, kind=kind, bias=bias) for name in ("input_layernorm", "post_attention_layernorm")
    )


def read_dtype(keys: Keys) -> str:
    """Take ``dtype`` or ``torch_dtype``; bfloat16 when neither is there (what engines load by default)."""
    name = keys.raw("dtype") or keys.raw("torch_dtype") or "bfloat16"
    keys.skip("dtype", "torch_dtype")
    if not isinstance(name, str):
        raise InputError(_("{value} is not a number format").format(value=repr(name)[:60]), where=keys.at("dtype"))
    try:
        return canonical_dtype(name)
    except InputError as error:
        raise InputError(error.what, where=keys.at("dtype"), remedy=error.remedy) from None


def mtp_module(layer: Layer, hidden: int) -> MtpModule:
    """Return a DeepSeek-V3 style module: enorm, hnorm, eh_proj (H, 2H), one layer, and the shared head's norm.

    Source: DeepSeek-V3 technical report (arXiv:2412.19437) eq. 21-23; checkpoint tensors ``model.layers.61.*``.
    """
    return MtpModule(
        layer=layer,
        norms=tuple(Norm(name=name, size=hidden) for name in ("enorm", "hnorm", "shared_head.norm")),
        extras=(ExtraTensor(name="eh_proj.weight", shape=(hidden, 2 * hidden)),),
    )


def decoder(
    keys: Keys,
    hidden: int,
    layers: tuple[Layer, ...],
    *,
    tied_default: bool = False,
    norm_kind: NormKind = "rms",
    norm_bias: bool = False,
    mtp_layer: Layer | None = None,
) -> Model:
    """Build the frame: vocabulary, tying, final norm, MTP modules, declared context, quantisation.

    ``mtp_layer`` is the layer of an MTP module; as many are made as ``num_nextn_predict_layers`` says.
    """
    from ullage.read.hf_config.quantization import read_quantization

    num_mtp = keys.integer("num_nextn_predict_layers", 0, low=0, high=64)
    return Model(
        name="",
        architecture=(keys.items("architectures", None) or [keys.text("model_type")])[0],
        hidden_size=hidden,
        vocab_size=keys.integer("vocab_size"),
        dtype=read_dtype(keys),
        layers=layers,
        final_norms=(Norm(name="model.norm", size=hidden, kind=norm_kind, bias=norm_bias),),
        tied_embeddings=keys.flag("tie_word_embeddings", tied_default),
        max_position_embeddings=keys.integer("max_position_embeddings", 0, low=0),
        mtp=(mtp_module(mtp_layer, hidden),) * num_mtp if mtp_layer else (),
        quantization=read_quantization(keys),
    )
