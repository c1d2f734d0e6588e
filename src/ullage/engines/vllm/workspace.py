"""Buffers of sparse attention that stay: what is reserved while the model is built, and what profiling adds to it.

One workspace serves all layers and grows to the largest request. What is reserved when the attention layers are built
stands in the weights' figure ("Model loading took"); what the profiling run reserves stands in the activation peak.
"""

from __future__ import annotations

from ullage.account import kv_cache
from ullage.engines.vllm.defaults import Setup
from ullage.engines.vllm.layout import Stage, loads_mtp
from ullage.ledger import Term, ranged
from ullage.spec import model as spec
from ullage.units import MiB, cdiv, dtype_bytes, round_up

#: Rows of the prefill workspace, and of gathered index keys, for each token of max_model_len.
PREFILL_ROWS, INDEX_ROWS = 5, 40
#: Requests whose keys V4's prefill gathers at once.
GATHERED_REQUESTS = 4
#: Logits of the indexer in the profiling run, MiB (VLLM_SPARSE_INDEXER_MAX_LOGITS_MB).
INDEX_LOGITS_BYTES = 512 * MiB


def _sparse(setup: Setup, stage: Stage) -> list[spec.LatentAttention | spec.CompressedAttention]:
    """Return the stage's mixers that choose tokens by an indexer."""
    found = {id(mixer): mixer for layer in setup.job.model.layers[slice(*stage.share.layers)] for mixer in layer.mixers}
    kinds = (spec.LatentAttention, spec.CompressedAttention)
    return [mixer for mixer in found.values() if isinstance(mixer, kinds) and mixer.indexer is not None]


def _length(setup: Setup) -> int:
    return setup.job.max_model_len or 1


def attention_bytes(setup: Setup, stage: Stage) -> int:
    """Return the workspace that sparse latent attention (V3.2) reserves when it is built.

    Formula: packed cache, from 0.13: 5 L x (r + d) x 2; from 0.18 also queries T x N x (r + d) x 2; from 0.32 also
        padded queries and outputs T x (P (r + d) + P r + N r) x 2. A plain cache: the queries alone.
    Symbols: L max_model_len, T max_num_batched_tokens, r kv_lora_rank, d rope width, N heads of the rank, P N padded
        to 64.
    Source: vllm@0.13.0, vllm@0.18.0, vllm@0.32.0:vllm/v1/attention/backends/mla/flashmla_sparse.py:FlashMLASparseImpl,
        get_prefill_workspace_size.
    """
    rule = str(setup.version.setting("sparse_mla_workspace"))
    latent = next((one for one in _sparse(setup, stage) if isinstance(one, spec.LatentAttention)), None)
    if latent is None or rule == "none":
        return 0
    row, heads = latent.kv_lora_rank + latent.qk_rope_head_dim, cdiv(latent.num_heads, stage.share.attention_tp)
    found = setup.tokens * heads * row * 2 if rule != "prefill" else 0
    if not (setup.job.kv_cache_dtype or "").endswith("_ds_mla"):
        return found
    found += PREFILL_ROWS * _length(setup) * row * 2
    if rule == "prefill_queries_outputs":
        padded = round_up(heads, 64)
        found += setup.tokens * (padded * (row + latent.kv_lora_rank) + heads * latent.kv_lora_rank) * 2
    return found


def choice_bytes(setup: Setup, stage: Stage) -> int:
    """Return the buffer of chosen tokens that all indexers share: T x top_k x 4.

    Source: vllm@0.11.0:vllm/model_executor/models/deepseek_v2.py:DeepseekV2Model (topk_indices_buffer);
        vllm@0.33.0:vllm/models/deepseek_v4/nvidia/model.py.
    """
    return max((setup.tokens * one.indexer.top_k * 4 for one in _sparse(setup, stage) if one.indexer), default=0)


def stream_bytes(setup: Setup, stage: Stage) -> int:
    """Return V4's buffer of residual streams for a draft: T x streams x H x e, kept without a draft too up to 0.26.

    Source: vllm@0.25.0, vllm@0.27.0:vllm/models/deepseek_v4/nvidia/model.py (_mtp_hidden_buffer).
    """
    residual = setup.job.model.layers[-1].residual
    if residual is None or not stage.last or not (loads_mtp(setup) or setup.version.setting("v4_stream_buffer")):
        return 0
    element = int(dtype_bytes(setup.job.weights_dtype or setup.job.model.dtype))
    return setup.tokens * residual.num_streams * setup.job.model.hidden_size * element


def at_load(setup: Setup, stage: Stage) -> Term:
    """Return the buffers that the weights' figure counts."""
    attention, rest = attention_bytes(setup, stage), choice_bytes(setup, stage) + stream_bytes(setup, stage)
    return ranged(
        "sparse_attention_buffers",
        attention + rest,
        low=rest,  # other attention backends reserve less
        high=attention + rest,
        formula=f"workspace {attention / MiB:,.0f} MiB + choices and streams of {setup.tokens:,} tokens",
        source="vllm@0.33.0:vllm/v1/attention/backends/mla/flashmla_sparse.py:FlashMLASparseImpl",
    )


def at_profile(setup: Setup, stage: Stage) -> int:
    """Return what the profiling run adds to the workspace.

    Formula: max(index keys 40 L / m x row, V4's gathered keys 4 x (ceil(L / m) + window + T) x D x 2) beyond what is
        reserved; m tokens to an entry (1 for V3.2).
    Source: vllm@0.13.0:vllm/v1/attention/backends/mla/indexer.py:get_max_prefill_buffer_size;
        vllm@0.25.0:vllm/models/deepseek_v4/nvidia/flashmla.py:forward_mqa, attention.py (max_total_seq_len).
    """
    wanted = 0
    for one in _sparse(setup, stage):
        ratio = one.compress_ratio if isinstance(one, spec.CompressedAttention) else 1
        if one.indexer is None or setup.version.setting("sparse_mla_workspace") == "none":
            continue
        row = int(kv_cache.indexer_row(one.indexer).row_bytes)
        wanted = max(wanted, INDEX_ROWS * _length(setup) // ratio * row)
        if isinstance(one, spec.CompressedAttention):
            entries = cdiv(_length(setup), ratio) + one.window + setup.tokens
            wanted = max(wanted, GATHERED_REQUESTS * entries * one.head_dim * 2)
    return max(0, wanted - attention_bytes(setup, stage))


def logits_bytes(setup: Setup, stage: Stage) -> int:
    """Return the indexer's logits that the profiling run stands in for, from 0.20 on.

    Source: vllm@0.25.0:vllm/model_executor/layers/sparse_attn_indexer.py:sparse_attn_indexer.
    """
    return INDEX_LOGITS_BYTES if _sparse(setup, stage) and setup.version.at_least("0.20.0") else 0
