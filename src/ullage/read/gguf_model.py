"""A GGUF's metadata and tensors → :class:`ullage.spec.model.Model`.

What a block is made of is read off its tensors: a block with ``attn_kv_a_mqa`` has latent attention, one with
``ffn_gate_exps`` a mixture of experts. Metadata adds what shapes cannot show: heads, windows, experts per token. A
tensor that no rule explains is an error that names it.

Source: llama.cpp@b7000:src/llama-arch.cpp (names), src/llama-model.cpp:load_hparams, load_tensors.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

from ullage.account.gguf_types import ggml_format
from ullage.account.parameters import model_parameters
from ullage.errors import InputError, UnknownArchitectureError
from ullage.i18n import _
from ullage.read.gguf import GgufFile, Tensor
from ullage.read.hf_config.quantization.patterns import fold_modules
from ullage.spec.model import (
    Attention,
    DenseFFN,
    ExtraTensor,
    FeedForward,
    LatentAttention,
    Layer,
    Mixer,
    Model,
    MoEFFN,
    MtpModule,
    Norm,
    Quantization,
    QuantRule,
)
from ullage.units import WeightFormat, plain

MAX_BLOCKS = 10_000
#: Architectures with a window on some layers: (period, position of the full layer); llama-model.cpp:set_swa_pattern.
_WINDOW_PERIODS = {"gemma2": 2, "gemma3": 6, "gpt-oss": 2, "cohere2": 4, "exaone4": 4}
_BLOCK = re.compile(r"^blk\.(\d+)\.(.+)$")
_PLAIN_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
#: Tensor of a block -> module of our model, which has Llama's names.
_MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_v_b": "self_attn.kv_b_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.*.gate_proj",
    "ffn_up_exps": "mlp.experts.*.up_proj",
    "ffn_down_exps": "mlp.experts.*.down_proj",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_experts_gate",
}
_WHOLE = {"token_embd": "model.embed_tokens", "output": "lm_head"}
_LATENT_NAMES = frozenset(("attn_q_a_norm", "attn_kv_a_norm", "attn_k_b", "attn_v_b"))
_HEAD_NORMS = frozenset(("attn_q_norm", "attn_k_norm"))
_WHOLE_NORMS = {"output_norm": "model.norm", "token_embd_norm": "model.embed_norm"}


class _Meta:
    """Metadata of one architecture, each value checked."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        architecture = file.metadata.get("general.architecture")
        if not isinstance(architecture, str) or not architecture:
            raise InputError(_("general.architecture is missing"), where=file.source)
        self.architecture = architecture

    def integer(self, key: str, default: int | None = None, *, layer: int | None = None) -> int:
        """Return ``<architecture>.<key>``; of a list, the value of ``layer``."""
        value = self.file.metadata.get(f"{self.architecture}.{key}")
        if isinstance(value, list) and layer is not None and layer < len(value):
            value = value[layer]
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**40:
            raise InputError(
                _("{value} is not a usable number").format(value=repr(value)[:60]),
                where=f"{self.file.source}: {self.architecture}.{key}",
            )
        return value


def model_of(file: GgufFile) -> Model:
    """Return the model of a GGUF.

    Raises:
        InputError: metadata or shapes that cannot be.
        UnknownArchitectureError: tensors or settings that are not understood.
    """
    meta = _Meta(file)
    embedding = _need(file, "token_embd.weight", axes=2)
    vocab, hidden = embedding.shape
    num_blocks = meta.integer("block_count")
    if not 1 <= num_blocks <= MAX_BLOCKS:
        raise InputError(_("{count} blocks are not usable").format(count=num_blocks), where=file.source)
    blocks = _blocks(file, num_blocks)
    num_mtp = min(meta.integer("nextn_predict_layers", 0), num_blocks - 1)
    kinds: dict[Layer, Layer] = {}
    layers = [_layer(meta, index, blocks[index], hidden) for index in range(num_blocks)]
    layers = [kinds.setdefault(layer, layer) for layer in layers]
    mtp = tuple(_mtp(blocks[index], layers[index]) for index in range(num_blocks - num_mtp, num_blocks))
    name = file.metadata.get("general.name")
    model = Model(
        name=name if isinstance(name, str) and name else Path(file.source).stem,
        architecture=meta.architecture,
        hidden_size=hidden,
        vocab_size=vocab,
        dtype="float32",
        layers=tuple(layers[: num_blocks - num_mtp]),
        mtp=mtp,
        final_norms=_final_norms(file),
        extras=_extras(file),
        tied_embeddings="output.weight" not in file.tensors,
        max_position_embeddings=meta.integer("context_length", 0),
        source=file.source,
    )
    model = replace(model, quantization=_types(file), assumed=_assumed(file))
    _check_count(file, model)
    return model


