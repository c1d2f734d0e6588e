"""Memory from the start of the process to the end of loading: context, communication, weights.

``mem usage`` of the line "Load weight end" is the difference of the driver's free memory before and after loading, so
it holds the copies made after loading, the allocator's segments and the modules that the first kernels load.
"""

from __future__ import annotations

from dataclasses import replace

from ullage.account.sharding import RankShare, whole
from ullage.account.weights import weights_term
from ullage.engines.sglang import graphs, segments
from ullage.engines.sglang.defaults import Settings
from ullage.engines.sglang.layout import Stage, absorbed_bytes
from ullage.engines.sglang.precision import held_quantization
from ullage.frozen import Frozen
from ullage.ledger import Term, exact, ranged
from ullage.spec import model as spec
from ullage.units import MiB


class Loaded(Frozen):
    """What a rank holds after loading. ``draft``: weights of the draft model, loaded before or after the pool."""

    weights: Term
    absorbed: Term
    rope: Term
    rounding: Term
    modules: Term
    draft: Term

    def usage(self) -> tuple[int, int, int]:
        """Return the ``mem usage`` of loading: (bytes, low, high)."""
        parts = (self.weights, self.absorbed, self.rope, self.rounding, self.modules)
        return sum(p.bytes for p in parts), sum(p.low_bytes for p in parts), sum(p.high_bytes for p in parts)


def load(settings: Settings, stage: Stage) -> Loaded:
    """Return what loading leaves on a rank of ``stage``.

    Raises:
        LayoutError: an axis does not divide.
    """
    model, share = settings.job.model, replace(stage.share, mtp=False)
    rules = held_quantization(settings.job)
    weights = weights_term(model, share, quantization=rules, dtype=settings.model_dtype)
    offloaded = min(settings.job.cpu_offload_bytes, weights.bytes)
    if offloaded:
        weights = exact("weights", weights.bytes - offloaded, formula=f"{weights.bytes} - {offloaded} kept on the host")
    absorbed = absorbed_bytes(model, share)
    sizes = segments.weight_sizes(model, share, settings.model_dtype, rules)
    rounding = 0 if offloaded else segments.rounding_of(sizes)
    rope = rope_bytes(model, settings.context)
    value, low, high = graphs.runtime("kernel_modules")
    return Loaded(
        weights=weights,
        absorbed=exact(
            "absorbed_projections",
            absorbed,
            formula="kv_b_proj once more in bf16 (w_kc, w_vc)",
            source="sglang@0.5.23:srt/models/deepseek_common/deepseek_weight_loader.py:post_load_weights",
        ),
        rope=exact(
            "rope_cache", rope, formula="positions x rotary size x 4", source="sglang:srt/layers/rotary_embedding"
        ),
        rounding=ranged(
            "weight_segments",
            rounding,
            low=rounding // 2,
            high=rounding * 3 // 2 + 64 * MiB,
            formula="segments of the caching allocator beyond the tensors",
            source="pytorch@2.8:c10/cuda/CUDACachingAllocator.cpp",
        ),
        modules=ranged("kernel_modules", value, low=low, high=high, source="catalog/engines/sglang.json:runtime"),
        draft=_draft(settings, stage),
    )


def rope_bytes(model: spec.Model, context: int) -> int:
    """Return the rotary table: one for each distinct rotary size, fp32, over the model's positions.

    Formula: P x d x 4.
    Symbols: P max(max_position_embeddings, context), d rotary size.
    Source: sglang@0.5.23:srt/layers/rotary_embedding: RotaryEmbedding._compute_cos_sin_cache (shared by get_rope).
    """
    dims: set[int] = set()
    for layer in model.layers:
        for mixer in layer.mixers:
            if isinstance(mixer, spec.Attention):
                dims.add(mixer.rotary_dim or mixer.head_dim)
            elif isinstance(mixer, (spec.LatentAttention, spec.CompressedAttention)):
                dims.add(mixer.qk_rope_head_dim)
    return sum(dims) * max(model.max_position_embeddings, context) * 4


def _draft(settings: Settings, stage: Stage) -> Term:
    """Return the draft's weights on this stage: the model's own MTP layers, or a model of its own.

    Embedding and head of an MTP draft are the target's. A draft model of its own is sliced like the target.
    Source: sglang@0.5.23:srt/models/deepseek_nextn.py:set_embed_and_head; srt/speculative/eagle_worker.py.
    """
    model = settings.job.model
    if settings.draft_tokens == 0:
        return exact("draft_weights", 0)
    if settings.job.draft_model is not None and stage.share.head:
        draft = settings.job.draft_model
        share = replace(whole(draft), attention_tp=settings.attention_tp, dense_tp=settings.tp, vocab_padding=64)
        return replace(weights_term(draft, share), name="draft_weights")
    if not stage.share.mtp or not model.mtp:
        return exact("draft_weights", 0)
    rules = held_quantization(settings.job)
    num_bytes = _mtp_bytes(model, stage.share, rules, settings.model_dtype)
    return exact("draft_weights", num_bytes, formula="the first MTP layer, with its absorbed projections")


def _mtp_bytes(model: spec.Model, share: RankShare, rules: spec.Quantization | None, dtype: str) -> int:
    """Bytes of the MTP modules alone."""
    with_mtp = weights_term(model, replace(share, mtp=True), quantization=rules, dtype=dtype)
    mtp = sum(child.bytes for child in with_mtp.children if child.name == "mtp")
    return mtp + absorbed_bytes(model, replace(share, mtp=True)) - absorbed_bytes(model, replace(share, mtp=False))
