"""What multi-modal models share: the nested text decoder, and the tensors of towers under their checkpoint names.

``split`` follows vLLM 0.33.0 (vllm/model_executor/models/), which shards attention and feed-forward blocks of most
towers over tensor-parallel ranks; a tower that it runs as transformers does is replicated.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from importlib import import_module
from typing import Literal

from ullage.errors import InputError, UnknownArchitectureError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.read.hf_config.common import read_architecture
from ullage.read.hf_config.defaults import fill_in
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import ExtraTensor, Model, Tower

Tensors = tuple[ExtraTensor, ...]
Split = Literal["none", "out", "in", "vocab"]

MAX_TOWER_LAYERS = 512

#: Places and numbers of image and audio tokens: nothing of them is stored.
_TOKENS = (
    "audio_token_id",
    "audio_token_index",
    "boi_token_index",
    "eoi_token_index",
    "ignore_index",
    "image_placeholder",
    "image_seq_length",
    "image_token_index",
    "media_placeholder_token_id",
    "mm_tokens_per_image",
    "video_placeholder",
    "video_seq_length",
    "video_token_index",
    "vision_end_token_id",
    "vision_soft_tokens_per_image",
    "vision_start_token_id",
    "vision_token_id",
)


# ------------------------------------------------------------------------------------------------------------- tensors


def linear(name: str, rows: int, columns: int, *, bias: bool = False, split: Split = "none") -> Tensors:
    """Return a linear layer's weight and, if any, its bias, which is split only with the output axis."""
    weight = ExtraTensor(name=f"{name}.weight", shape=(rows, columns), split=split)
    if not bias:
        return (weight,)
    return weight, ExtraTensor(name=f"{name}.bias", shape=(rows,), split="out" if split == "out" else "none")


def norm(name: str, size: int, *, bias: bool = False) -> Tensors:
    """Return a norm's scale and, if any, its bias."""
    names = ("weight", "bias") if bias else ("weight",)
    return tuple(ExtraTensor(name=f"{name}.{part}", shape=(size,)) for part in names)


def conv(name: str, out: int, *shape: int, bias: bool = False) -> Tensors:
    """Return a convolution; every rank has it whole."""
    weight = ExtraTensor(name=f"{name}.weight", shape=(out, *shape))
    return (weight, ExtraTensor(name=f"{name}.bias", shape=(out,))) if bias else (weight,)


def table(name: str, *shape: int, split: Split = "none") -> Tensors:
    """Return a learned table (positions, class token), which is no linear layer."""
    return (ExtraTensor(name=name, shape=shape, split=split, linear=False),)


class EncoderLayer(Frozen):
    """The names and biases of a tower's transformer layer; sizes are given to :meth:`tensors`.

    ``qkv``: names of three projections, or of one that holds all; ``ups``: projections into the inner size.
    """

    qkv: tuple[str, ...]
    out: str
    ups: tuple[str, ...]
    down: str
    norms: tuple[str, ...]
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    norm_bias: bool = True
    sharded: bool = True

    def tensors(self, at: str, hidden: int, inner: int, width: int | None = None) -> Tensors:
        """Return the layer's tensors under ``at``; ``width`` is that of all heads when it is not ``hidden``."""
        width = width or hidden
        into: Split = "out" if self.sharded else "none"
        back: Split = "in" if self.sharded else "none"
        rows = 3 * width if len(self.qkv) == 1 else width
        found: Tensors = ()
        for name in self.qkv:
            found += linear(at + name, rows, hidden, bias=self.qkv_bias, split=into)
        found += linear(at + self.out, hidden, width, bias=self.out_bias, split=back)
        for name in self.ups:
            found += linear(at + name, inner, hidden, bias=self.mlp_bias, split=into)
        found += linear(at + self.down, hidden, inner, bias=self.mlp_bias, split=back)
        for name in self.norms:
            found += norm(at + name, hidden, bias=self.norm_bias)
        return found

    def stack(self, at: str, count: int, hidden: int, inner: int, width: int | None = None) -> Tensors:
        """Return ``count`` layers, numbered under ``at``."""
        found: Tensors = ()
        for index in range(count):
            found += self.tensors(f"{at}.{index}.", hidden, inner, width)
        return found


