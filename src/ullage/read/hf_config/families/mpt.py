"""MPT: one projection for q, k and v, ALiBi or learned positions, biases unless ``no_bias`` says otherwise.

Source: mosaicml/llm-foundry@8c8dd48f:llmfoundry/models/mpt/{configuration_mpt,modeling_mpt}.py, the code that
published MPT checkpoints carry; defaults of missing keys are those of its config class.
"""

from __future__ import annotations

from dataclasses import replace

from ullage.i18n import _
from ullage.read.hf_config import common
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import Attention, DenseFFN, Layer, Model


def read(keys: Keys) -> Model:
    """Read MPT."""
    hidden, biased = keys.integer("d_model"), not keys.flag("no_bias", False)
    part = keys.part("attn_config") or keys.adopt({}, "attn_config")
    keys.skip(
        "emb_pdrop", "resid_pdrop", "init_config", "init_device", "logit_scale", "norm_type", "embedding_fraction"
    )
    keys.skip("verbose", "use_pad_tok_in_ffn", "fc_type", "tokenizer_name")
    ffn = DenseFFN(
        intermediate_size=int(hidden * keys.integer("expansion_ratio", 4)),
        gated=False,
        bias=biased,
        prefix="ffn",
        up_name="up_proj",
        down_name="down_proj",
        activation="gelu",
    )
    norms = common.norms(hidden, "norm_1", "norm_2", kind="layer", bias=biased)
    layer = Layer(mixers=(_attention(keys, part, hidden, biased),), ffns=(ffn,), norms=norms)
    alibi = part.flag("alibi", False)
    learned = keys.flag("learned_pos_emb", True) and not alibi and not part.flag("rope", False)
    model = common.decoder(
        keys,
        hidden,
        (layer,) * keys.layers("n_layers"),
        norm_kind="layer",
        norm_bias=biased,
        tied_default=True,
        context=("max_seq_len",),
        learned_positions=keys.integer("max_seq_len", 2048) if learned else 0,
        positions_name="transformer.wpe",
        embedding_name="transformer.wte",
        layers_name="transformer.blocks",
        norm_name="transformer.norm_f",
    )
    missing = [name for name, holder in (("no_bias", keys), ("alibi", part)) if name not in holder]
    said = _("{keys} not given: taken as llm-foundry does without, biases and learned positions")
    return replace(model, assumed=(*model.assumed, said.format(keys=", ".join(missing)))) if missing else model


def _attention(keys: Keys, part: Keys, hidden: int, biased: bool) -> Attention:
    """Read the nested attention config; one KV head or groups of them by ``attn_type``."""
    common.only(part, qk_ln=False, qk_gn=False)
    part.skip(
        "attn_impl", "attn_pdrop", "clip_qkv", "softmax_scale", "prefix_lm", "attn_uses_sequence_id", "alibi_bias_max"
    )
    part.skip("rope_theta", "rope_impl", "rope_dail_config", "rope_hf_config", "fused_qkv", "model_type")
    kind, heads = part.text("attn_type", "multihead_attention"), keys.integer("n_heads")
    kv_default = 1 if kind == "multiquery_attention" else heads
    attention = common.gqa(
        keys.adopt({"n_heads": heads, "kv_n_heads": part.integer("kv_n_heads", kv_default)}, "attn_config"),
        hidden,
        heads="n_heads",
        kv_heads="kv_n_heads",
        qkv_bias=biased,
        o_bias=biased,
        fused_qkv="Wqkv",
        prefix="attn",
        o_name="out_proj",
    )
    window = part.integer("sliding_window_size", None, low=-1)
    return replace(attention, window=window) if window and window > 0 else attention
