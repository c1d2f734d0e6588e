"""DeepSeek-MoE, V2, V3 and V3.2, and the families built like them: Kimi K2, GLM-5, dots, Mistral 4, MiniCPM3.

Source: transformers@5.23.0:models/{deepseek_v2,deepseek_v3,deepseek_v32,glm_moe_dsa,glm4_moe_lite,mistral4,dots1,
minicpm3}/; DeepSeek-MoE, whose code lives beside its checkpoint: arXiv:2401.06066 and
vllm@0.33.0:model_executor/models/deepseek_v2.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.hf_config import common
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import ExtraTensor, Indexer, Layer, Mixer, Model, MoEFFN

INDEXER_KINDS = ("full", "shared")
SPARSE_ATTENTION = ("deepseek_sparse_attention", "indexed_attention")


def _v3_rank(keys: Keys) -> int | None:
    """Take the rank of queries: a missing key means 1536, null means none."""
    return keys.nullable_integer("q_lora_rank", 1536)


def read_moe(keys: Keys) -> Model:
    """Read DeepSeek-MoE: multi-head attention and fine-grained experts."""
    hidden, bias = keys.integer("hidden_size"), keys.flag("attention_bias", False)
    attention = common.gqa(keys, hidden, qkv_bias=bias, o_bias=bias)
    return _read(keys, hidden, [attention] * keys.layers(), correction_bias=False)


def read_v2(keys: Keys) -> Model:
    """Read DeepSeek-V2, V2-Lite and Coder-V2. A missing ``q_lora_rank`` means 1536; null means none (V2-Lite)."""
    attention = common.mla(keys, q_lora_rank=_v3_rank(keys))
    common.only(keys, mlp_bias=False)
    return _read(keys, keys.integer("hidden_size"), [attention] * keys.layers(), correction_bias=False)


def read_v3(keys: Keys) -> Model:
    """Read DeepSeek-V3, R1, V3.1 and Kimi K2."""
    attention = common.mla(keys, q_lora_rank=_v3_rank(keys))
    return _read(keys, keys.integer("hidden_size"), [attention] * keys.layers())


def read_v32(keys: Keys) -> Model:
    """Read DeepSeek-V3.2: V3 with an indexer in every layer, the MTP layer's included."""
    attention, num_layers = common.mla(keys, q_lora_rank=_v3_rank(keys), indexer=read_indexer(keys)), keys.layers()
    keys.skip("mlp_bias")  # the class has none, whatever the key says
    common.layer_types(keys, num_layers, SPARSE_ATTENTION, lambda index: SPARSE_ATTENTION[0])
    return _read(keys, keys.integer("hidden_size"), [attention] * num_layers)


def read_glm_lite(keys: Keys) -> Model:
    """Read GLM-4.7-Flash: V3's latent attention and experts, one dense layer first."""
    attention = common.mla(keys, q_lora_rank=keys.nullable_integer("q_lora_rank", 768))
    return _read(keys, keys.integer("hidden_size"), [attention] * keys.layers(), first_dense=1)


def read_mistral4(keys: Keys) -> Model:
    """Read the text part of Mistral Small 4: latent attention, experts without a correction bias."""
    attention = common.mla(keys, q_lora_rank=keys.nullable_integer("q_lora_rank", 1024))
    return _read(keys, keys.integer("hidden_size"), [attention] * keys.layers(), correction_bias=False)


def read_dots(keys: Keys) -> Model:
    """Read dots.llm1: grouped-query attention with norms of queries and keys, V3's experts."""
    hidden, num_layers, bias = keys.integer("hidden_size"), keys.layers(), keys.flag("attention_bias", False)
    window, first = keys.nullable_integer("sliding_window", 4096), keys.integer("max_window_layers", 62, low=0)
    kinds = common.windows(keys, num_layers, window, lambda index: window is not None and index >= first)
    mixers = [common.gqa(keys, hidden, qkv_bias=bias, o_bias=bias, qk_norm="head", window=window) for window in kinds]
    return _read(keys, hidden, mixers)