#: CLIP and SigLIP name their layers alike.
CLIP_LAYER = EncoderLayer(
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.out_proj",
    ups=("mlp.fc1",),
    down="mlp.fc2",
    norms=("layer_norm1", "layer_norm2"),
)


# ---------------------------------------------------------------------------------------------------------------- text


def need_part(keys: Keys, name: str) -> Keys:
    """Take a nested object that must be there."""
    part = keys.part(name)
    if part is None:
        raise InputError(_("the key is missing"), where=keys.at(name))
    return part


def num_layers(part: Keys, key: str = "num_hidden_layers", default: int | None = None) -> int:
    """Take the number of a tower's layers, which has a bound of its own: each layer is listed tensor by tensor."""
    count = part.integer(key, default, high=MAX_TOWER_LAYERS)
    if count is None:
        raise InputError(_("the key is missing"), where=part.at(key))
    return int(count)


def head_size(part: Keys, hidden: int, heads_key: str) -> int:
    """Take the number of a tower's heads and return the size of one."""
    heads: int = part.integer(heads_key)
    if hidden % heads:
        raise InputError(
            _("{heads} heads do not divide hidden_size {hidden}").format(heads=heads, hidden=hidden),
            where=part.at(heads_key),
        )
    return hidden // heads


def tower(
    part: Keys,
    tensors: Tensors,
    *,
    name: str = "vision",
    layers: str = "num_hidden_layers",
    hidden: str = "hidden_size",
    heads: str = "num_attention_heads",
) -> Tower:
    """Return the tower that ``part`` describes; ``layers``, ``hidden`` and ``heads`` are the names of its keys."""
    return Tower(
        name=name,
        tensors=tensors,
        num_layers=part.integer(layers, 0),
        hidden_size=part.integer(hidden, 0),
        num_heads=part.integer(heads, 0),
    )


def read_text(keys: Keys, default_type: str = "") -> Model:
    """Read a decoder with the reader of its own model type, or of ``default_type`` where it names none."""
    return read_as(keys.text("model_type", "") or default_type, keys)


def read_as(model_type: str, keys: Keys) -> Model:
    """Read a decoder with the reader of ``model_type``.

    Raises:
        UnknownArchitectureError: no such reader.
    """
    from ullage.read.hf_config.families import FAMILIES

    if model_type not in FAMILIES:
        raise UnknownArchitectureError(
            _("the model type {model_type!r} is not understood").format(model_type=model_type[:80]),
            where=keys.where,
            keys=["model_type"],
        )
    fill_in(keys, str(keys.values.get("model_type") or model_type))
    module, function = FAMILIES[model_type].split(":")
    model: Model = getattr(import_module(f"ullage.read.hf_config.families.{module}"), function)(keys)
    return model


def assemble(
    keys: Keys,
    text: Model,
    towers: Iterable[Tower],
    *,
    prefix: str,
    head: str | None = None,
    assumed: tuple[str, ...] = (),
) -> Model:
    """Return the whole: the text decoder renamed under ``prefix`` (with its dot), and the towers.

    ``prefix`` replaces ``model.``, by which readers of text decoders begin their names; ``head`` renames the head.
    Where the whole says whether the head is tied, that decides
    (transformers@5.23.0:modeling_utils.py:get_expanded_tied_weights_keys).
    """
    keys.skip(*_TOKENS, "dtype", "torch_dtype")

    def renamed(name: str) -> str:
        return prefix + name.removeprefix("model.") if name.startswith("model.") else name

    return replace(
        text,
        architecture=read_architecture(keys),
        towers=tuple(towers),
        tied_embeddings=keys.flag("tie_word_embeddings", text.tied_embeddings),
        embedding_name=renamed(text.embedding_name),
        layers_name=renamed(text.layers_name),
        head_name=head or text.head_name,
        final_norms=tuple(replace(norm, name=renamed(norm.name)) for norm in text.final_norms),
        extras=tuple(replace(extra, name=renamed(extra.name)) for extra in text.extras),
        assumed=text.assumed + assumed,
    )
