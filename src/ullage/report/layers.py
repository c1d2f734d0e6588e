"""A model's layers in words: one line per kind, with the numbers that decide its memory."""

from __future__ import annotations

from ullage.spec import model as spec


def layer_text(layer: spec.Layer) -> str:
    """Return ``MLA 128 heads, latent 512 + 64 · MoE 256 experts, 8 per token, 2,048 wide``."""
    return " · ".join([mixer_text(mixer) for mixer in layer.mixers] + [ffn_text(block) for block in layer.ffns])


def mixer_text(part: spec.Mixer) -> str:
    """Return a mixer with the sizes that its cache goes by."""
    if isinstance(part, spec.Attention):
        return _attention_text(part)
    if isinstance(part, spec.LatentAttention):
        latent = f"MLA {part.num_heads} heads, latent {part.kv_lora_rank} + {part.qk_rope_head_dim}"
        if part.indexer is None:
            return latent + (", sparse with the choice of an earlier layer" if part.shared_indexer else "")
        return f"{latent}, sparse top {part.indexer.top_k:,}"
    if isinstance(part, spec.CompressedAttention):
        ratio = f", compressed {part.compress_ratio} to 1" if part.compress_ratio else ""
        top = f", sparse top {part.indexer.top_k:,}" if part.indexer else ""
        return f"V4 attention {part.num_heads} heads x {part.head_dim}, window {part.window}{ratio}{top}"
    heads = getattr(part, "num_heads", None) or getattr(part, "num_v_heads", None)
    return type(part).__name__ + (f" {heads} heads" if heads else "")


def _attention_text(part: spec.Attention) -> str:
    kind = "MHA" if part.num_kv_heads == part.num_heads else "MQA" if part.num_kv_heads == 1 else "GQA"
    text = f"{kind} {part.num_heads}/{part.num_kv_heads} heads x {part.head_dim}"
    for name, value in (("window", part.window), ("chunk", part.chunk)):
        text += f", {name} {value:,}" if value else ""
    return text + (", cross" if part.cross else "") + (", shared KV" if part.shared_kv else "")


def ffn_text(part: spec.FeedForward) -> str:
    """Return a feed-forward block with its sizes."""
    if isinstance(part, spec.DenseFFN):
        return f"FFN {part.intermediate_size:,}"
    shared = f", shared {part.shared_intermediate_size:,}" if part.shared_intermediate_size else ""
    hashed = ", hash-routed" if part.hash_routed else ""
    return f"MoE {part.num_experts} experts x {part.intermediate_size:,}, {part.top_k} per token{shared}{hashed}"


def kinds_of_layers(model: spec.Model) -> list[tuple[int, str]]:
    """Return (how many, what) per kind of layer that differs in words, in order of first appearance."""
    counts: dict[str, int] = {}
    words: dict[int, str] = {}
    for layer in model.layers:
        text = words.setdefault(id(layer), layer_text(layer))
        counts[text] = counts.get(text, 0) + 1
    return [(count, text) for text, count in counts.items()]
