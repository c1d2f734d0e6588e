"""DeepSeek-V4: compressed attention, hyper-connections, hash-routed first layers.

Source: transformers@5.23.0:models/deepseek_v4/; tensor names are those of the published checkpoints, which
transformers@5.23.0:conversion_mapping.py translates; MTP module: vllm@0.33.0:models/deepseek_v4/nvidia/mtp.py.
"""

from __future__ import annotations

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.hf_config import common
from ullage.read.hf_config.keys import Keys
from ullage.spec.model import (
    CompressedAttention,
    ExtraTensor,
    HyperConnections,
    Indexer,
    Layer,
    Model,
    MoEFFN,
    MtpModule,
)

SPARSE, HEAVY = "compressed_sparse_attention", "heavily_compressed_attention"
#: tokens per compressed entry of each kind (config class defaults; paper section 2.3)
RATES = {common.SLIDING: 0, SPARSE: 4, HEAVY: 128}
MLP_KINDS = ("moe", "hash_moe")


def read(keys: Keys) -> Model:
    """Read DeepSeek-V4. Layers of ratio 4 overlap their windows and choose entries with an indexer.

    ``num_hash_layers`` layers take experts by a table of token ids instead of the router's correction bias.
    """
    keys.skip("hc_eps", "hc_sinkhorn_iters", "compress_rope_theta", "expert_dtype", "swiglu_limit")
    common.only(keys, num_key_value_heads=1, attention_bias=False, mlp_bias=False)
    hidden, num_layers = keys.integer("hidden_size"), keys.layers()
    num_mtp = keys.integer("num_nextn_predict_layers", 0, low=0, high=64)
    streams = keys.integer("hc_mult")
    hashed = keys.integer("num_hash_layers", 3, low=0)
    mlp_kinds = common.layer_types(
        keys, num_layers, MLP_KINDS, lambda index: MLP_KINDS[index < hashed], key="mlp_layer_types"
    )

    def make(kind: tuple[int, str]) -> Layer:
        return Layer(
            mixers=(_attention(keys, kind[0]),),
            ffns=(_experts(keys, hashed=kind[1] == "hash_moe"),),
            norms=common.norms(hidden, "attn_norm", "ffn_norm"),
            residual=HyperConnections(num_streams=streams),
        )

    ratios = _ratios(keys, num_layers, num_mtp)
    head = _stream_head(streams, hidden)
    modules = tuple(_mtp(make((0, "moe")), hidden, head, index) for index in range(num_mtp))
    return common.decoder(
        keys,
        hidden,
        common.by_kind(zip(ratios, mlp_kinds, strict=True), make),
        mtp=modules,
        extras=head,
        embedding_name="embed",
        layers_name="layers",
        head_name="head",
        norm_name="norm",
    )


def _ratios(keys: Keys, num_layers: int, num_mtp: int) -> list[int]:
    """Tokens per compressed entry, per layer: ``compress_ratios`` (MTP layers may follow), else ``layer_types``."""
    rates = dict(RATES)
    part = keys.part("compress_rates")
    if part is not None:
        rates |= {kind: part.integer(kind, rates[kind]) for kind in (SPARSE, HEAVY)}
    ratios: list[int] | None = keys.integers("compress_ratios", None)
    if ratios is None:
        kinds = common.layer_types(keys, num_layers, rates, lambda index: SPARSE if index > 1 and index % 2 else HEAVY)
        return [rates[kind] for kind in kinds]
    if len(ratios) != num_layers + num_mtp:
        keys.integers("compress_ratios", length=num_layers)
    return ratios[:num_layers]


def _attention(keys: Keys, ratio: int) -> CompressedAttention:
    rope = keys.integer("qk_rope_head_dim")
    indexer = Indexer(
        num_heads=keys.integer("index_n_heads"),
        head_dim=keys.integer("index_head_dim"),
        top_k=keys.integer("index_topk"),
        rope_head_dim=rope,
        key_norm="rms",
    )
    heads, dim, groups = keys.integer("num_attention_heads"), keys.integer("head_dim"), keys.integer("o_groups")
    if heads % groups or rope > dim:
        raise InputError(
            _("num_attention_heads, o_groups, head_dim and qk_rope_head_dim do not fit together"), where=keys.where
        )
    sparse = ratio == RATES[SPARSE]
    return CompressedAttention(
        num_heads=heads,
        head_dim=dim,
        qk_rope_head_dim=rope,
        q_lora_rank=keys.integer("q_lora_rank"),
        o_groups=groups,
        o_lora_rank=keys.integer("o_lora_rank"),
        window=keys.integer("sliding_window"),
        compress_ratio=ratio,
        overlap=sparse,
        indexer=indexer if sparse else None,
    )


def _num_shared(keys: Keys) -> int:
    """Take the number of shared experts. The class builds one whatever the key says, the reference code as many.

    Source: transformers@5.23.0:models/deepseek_v4/modeling_deepseek_v4.py:DeepseekV4MoE.
    """
    common.only(keys, n_shared_experts=1)
    return int(keys.integer("n_shared_experts", 0, low=0))


def _experts(keys: Keys, *, hashed: bool) -> MoEFFN:
    width = keys.integer("moe_intermediate_size")
    top_k, vocab = keys.integer("num_experts_per_tok"), keys.integer("vocab_size")
    table = ExtraTensor(name="gate.tid2eid", shape=(vocab, top_k), dtype="int64", buffer=True, linear=False)
    return common.moe(
        keys,
        shared_intermediate_size=width * _num_shared(keys),
        correction_bias=not hashed,
        correction_bias_name="gate.bias",
        hash_routed=hashed,
        prefix="ffn",
        gate_name="w1",
        up_name="w3",
        down_name="w2",
        extras=(table,) if hashed else (),
    )


def _stream_head(streams: int, hidden: int) -> tuple[ExtraTensor, ...]:
    """The map that joins the residual streams before the head: fn (m, m*H), base (m), scale (1), in float32."""
    shapes = {"fn": (streams, streams * hidden), "base": (streams,), "scale": (1,)}
    return tuple(
        ExtraTensor(name=f"hc_head_{name}", shape=shape, dtype="float32", linear=False)
        for name, shape in shapes.items()
    )


def _mtp(layer: Layer, hidden: int, head: tuple[ExtraTensor, ...], index: int) -> MtpModule:
    """One MTP module: a window-only layer, projections of embedding and hidden state, and a stream head of its own."""
    projections = tuple(ExtraTensor(name=f"{name}.weight", shape=(hidden, hidden)) for name in ("e_proj", "h_proj"))
    return MtpModule(
        layer=layer,
        norms=common.norms(hidden, "enorm", "hnorm", "norm"),
        extras=projections + head,
        prefix=f"mtp.{index}.",
    )
