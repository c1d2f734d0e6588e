"""The tensors of the attention kinds.

Legend: H hidden_size, N num_heads, K num_kv_heads, D head_dim, Dv v_head_dim.
"""

from __future__ import annotations

from ullage.account.parameters.parameter import Parameter, Role, linear_parameters, norm_parameters, of_extra
from ullage.spec import model as spec


def attention(part: spec.Attention, hidden_size: int) -> list[Parameter]:
    """Tensors of multi-head, grouped-query or multi-query attention.

    Formula: q: (N*D*g, H) with g = 2 for a gated output; k: (K*D, H); v: (K*Dv, H); o: (H, N*Dv); biases as flagged.
    Source: transformers@5.23.0:models/llama/modeling_llama.py:LlamaAttention (and its kin per family).
    """
    heads, kv_heads, dim = part.num_heads, part.num_kv_heads, part.head_dim
    v_dim = part.v_head_dim or dim
    q_rows = heads * dim * (2 if part.output_gate else 1)
    at = f"{part.prefix}."
    if part.fused_qkv:
        rows = q_rows + kv_heads * (dim + v_dim)
        found = linear_parameters(at + part.fused_qkv, rows, hidden_size, bias=part.q_bias, split="out")
    else:
        found = linear_parameters(at + part.q_name, q_rows, hidden_size, bias=part.q_bias, split="out", units=heads)
        if not part.shared_kv:
            found += linear_parameters(
                at + part.k_name, kv_heads * dim, hidden_size, bias=part.k_bias, split="out", units=kv_heads
            )
            if not part.value_is_key:
                found += linear_parameters(
                    at + part.v_name, kv_heads * v_dim, hidden_size, bias=part.v_bias, split="out", units=kv_heads
                )
    found += linear_parameters(at + part.o_name, hidden_size, heads * v_dim, bias=part.o_bias, split="in")
    if part.qk_norm:
        full = part.qk_norm == "full"
        sizes = {part.q_norm_name: heads * dim if full else dim}
        if not part.shared_kv:
            sizes[part.k_norm_name] = kv_heads * dim if full else dim
        for name, size in sizes.items():
            found += norm_parameters(spec.Norm(name=at + name, size=size, kind=part.qk_norm_kind))
    if part.sinks:
        found.append(Parameter(name=at + part.sinks_name, shape=(heads,), role=Role.OTHER, split="out", units=heads))
    return found + [of_extra(extra, at) for extra in part.extras]


def latent_attention(part: spec.LatentAttention, hidden_size: int) -> list[Parameter]:
    """Tensors of multi-head latent attention, with the indexer of DeepSeek sparse attention if it has one.

    Formula: q_a (rq, H), q_b (N*(Dn+Dr), rq) or q (N*(Dn+Dr), H); kv_a (rkv+Dr, H); kv_b (N*(Dn+Dv), rkv);
        o (H, N*Dv); norms of the latents.
    Symbols: rq q_lora_rank, rkv kv_lora_rank, Dn qk_nope_head_dim, Dr qk_rope_head_dim.
    Source: arXiv:2405.04434 eq. 9-19; transformers@5.23.0:models/deepseek_v3/modeling_deepseek_v3.py.
    """
    at, heads = f"{part.prefix}.", part.num_heads
    q_rows = heads * (part.qk_nope_head_dim + part.qk_rope_head_dim)
    if part.q_lora_rank is None:
        found = linear_parameters(at + "q_proj", q_rows, hidden_size, split="out", units=heads)
    else:
        found = linear_parameters(at + "q_a_proj", part.q_lora_rank, hidden_size, bias=part.bias)
        found += norm_parameters(spec.Norm(name=at + "q_a_layernorm", size=part.q_lora_rank))
        found += linear_parameters(at + "q_b_proj", q_rows, part.q_lora_rank, split="out", units=heads)
    found += linear_parameters(
        at + "kv_a_proj_with_mqa", part.kv_lora_rank + part.qk_rope_head_dim, hidden_size, bias=part.bias
    )
    found += norm_parameters(spec.Norm(name=at + "kv_a_layernorm", size=part.kv_lora_rank))
    found += linear_parameters(
        at + "kv_b_proj", heads * (part.qk_nope_head_dim + part.v_head_dim), part.kv_lora_rank, split="out", units=heads
    )
    found += linear_parameters(at + "o_proj", hidden_size, heads * part.v_head_dim, bias=part.bias, split="in")
    if part.indexer is not None:
        found += _indexer(part.indexer, at + "indexer.", hidden_size, part.q_lora_rank or hidden_size)
    return found + [of_extra(extra, at) for extra in part.extras]


