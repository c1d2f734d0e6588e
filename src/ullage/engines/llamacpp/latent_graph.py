"""The graph of multi-head latent attention, in each of the forms that the engines have.

Source: ik_llama.cpp@58f08e43:src/llama.cpp:build_deepseek2; llama.cpp@b5400:src/llama-model.cpp:llm_build_deepseek2.
"""

from __future__ import annotations

from ullage.engines.llamacpp.nodes import F16, F32, Builder
from ullage.engines.llamacpp.schedule import Node
from ullage.spec.model import LatentAttention

#: mainline's form: queries absorbed into the latent space, always
ABSORBED = 4


def latent_attention(part: LatentAttention, hidden: int, current: Node, build: Builder, mask: Node) -> Node:
    """Multi-head latent attention over the cache.

    ``latent_mode`` 2 and 3 with flash attention expand keys and values of the whole cache for each large batch; all
    head groups are expanded before the first is used, so their keys and values live together.
    """
    num, heads = build.settings.num_tokens, part.num_heads
    query = current
    if part.q_lora_rank is not None:
        size = part.q_lora_rank * num * F32
        query = build.norm(build.op("q_a", size, current), size)
    query_dim = part.qk_nope_head_dim + part.qk_rope_head_dim
    query = build.op("q", heads * query_dim * num * F32, query)
    plain = build.view(query, heads * part.qk_nope_head_dim * num * F32)
    turned = build.view(query, heads * part.qk_rope_head_dim * num * F32)
    turned = build.op("rope", turned.size, turned, build.positions)
    latent_size = part.kv_lora_rank * num * F32
    latent = build.op("kv_a", latent_size + part.qk_rope_head_dim * num * F32, current)
    rope_size = part.qk_rope_head_dim * num * F32
    key_rope = build.op("rope", rope_size, build.view(latent, rope_size), build.positions)
    compressed = build.norm(build.view(latent, latent_size), latent_size)
    mode = build.settings.latent_mode
    if mode == 0:
        mixed = _expanded(part, plain, turned, compressed, key_rope, build, mask)
    else:
        if mode == 1 and not build.settings.flash_attention:
            build.store(build.view(compressed))
        build.store(build.op("kv row", latent_size + rope_size, key_rope, compressed))
        if mode in (2, 3) and build.settings.flash_attention and num >= 128:
            mixed = _expanded_by_groups(part, plain, turned, build, mask)
        else:
            mixed = _absorbed(part, plain, turned, build, mask)
    build.graph.expand(mixed)
    return build.op("projection", hidden * num * F32, mixed)