def _assumed(file: GgufFile) -> tuple[str, ...]:
    if not file.missing_bytes:
        return ()
    return (_("the file ends {missing:,} bytes before its last tensor").format(missing=file.missing_bytes),)


def _need(file: GgufFile, name: str, *, axes: int) -> Tensor:
    tensor = file.tensors.get(name)
    if tensor is None or len(tensor.shape) != axes:
        raise UnknownArchitectureError(
            _("{name} is missing or has another rank than {axes}").format(name=name, axes=axes),
            where=file.source,
            keys=(name,),
        )
    return tensor


def _blocks(file: GgufFile, num_blocks: int) -> list[dict[str, Tensor]]:
    """Return the tensors of each block by the rest of their names; every other tensor must be known."""
    blocks: list[dict[str, Tensor]] = [{} for _index in range(num_blocks)]
    unknown = []
    for name, tensor in file.tensors.items():
        match = _BLOCK.match(name)
        if match is not None and int(match.group(1)) < num_blocks:
            blocks[int(match.group(1))][match.group(2)] = tensor
        elif name.rsplit(".", 1)[0] not in {**_WHOLE, **_WHOLE_NORMS} and not name.startswith("rope_f"):
            unknown.append(name)
    if unknown:
        raise UnknownArchitectureError(
            _("the GGUF has tensors that are not understood"), where=file.source, keys=unknown[:20]
        )
    return blocks


def _final_norms(file: GgufFile) -> tuple[Norm, ...]:
    return tuple(
        Norm(name=ours, size=_need(file, f"{name}.weight", axes=1).shape[0], bias=f"{name}.bias" in file.tensors)
        for name, ours in _WHOLE_NORMS.items()
        if f"{name}.weight" in file.tensors
    )


def _extras(file: GgufFile) -> tuple[ExtraTensor, ...]:
    return tuple(
        ExtraTensor(name=name, shape=tensor.shape, buffer=True)
        for name, tensor in file.tensors.items()
        if name.startswith("rope_f")
    )


def _layer(meta: _Meta, index: int, block: dict[str, Tensor], hidden: int) -> Layer:
    known: set[str] = set()
    mixer = _mixer(meta, index, block, hidden, known)
    ffn = _ffn(meta, index, block, known)
    norms = []
    for name, tensor in block.items():
        stem, _dot, ending = name.rpartition(".")
        if ending == "weight" and stem.endswith("norm") and stem not in _LATENT_NAMES | _HEAD_NORMS:
            norms.append(Norm(name=stem, size=math.prod(tensor.shape), bias=f"{stem}.bias" in block))
            known |= {name, f"{stem}.bias"}
    known |= {name for name in block if name.startswith("nextn.") or name == "rope_freqs.weight"}
    unknown = sorted(set(block) - known)
    if unknown:
        raise UnknownArchitectureError(
            _("block {index} of {architecture} has tensors that are not understood").format(
                index=index, architecture=meta.architecture
            ),
            where=meta.file.source,
            keys=unknown[:20],
        )
    return Layer(mixers=(mixer,), ffns=(ffn,), norms=tuple(norms))