def read_glm_dsa(keys: Keys) -> Model:
    """Read GLM-5, 5.1 and 5.2. In 5.2 most layers reuse the choice of an earlier layer's indexer.

    ``indexer_types`` says which; where it is missing the older keys do: ``index_topk_pattern``, or every
    ``index_topk_freq``-th layer after ``index_skip_topk_offset``. The MTP layer has an indexer of its own.
    """
    num_layers, rank = keys.layers(), keys.nullable_integer("q_lora_rank", 2048)
    keys.skip("index_share_for_mtp_iteration", "indexer_rope_interleave", "mlp_bias")
    frequency, offset = keys.integer("index_topk_freq", 1), keys.integer("index_skip_topk_offset", 2, low=0)
    pattern = keys.text("index_topk_pattern", None)
    if pattern is not None and (len(pattern) != num_layers or set(pattern) - {"F", "S"}):
        raise InputError(_("is not one letter F or S per layer"), where=keys.at("index_topk_pattern"))

    def default(index: int) -> str:
        shared = pattern[index] == "S" if pattern else max(index - offset + 1, 0) % frequency > 0
        return INDEXER_KINDS[shared]

    kinds = common.layer_types(keys, num_layers, INDEXER_KINDS, default, key="indexer_types")
    common.layer_types(keys, num_layers, SPARSE_ATTENTION, lambda index: SPARSE_ATTENTION[0])
    own = common.mla(keys, q_lora_rank=rank, indexer=read_indexer(keys))
    reused = common.mla(keys, q_lora_rank=rank, shared_indexer=True)
    mixers: list[Mixer] = [own if kind == "full" else reused for kind in kinds]
    return _read(keys, keys.integer("hidden_size"), mixers, first_dense=3, mtp_mixer=own)


def read_axk1(keys: Keys) -> Model:
    """Read A.X K1: V3 with a further norm after the experts of a layer."""
    hidden, num_layers = keys.integer("hidden_size"), keys.layers()
    attention = common.mla(keys, q_lora_rank=_v3_rank(keys))
    norm = ExtraTensor(name="post_mlp_layernorm.weight", shape=(hidden,))
    sparse = replace(read_experts(keys, correction_bias=True), extras=(norm,))
    dense, norms = common.dense(keys), common.pre_norms(hidden)
    layers = common.by_kind(
        common.sparse_after(keys, num_layers, 1),
        lambda has_experts: Layer(mixers=(attention,), ffns=(sparse if has_experts else dense,), norms=norms),
    )
    common.only(keys, num_nextn_predict_layers=0)
    return common.decoder(keys, hidden, layers)


def read_youtu(keys: Keys) -> Model:
    """Read Youtu-LLM: V3's latent attention and a dense block, embeddings tied unless the config says otherwise."""
    keys.skip("embedding_initializer_range", "mlp_bias")
    hidden, attention = keys.integer("hidden_size"), common.mla(keys, q_lora_rank=_v3_rank(keys))
    layer = Layer(mixers=(attention,), ffns=(common.dense(keys),), norms=common.pre_norms(hidden))
    return common.decoder(keys, hidden, (layer,) * keys.layers(), tied_default=True)


def read_minicpm3(keys: Keys) -> Model:
    """Read MiniCPM3: latent attention and a dense block; embeddings are tied unless the config says otherwise."""
    hidden = keys.integer("hidden_size")
    keys.skip("scale_emb", "dim_model_base", "scale_depth", "mup_denominator", "rope_interleave")
    heads, dim = keys.integer("num_attention_heads"), keys.integer("v_head_dim", None)
    attention = common.mla(
        keys, q_lora_rank=keys.nullable_integer("q_lora_rank", 768), v_head_dim=dim or hidden // heads
    )
    ffn = common.dense(keys, bias=keys.flag("mlp_bias", False))
    layer = Layer(mixers=(attention,), ffns=(ffn,), norms=common.pre_norms(hidden))
    return common.decoder(keys, hidden, (layer,) * keys.layers(), tied_default=True)


def read_indexer(keys: Keys) -> Indexer:
    """Take the lightning indexer's sizes; its rope part is the attention's."""
    return Indexer(
        num_heads=keys.integer("index_n_heads"),
        head_dim=keys.integer("index_head_dim"),
        top_k=keys.integer("index_topk"),
        rope_head_dim=keys.integer("qk_rope_head_dim"),
    )


def read_experts(keys: Keys, *, correction_bias: bool) -> MoEFFN:
    """Take routed and shared experts under DeepSeek's names."""
    width = keys.integer("moe_intermediate_size")
    shared = width * keys.integer("n_shared_experts", 0, low=0)
    return common.moe(keys, shared_intermediate_size=shared, correction_bias=correction_bias)


def _read(
    keys: Keys,
    hidden: int,
    mixers: Sequence[Mixer],
    *,
    correction_bias: bool = True,
    first_dense: int = 0,
    mtp_mixer: Mixer | None = None,
) -> Model:
    """Read blocks, pattern and frame: dense layers first, then experts."""
    dense, sparse = common.dense(keys), read_experts(keys, correction_bias=correction_bias)
    norms = common.pre_norms(hidden)
    has_experts = common.sparse_after(keys, len(mixers), first_dense)

    def make(kind: tuple[Mixer, bool]) -> Layer:
        return Layer(mixers=(kind[0],), ffns=(sparse if kind[1] else dense,), norms=norms)

    layers = common.by_kind(zip(mixers, has_experts, strict=True), make)
    return common.decoder(keys, hidden, layers, mtp_layer=make((mtp_mixer or mixers[-1], True)))