def head_group(part: LatentAttention, num_kv: int, limit_mib: int, *, one_by_one: bool = False) -> int:
    """Return the heads expanded at a time under ``-amb``.

    Formula: M = n_kv x N x (Dn + Dv) x 4 bytes in MiB. Together: N halved while M x heads / N exceeds the limit. One by
        one (since January 2026): N / k for the smallest k >= 2 that divides N with M / (N / k) within the limit.
    Source: ik_llama.cpp@58f08e43:src/llama.cpp:build_deepseek2; @b85a2a50:src/llama-build-context.cpp.
    """
    heads = part.num_heads
    mib = heads * (part.qk_nope_head_dim + part.v_head_dim) * num_kv * F32 // 2**20
    if one_by_one:
        if not limit_mib or mib <= limit_mib:
            return heads
        fitting = (k for k in range(2, heads) if heads % k == 0 and mib // (heads // k) <= limit_mib)
        return heads // next(fitting, heads)
    while limit_mib and heads % 2 == 0 and mib > limit_mib:
        heads, mib = heads // 2, mib // 2
    return heads


def _expanded_by_groups(part: LatentAttention, plain: Node, turned: Node, build: Builder, mask: Node) -> Node:
    num, num_kv = build.settings.num_tokens, build.settings.num_kv
    one_by_one = build.settings.groups_one_by_one
    heads = head_group(part, num_kv, build.settings.attention_max_mib, one_by_one=one_by_one)
    each = build.settings.cache_bytes_per_value if build.settings.host_only else F16
    key_rope = build.cache
    rope = part.qk_rope_head_dim
    if each == F16 and build.settings.cache_bytes_per_value != F16:
        key_rope = build.op("rope f16", rope * num_kv * F16, build.cache)
    key_rope = build.op("rope of heads", int(rope * num_kv * heads * each), key_rope)
    query = build.view(build.op("q", plain.size + turned.size, turned, plain))
    build.graph.expand(query)
    mixed: Node | None = None
    groups = part.num_heads // heads
    out = part.v_head_dim * heads * num * F32
    for _ in range(groups):
        both = build.op("kv f32", heads * (part.qk_nope_head_dim + part.v_head_dim) * num_kv * F32, build.cache)
        value = build.op("v", int(part.v_head_dim * num_kv * heads * each), build.view(both, 0))
        key = build.op("k nope", int(part.qk_nope_head_dim * num_kv * heads * each), build.view(both, 0))
        build.graph.expand(key)
        build.graph.expand(value)
        key = build.op("k", int((part.qk_nope_head_dim + rope) * num_kv * heads * each), key_rope, key)
        build.graph.expand(key)
        piece = build.view(build.op("flash attention", out, build.view(query, 0), key, value, mask))
        mixed = piece if mixed is None else build.op("concat", mixed.size + out, mixed, piece)
        if one_by_one:
            build.graph.expand(mixed)
    assert mixed is not None
    return mixed


def _absorbed(part: LatentAttention, plain: Node, turned: Node, build: Builder, mask: Node) -> Node:
    num, heads, num_kv = build.settings.num_tokens, part.num_heads, build.settings.num_kv
    rank = part.kv_lora_rank
    inner = build.op("q latent", heads * rank * num * F32, build.view(plain))
    query = build.op("q", inner.size + turned.size, build.view(turned), inner)
    latent = heads * rank * num * F32
    limit = build.settings.attention_max_mib
    if build.settings.flash_attention and build.settings.latent_mode != 2:
        mixed = build.view(build.op("flash attention", latent, query, build.cache, mask))
    else:
        values = build.cache
        if build.settings.latent_mode in (2, 3):
            values = build.op(
                "latent transposed", int(rank * num_kv * build.settings.cache_bytes_per_value), build.cache
            )
        scores_mib = heads * num_kv * num * F32 // 2**20
        steps = min(heads, -(-scores_mib // limit)) if limit and limit < scores_mib else 1
        per_step = -(-heads // steps)
        mixed = build.cache
        for first in range(0, heads, per_step):
            count = min(per_step, heads - first)
            scores = build.op("scores", count * num_kv * num * F32, build.cache, build.view(query, 0))
            scores = build.op("softmax", scores.size, scores, mask, inplace=True)
            piece = build.op("weighted", count * rank * num * F32, values, scores)
            mixed = piece if first == 0 else build.op("concat", mixed.size + piece.size, mixed, piece)
            if steps > 1:
                build.graph.expand(mixed)
    out = build.op("values", heads * part.v_head_dim * num * F32, mixed)
    return build.view(build.op("merge", out.size, build.view(out)))


def _expanded(
    part: LatentAttention, plain: Node, turned: Node, compressed: Node, key_rope: Node, build: Builder, mask: Node
) -> Node:
    """The form without a latent cache: keys and values of every head are stored."""
    num, heads, num_kv = build.settings.num_tokens, part.num_heads, build.settings.num_kv
    both = build.op("kv", heads * (part.qk_nope_head_dim + part.v_head_dim) * num * F32, compressed)
    value = build.op("v", heads * part.v_head_dim * num * F32, build.view(both, 0))
    query = build.op("q", plain.size + turned.size, plain, turned)
    repeated = build.op("rope of heads", turned.size, key_rope)
    key = build.op("k", query.size, build.view(both, 0), repeated)
    for item in (query, key, build.view(value)):
        build.graph.expand(item)
    build.store(key)
    build.store(value)
    out = heads * part.v_head_dim * num * F32
    if build.settings.flash_attention:
        return build.view(build.op("flash attention", out, build.view(query), build.cache, mask))
    scores = build.op("scores", heads * num_kv * num * F32, build.cache, build.view(query))
    scores = build.op("softmax", scores.size, scores, mask, inplace=True)
    return build.op("merge", out, build.view(build.op("weighted", out, build.cache, scores)))
