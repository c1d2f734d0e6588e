"""Our checkpoint tensors → the tensors of a GGUF: names, merged experts, the split of the latent projection.

Source: gguf@0.19.0:gguf/tensor_mapping.py:TensorNameMap; llama.cpp@b7000:convert_hf_to_gguf.py:DeepseekV2Model
(experts stacked, kv_b split into k_b and v_b), TextModel.prepare_tensors (vectors and routers stay F32);
ik_llama.cpp@58f08e43:src/llama.cpp:llm_load_tensors (LLM_ARCH_DEEPSEEK2).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Literal

from ullage.account.parameters import Placed, model_parameters
from ullage.frozen import Frozen
from ullage.spec.model import LatentAttention, Model

#: How the latent key-value projection is stored: mainline files since April 2025 "split" it into k_b and v_b, older
#: ones hold it "whole", ik_llama.cpp's own conversions hold "both".
LatentStorage = Literal["whole", "split", "both"]


class GgufTensor(Frozen):
    """One tensor of a GGUF: ``shape`` slowest axis first; ``layer`` -1 outside the blocks; ``vector``: kept in F32.

    ``placed``: the parameter of our model that it stores.
    """

    name: str
    shape: tuple[int, ...]
    layer: int
    vector: bool
    experts: bool = False
    placed: Placed | None = None


#: the part of the checkpoint name after the module that holds it → the part of the GGUF name after ``blk.N.``
_SUFFIXES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "out_proj": "attn_output",
    "dense": "attn_output",
    "qkv_proj": "attn_qkv",
    "query_key_value": "attn_qkv",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "sinks": "attn_sinks",
    "q_a_proj": "attn_q_a",
    "q_a_layernorm": "attn_q_a_norm",
    "q_b_proj": "attn_q_b",
    "kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "kv_a_layernorm": "attn_kv_a_norm",
    "kv_b_proj": "attn_kv_b",
    "gate_up_proj": "ffn_up",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "c_attn": "attn_qkv",
    "Wqkv": "attn_qkv",
    "fc_in": "ffn_up",
    "fc1": "ffn_up",
    "c_fc": "ffn_up",
    "dense_h_to_4h": "ffn_up",
    "fc_out": "ffn_down",
    "fc2": "ffn_down",
    "dense_4h_to_h": "ffn_down",
    "norm": "ssm_norm",
    "w1": "ffn_gate",
    "w2": "ffn_down",
    "w3": "ffn_up",
    "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "post_mlp_layernorm": "post_ffw_norm",
    "post_self_attn_layernorm": "post_attention_norm",
    "in_proj_qkvz": "ssm_in",
    "in_proj_ba": "ssm_ba",
    "in_proj_qkv": "attn_qkv",
    "in_proj_z": "attn_gate",
    "in_proj_b": "ssm_beta",
    "in_proj_a": "ssm_alpha",
    "in_proj": "ssm_in",
    "conv1d": "ssm_conv1d",
    "dt_bias": "ssm_dt",
    "dt_proj": "ssm_dt",
    "x_proj": "ssm_x",
    "A_log": "ssm_a",
    "D": "ssm_d",
    "wq_b": "indexer.attn_q_b",
    "wk": "indexer.attn_k",
    "weights_proj": "indexer.proj",
}
_WHOLE_MODEL = {"embedding": "token_embd", "head": "output", "final": "output_norm"}


@lru_cache(maxsize=64)
def gguf_tensors(model: Model, latent: LatentStorage = "split") -> tuple[GgufTensor, ...]:
    """Return every tensor of the model's GGUF in file order; prediction modules and towers are not in it.

    ``output.weight`` is absent when the embedding is tied: the loader then puts a second copy of the embedding on the
    device of the output layer (see :mod:`ullage.engines.llamacpp.placement`).
    """
    return tuple(tensor for tensor in _all_tensors(model, latent))


def _all_tensors(model: Model, latent: LatentStorage) -> Iterator[GgufTensor]:
    double_norms = {
        index
        for index, layer in enumerate(model.layers)
        if len(layer.norms) > 2  # norms before and after each block
    }
    for placed in model_parameters(model, mtp=False, towers=False):
        parameter = placed.parameter
        tail = parameter.name.rsplit(".", 1)[-1]
        kind = tail if tail in ("weight", "bias") else ""
        shape = parameter.shape
        if placed.section != "layer":
            name = _WHOLE_MODEL.get(placed.section, "other") + (f".{kind}" if kind else "")
            if "position" in parameter.name:
                name = "position_embd.weight"
            yield GgufTensor(name=name, shape=shape, layer=-1, vector=len(shape) < 2, placed=placed)
            continue
        inner = parameter.name.split(f"{model.layers_name}.{placed.layer}.", 1)[-1]
        name = _block_name(inner, double_norms=placed.layer in double_norms)
        experts = parameter.copies > 1
        if experts:
            shape = (parameter.copies, *shape)
        tensor = GgufTensor(
            name=f"blk.{placed.layer}.{name}" + (f".{kind}" if kind else ""),
            shape=shape,
            layer=placed.layer,
            vector=len(parameter.shape) < 2 or "ffn_gate_inp" in name,
            experts=experts,
            placed=placed,
        )
        if name == "attn_kv_b" and kind == "weight":
            yield from _latent_projection(tensor, model, latent)
        elif experts and not kind:
            yield from _fused_experts(tensor, tail)
        else:
            yield tensor


def _block_name(inner: str, *, double_norms: bool) -> str:
    """Return the GGUF name of a tensor of a block, without ``blk.N.`` and without the ending."""
    path = re.sub(r"\.(weight|bias)$", "", inner)
    last = path.rsplit(".", 1)[-1]
    if last == "e_score_correction_bias":
        return "exp_probs_b.bias"
    if last == "post_attention_layernorm":
        return "post_attention_norm" if double_norms else "ffn_norm"
    if last == "shared_expert_gate" or last == "shared_experts_gate":
        return "ffn_gate_inp_shexp"
    if last in ("gate", "router") or path.endswith((".router", ".gate.wg")):
        return "ffn_gate_inp"
    if last == "c_proj":
        return "ffn_down" if "mlp" in path else "attn_output"
    name = _SUFFIXES.get(last, path)
    if name.startswith("ffn_"):
        if ".{e}." in path or ".experts." in path:
            return name + "_exps"
        if "shared" in path:
            return name + "_shexp"
    return name


def _fused_experts(tensor: GgufTensor, tail: str) -> Iterator[GgufTensor]:
    """Yield the experts of a checkpoint that fuses them (gpt-oss, Llama 4): gate and up apart, weights and biases.

    Source: llama.cpp@b7000:convert_hf_to_gguf.py:GptOssModel.modify_tensors, Llama4Model.modify_tensors.
    """
    base, ending = f"blk.{tensor.layer}.", "bias" if tail.endswith("bias") else "weight"
    if not tail.startswith("gate_up"):
        part = "down" if tail.startswith("down") else tail
        yield replace(tensor, name=f"{base}ffn_{part}_exps.{ending}")
        return
    shape = (tensor.shape[0], tensor.shape[1] // 2, *tensor.shape[2:])
    for part in ("gate", "up"):
        yield replace(tensor, name=f"{base}ffn_{part}_exps.{ending}", shape=shape)


def _latent_projection(tensor: GgufTensor, model: Model, latent: LatentStorage) -> Iterator[GgufTensor]:
    """Yield the latent key-value projection as the file holds it: whole, split into k_b and v_b, or both.

    Formula: k_b (N, rkv, Dn), v_b (N, Dv, rkv): the key half transposed, so that queries can be absorbed.
    Source: llama.cpp@b7000:convert_hf_to_gguf.py:DeepseekV2Model.modify_tensors.
    """
    part = next(mixer for mixer in model.layers[tensor.layer].mixers if isinstance(mixer, LatentAttention))
    if latent in ("whole", "both"):
        yield tensor
    if latent in ("split", "both"):
        heads, rank = part.num_heads, part.kv_lora_rank
        base = f"blk.{tensor.layer}."
        yield replace(tensor, name=base + "attn_k_b.weight", shape=(heads, rank, part.qk_nope_head_dim))
        yield replace(tensor, name=base + "attn_v_b.weight", shape=(heads, part.v_head_dim, rank))