def _indexer(part: spec.Indexer, at: str, hidden_size: int, query_size: int) -> list[Parameter]:
    """Tensors of the lightning indexer: wq_b (n*d, rq), wk (d, H), k_norm (d, with bias), weights_proj (n, H).

    Source: DeepSeek-V3.2-Exp inference/model.py:Indexer; replicated over tensor-parallel ranks in vLLM and SGLang.
    """
    found = linear_parameters(at + "wq_b", part.num_heads * part.head_dim, query_size)
    found += linear_parameters(at + "wk", part.head_dim, hidden_size)
    found += norm_parameters(
        spec.Norm(name=at + "k_norm", size=part.head_dim, kind=part.key_norm, bias=part.key_norm == "layer")
    )
    return found + linear_parameters(at + "weights_proj", part.num_heads, hidden_size)


def compressed_attention(part: spec.CompressedAttention, hidden_size: int) -> list[Parameter]:
    """Tensors of DeepSeek-V4's compressed attention, under the names of its checkpoint.

    Formula: wq_a (rq, H), wq_b (N*D, rq); wkv (D, H); wo_a (g*ro, N*D/g), wo_b (H, g*ro); attn_sink (N); norms of rq
        and D; the compressor of D over m tokens; an indexer with a compressor of its own head_dim.
    Symbols: rq q_lora_rank, g o_groups, ro o_lora_rank, m compress_ratio.
    Source: transformers@5.23.0:models/deepseek_v4/modeling_deepseek_v4.py:DeepseekV4Attention; split and replicated
        tensors: vllm@0.33.0:models/deepseek_v4/attention.py:DeepseekV4Attention. vLLM pads the sinks to the heads its
        kernel works on, a few hundred bytes more.
    """
    at, heads, dim = f"{part.prefix}.", part.num_heads, part.head_dim
    groups, rank = part.o_groups, part.o_lora_rank
    found = [
        Parameter(name=at + "attn_sink", shape=(heads,), role=Role.OTHER, split="out", units=heads, dtype="float32")
    ]
    found += linear_parameters(at + "wq_a", part.q_lora_rank, hidden_size)
    found += norm_parameters(spec.Norm(name=at + "q_norm", size=part.q_lora_rank))
    found += linear_parameters(at + "wq_b", heads * dim, part.q_lora_rank, split="out", units=heads)
    found += linear_parameters(at + "wkv", dim, hidden_size)
    found += norm_parameters(spec.Norm(name=at + "kv_norm", size=dim))
    found += linear_parameters(at + "wo_a", groups * rank, heads * dim // groups, split="out", units=groups)
    found += linear_parameters(at + "wo_b", hidden_size, groups * rank, split="in")
    if part.compress_ratio:
        found += _compressor(part, dim, at + "compressor.", hidden_size)
    if part.indexer is not None:
        index = part.indexer
        found += linear_parameters(at + "indexer.wq_b", index.num_heads * index.head_dim, part.q_lora_rank)
        found += linear_parameters(at + "indexer.weights_proj", index.num_heads, hidden_size)
        found += _compressor(part, index.head_dim, at + "indexer.compressor.", hidden_size)
    return found + [of_extra(extra, at) for extra in part.extras]


def _compressor(part: spec.CompressedAttention, head_dim: int, at: str, hidden_size: int) -> list[Parameter]:
    """Tensors that compress entries of ``head_dim``: wkv and wgate (c*d, H), position bias ape (m, c*d), norm (d).

    Symbols: c 2 where windows overlap, else 1; m compress_ratio; d head_dim.
    Source: transformers@5.23.0:models/deepseek_v4/modeling_deepseek_v4.py:DeepseekV4CSACompressor; replicated:
        vllm@0.33.0:models/deepseek_v4/compressor.py:DeepseekCompressor.
    """
    width = head_dim * (2 if part.overlap else 1)
    ape = Parameter(name=at + "ape", shape=(part.compress_ratio, width), role=Role.OTHER, dtype="float32")
    found = [
        ape,
        *linear_parameters(at + "wkv", width, hidden_size),
        *linear_parameters(at + "wgate", width, hidden_size),
    ]
    return found + norm_parameters(spec.Norm(name=at + "norm", size=head_dim))
