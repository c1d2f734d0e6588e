"""A model of the catalog → the values of a transformers config. No torch here.

Only the usual keys of a decoder are written; whether the model that transformers builds from them has the right number
of parameters is checked afterwards, so that a key that is missing here cannot pass unseen.
"""

from __future__ import annotations

from typing import Any

from ullage.spec import model as spec
from ullage.spec.mixers import Attention, LatentAttention


def config_values(model: spec.Model) -> dict[str, Any] | None:
    """Return config values of a decoder of attention and feed-forward blocks, None of any other kind."""
    layers = model.layers
    if not all(len(layer.mixers) == 1 == len(layer.ffns) and layer.residual is None for layer in layers):
        return None
    mixer = layers[0].mixers[0]
    values: dict[str, Any] = {
        "hidden_size": model.hidden_size,
        "vocab_size": model.vocab_size,
        "num_hidden_layers": len(layers),
        "tie_word_embeddings": model.tied_embeddings,
        "max_position_embeddings": model.max_position_embeddings or 4096,
    }
    if isinstance(mixer, Attention):
        values |= _attention(mixer, [layer.mixers[0] for layer in layers])
    elif isinstance(mixer, LatentAttention):
        values |= _latent(mixer)
    else:
        return None
    return values | _feed_forward(layers)


def _attention(mixer: Attention, all_mixers: list[Any]) -> dict[str, Any]:
    values: dict[str, Any] = {
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_kv_heads,
        "head_dim": mixer.head_dim,
        "attention_bias": mixer.q_bias,
    }
    windows = [getattr(each, "window", None) for each in all_mixers]
    if any(windows):
        values["sliding_window"] = next(each for each in windows if each)
        if not all(windows):
            values["layer_types"] = ["sliding_attention" if each else "full_attention" for each in windows]
    return values


def _latent(mixer: LatentAttention) -> dict[str, Any]:
    return {
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_heads,
        "q_lora_rank": mixer.q_lora_rank,
        "kv_lora_rank": mixer.kv_lora_rank,
        "qk_nope_head_dim": mixer.qk_nope_head_dim,
        "qk_rope_head_dim": mixer.qk_rope_head_dim,
        "v_head_dim": mixer.v_head_dim,
        "head_dim": mixer.qk_rope_head_dim,
        "attention_bias": mixer.bias,
    }


def _feed_forward(layers: tuple[spec.Layer, ...]) -> dict[str, Any]:
    ffns = [layer.ffns[0] for layer in layers]
    dense = next((each for each in ffns if isinstance(each, spec.DenseFFN)), None)
    experts = next((each for each in ffns if isinstance(each, spec.MoEFFN)), None)
    values: dict[str, Any] = {}
    if dense is not None:
        values |= {"intermediate_size": dense.intermediate_size, "hidden_act": dense.activation}
        values |= {"mlp_bias": dense.bias}
    if experts is None:
        return values
    num_dense = next((at for at, each in enumerate(ffns) if isinstance(each, spec.MoEFFN)), 0)
    shared = experts.shared_intermediate_size
    count, width = experts.num_experts, experts.intermediate_size
    values |= {
        "num_experts": count, "num_local_experts": count, "n_routed_experts": count,
        "num_experts_per_tok": experts.top_k, "moe_intermediate_size": width,
        "n_shared_experts": shared // width if shared else 0, "shared_expert_intermediate_size": shared,
        "first_k_dense_replace": num_dense, "mlp_only_layers": [], "decoder_sparse_step": 1,
    }  # fmt: skip
    if dense is None:
        values["intermediate_size"] = width
    return values
