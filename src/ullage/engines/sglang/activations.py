"""What a prefill chunk needs at its peak: the part that must fit beside the pool, in the slack."""

from __future__ import annotations

from ullage.engines.sglang.defaults import Settings
from ullage.ledger import Term, ranged
from ullage.spec import model as spec

_BYTES = 2  # bf16 and fp16 alike
_LOW, _HIGH = 0.5, 2.5


def activation_term(settings: Settings, layers: tuple[spec.Layer, ...]) -> Term:
    """Return the peak of one chunk's forward pass, with the logits of the largest decode batch.

    Formula: 2 x (Ta (2 H + widest attention) or Tf (2 H + widest feed-forward), the larger) + 4 b V.
    Symbols: Ta tokens of a chunk on an attention rank, Tf the same over all attention ranks (they are gathered for the
        feed-forward), H hidden_size, b largest decode batch, V vocab_size; attention N (2 Dqk + 2 Dv) / t values,
        dense 3 I / t, experts k (3 Im + H) / (t or EP ranks).
    Source: sglang@0.5.23:srt/layers/moe/fused_moe_triton/fused_moe.py:fused_experts_impl (its caches);
        SGLang's own rule for the same amount is 1.5 MiB per token of the chunk (see fraction).
    Known error: a factor of two either way: kernels with workspaces, fused kernels, all-to-all buffers; the range.
    """
    model, tokens = settings.job.model, settings.chunk
    attention_tokens = -(-tokens // settings.attention_dp)
    attention = max((_attention(mixer, settings.attention_tp) for layer in layers for mixer in layer.mixers), default=0)
    ffn = max((_ffn(block, settings, model.hidden_size) for layer in layers for block in layer.ffns), default=0)
    peak = max(attention_tokens * (2 * model.hidden_size + attention), tokens * (2 * model.hidden_size + ffn)) * _BYTES
    logits = 4 * min(settings.graph_max, 512) * model.vocab_size
    return ranged(
        "activations",
        peak + logits,
        low=int(_LOW * peak),
        high=int(_HIGH * peak) + 2 * logits,
        formula=f"2 x {tokens:,} tokens x widest layer + logits",
        source="ullage: engines/sglang/activations.py",
    )


def _attention(part: spec.Mixer, tp: int) -> int:
    if isinstance(part, spec.Attention):
        values = part.v_head_dim or part.head_dim
        return (part.num_heads + part.num_kv_heads) * (part.head_dim + values) // tp
    if isinstance(part, spec.LatentAttention):
        width = part.qk_nope_head_dim + part.qk_rope_head_dim + part.v_head_dim
        return 2 * part.num_heads * width // tp
    if isinstance(part, spec.CompressedAttention):
        return 2 * part.num_heads * part.head_dim // tp
    return 0


def _ffn(part: spec.FeedForward, settings: Settings, hidden_size: int) -> int:
    if isinstance(part, spec.DenseFFN):
        return 3 * part.intermediate_size // settings.tp
    width = 3 * part.intermediate_size // (settings.tp // settings.expert_ranks) + hidden_size
    return part.top_k * width // settings.expert_ranks + 3 * part.shared_intermediate_size // settings.tp