def _mixer(meta: _Meta, index: int, block: dict[str, Tensor], hidden: int, known: set[str]) -> Mixer:
    heads = meta.integer("attention.head_count", layer=index)
    if not heads:
        raise UnknownArchitectureError(_("a block without heads"), where=meta.file.source, keys=(f"blk.{index}",))
    if "attn_kv_a_mqa.weight" in block:
        return _latent(meta, block, heads, known)
    kv_heads = meta.integer("attention.head_count_kv", heads, layer=index)
    dim = meta.integer("attention.key_length", hidden // heads)
    v_dim = meta.integer("attention.value_length", dim)
    names = [f"attn_{part}.{end}" for part in ("q", "k", "v", "qkv", "output") for end in ("weight", "bias")]
    known |= set(names) | {"attn_q_norm.weight", "attn_k_norm.weight", "attn_sinks.weight", "attn_sinks"}
    rows = block["attn_q.weight"].shape[0] if "attn_q.weight" in block else heads * dim
    if rows not in (heads * dim, 2 * heads * dim):
        raise InputError(
            _("attn_q has {rows} rows, {heads} heads of {dim} are stated").format(rows=rows, heads=heads, dim=dim),
            where=f"{meta.file.source}: blk.{index}",
        )
    q_norm = block.get("attn_q_norm.weight")
    return Attention(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        v_head_dim=v_dim if v_dim != dim else None,
        q_bias="attn_q.bias" in block or "attn_qkv.bias" in block,
        k_bias="attn_k.bias" in block,
        v_bias="attn_v.bias" in block,
        o_bias="attn_output.bias" in block,
        qk_norm=None if q_norm is None else ("head" if math.prod(q_norm.shape) == dim else "full"),
        window=_window(meta, index),
        sinks="attn_sinks.weight" in block or "attn_sinks" in block,
        output_gate=rows == 2 * heads * dim,
        fused_qkv="qkv_proj" if "attn_qkv.weight" in block else None,
        shared_kv="attn_k.weight" not in block and "attn_qkv.weight" not in block,
        value_is_key="attn_k.weight" in block and "attn_v.weight" not in block,
    )


def _window(meta: _Meta, index: int) -> int | None:
    """Return the sliding window of a block, None for full attention."""
    window = meta.integer("attention.sliding_window", 0)
    if not window:
        return None
    pattern = meta.file.metadata.get(f"{meta.architecture}.attention.sliding_window_pattern")
    if isinstance(pattern, list) and index < len(pattern):
        return window if pattern[index] else None
    if meta.architecture == "phi3":  # the loader ignores the window of this architecture
        return None
    period = pattern if isinstance(pattern, int) else _WINDOW_PERIODS.get(meta.architecture, 0)
    if period > 0:
        return None if index % period == period - 1 else window
    raise UnknownArchitectureError(
        _("which layers of {architecture} have the sliding window is not known").format(architecture=meta.architecture),
        where=meta.file.source,
        keys=(f"{meta.architecture}.attention.sliding_window",),
    )


def _latent(meta: _Meta, block: dict[str, Tensor], heads: int, known: set[str]) -> LatentAttention:
    """Return latent attention; newer files state the head sizes with ``_mla`` and split ``attn_kv_b``."""
    known |= {f"{name}.weight" for name in ("attn_q", "attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_kv_b")}
    known |= {f"{name}.weight" for name in (*_LATENT_NAMES, "attn_output")}
    rank, rope = meta.integer("attention.kv_lora_rank"), meta.integer("rope.dimension_count")
    key = meta.integer("attention.key_length_mla", meta.integer("attention.key_length"))
    q_a = block.get("attn_q_a.weight")
    return LatentAttention(
        num_heads=heads,
        q_lora_rank=q_a.shape[0] if q_a is not None else None,
        kv_lora_rank=rank,
        qk_nope_head_dim=max(0, key - rope),
        qk_rope_head_dim=rope,
        v_head_dim=meta.integer("attention.value_length_mla", meta.integer("attention.value_length")),
    )


def _ffn(meta: _Meta, index: int, block: dict[str, Tensor], known: set[str]) -> FeedForward:
    if "ffn_up_exps.weight" in block or "ffn_gate_up_exps.weight" in block:
        return _experts(meta, index, block, known)
    names = [f"ffn_{part}.{end}" for part in ("gate", "up", "down") for end in ("weight", "bias")]
    known |= set(names)
    down = block.get("ffn_down.weight")
    up = block.get("ffn_up.weight")
    if down is None or up is None or len(down.shape) != 2:
        raise UnknownArchitectureError(
            _("block {index} has no feed-forward that is understood").format(index=index),
            where=meta.file.source,
            keys=tuple(sorted(block))[:20],
        )
    inner = down.shape[1]
    fused = "ffn_gate.weight" not in block and up.shape[0] == 2 * inner
    return DenseFFN(
        intermediate_size=inner,
        gated="ffn_gate.weight" in block,
        bias="ffn_down.bias" in block,
        fused_gate_up="up_proj" if fused else None,
    )


def _experts(meta: _Meta, index: int, block: dict[str, Tensor], known: set[str]) -> MoEFFN:
    parts = ("gate", "up", "down")
    known |= {f"ffn_{part}_{kind}.weight" for part in parts for kind in ("exps", "shexp")}
    known |= {f"ffn_{part}_exps.bias" for part in parts}
    known |= {
        "ffn_gate_inp.weight",
        "ffn_gate_inp.bias",
        "exp_probs_b.bias",
        "exp_probs_b",
        "ffn_gate_inp_shexp.weight",
    }
    up = block.get("ffn_up_exps.weight")
    if up is None or len(up.shape) != 3 or "ffn_gate_inp.weight" not in block:
        raise UnknownArchitectureError(
            _("block {index} stores its experts in a way that is not understood").format(index=index),
            where=meta.file.source,
            keys=tuple(name for name in block if "exps" in name),
        )
    shared = block.get("ffn_up_shexp.weight")
    return MoEFFN(
        num_experts=up.shape[0],
        top_k=min(meta.integer("expert_used_count"), up.shape[0]),
        intermediate_size=up.shape[1],
        shared_intermediate_size=shared.shape[0] if shared is not None else 0,
        shared_gate="ffn_gate_inp_shexp.weight" in block,
        router_bias="ffn_gate_inp.bias" in block,
        correction_bias="exp_probs_b.bias" in block or "exp_probs_b" in block,
        expert_bias="ffn_up_exps.bias" in block,
        gated="ffn_gate_exps.weight" in block,
    )


def _mtp(block: dict[str, Tensor], layer: Layer) -> MtpModule:
    own = {name: tensor for name, tensor in block.items() if name.startswith("nextn.")}
    extras = tuple(ExtraTensor(name=name.removeprefix("nextn."), shape=tensor.shape) for name, tensor in own.items())
    return MtpModule(layer=layer, extras=extras)


def _types(file: GgufFile) -> Quantization:
    """Return the ggml type of every matrix as rules over our names."""
    by_format: dict[WeightFormat, list[str]] = {}
    for name, tensor in file.tensors.items():
        module = _module_of(name)
        if module is None or len(tensor.shape) < 2:
            continue
        kind = tensor.kind.name
        format_ = plain(_PLAIN_TYPES[kind]) if kind in _PLAIN_TYPES else ggml_format(kind)
        by_format.setdefault(format_, []).append(module)
    return Quantization(
        method="gguf",
        rules=tuple(
            QuantRule(pattern=pattern, format=format_)
            for format_, modules in by_format.items()
            for pattern in fold_modules(modules)
        ),
    )


def _module_of(name: str) -> str | None:
    stem, _dot, ending = name.rpartition(".")
    if ending != "weight":
        return None
    match = _BLOCK.match(stem)
    if match is None:
        return _WHOLE.get(stem)
    tail = match.group(2)
    module = tail.removeprefix("nextn.") if tail.startswith("nextn.") else _MODULES.get(tail)
    return f"model.layers.{match.group(1)}.{module}" if module else None


def _check_count(file: GgufFile, model: Model) -> None:
    """Check that the model has as many values as the file: a wrong reading would show here.

    Raises:
        UnknownArchitectureError: it has not.
    """
    ours = sum(math.prod(placed.parameter.shape) * placed.parameter.copies for placed in model_parameters(model))
    stored = sum(
        math.prod(tensor.shape) for name, tensor in file.tensors.items() if not name.endswith("attn_kv_b.weight")
    )
    split = any(name.endswith("attn_v_b.weight") for name in file.tensors)
    if not split:
        stored = sum(math.prod(tensor.shape) for tensor in file.tensors.values())
    if ours != stored:
        raise UnknownArchitectureError(
            _("as {architecture} the tensors should have {ours:,} values, the file has {stored:,}").format(
                architecture=model.architecture, ours=ours, stored=stored
            ),
            where=file.source,
            keys=tuple(sorted({_BLOCK.sub(r"blk.*.\2", name) for name in file.tensors}))[:60],
        )
