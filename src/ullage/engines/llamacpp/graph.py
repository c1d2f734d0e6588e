"""The worst-case compute graph of a decoder, with the sizes of its tensors: the input of :mod:`.schedule`.

Source: ik_llama.cpp@58f08e43:src/llama.cpp:build_deepseek2, llm_build_kv, llm_build_kqv, llm_build_ffn,
llm_build_moe_ffn, llm_build_norm; llama.cpp@b5400:src/llama-graph.cpp:build_attn_mha, build_moe_ffn, build_norm.
Known error: one generic layer stands for every family; recurrent mixers are their projections and their output.
"""

from __future__ import annotations

from collections.abc import Callable

from ullage.engines.llamacpp.latent_graph import latent_attention
from ullage.engines.llamacpp.nodes import F16, F32, Builder, GraphSettings
from ullage.engines.llamacpp.schedule import HOST, Graph, Node
from ullage.frozen import Frozen
from ullage.spec.model import Attention, DenseFFN, LatentAttention, Layer, Model, MoEFFN
from ullage.units import round_up


class LayerPlace(Frozen):
    """Where a layer's parts are: ``experts`` HOST when its routed experts are in host memory.

    ``offload_bytes``: sizes of up, gate and down that are copied to device 0 for a large batch, None where the host
    computes them. ``dense_on_host``: the whole block's weights are on the host although the layer is on a device.
    ``host_weights``: (role, bytes) of a host layer's matrices, each copied to device 0 for its multiplication;
    ``host_cache``: bytes of keys and of values that follow them.
    """

    backend: int
    experts: int
    offload_bytes: tuple[int, int, int] | None = None
    dense_on_host: bool = False
    host_weights: tuple[tuple[str, int], ...] = ()
    host_cache: tuple[int, int] = (0, 0)


def decoder_graph(
    model: Model,
    settings: GraphSettings,
    places: tuple[LayerPlace, ...],
    output_backend: int,
    output_offload_bytes: int = 0,
) -> Graph:
    """Return the graph of one step of ``settings.num_tokens`` tokens with a full cache.

    ``output_offload_bytes``: of an output matrix on the host that is copied to device 0 for a large batch, 0 for none.
    """
    build = Builder(settings)
    tokens = build.input("tokens", settings.num_tokens * 4)
    stream = build.op("embedding", model.hidden_size * settings.num_tokens * F32, tokens, backend=HOST)
    build.positions = build.input("positions", settings.num_tokens * 4)
    masks = _masks(model, build)
    kept = _representatives(model, places)
    for index in kept:
        layer, place = model.layers[index], places[index]
        build.enter(place.backend, dict(place.host_weights), place.host_cache)
        stream = _layer(layer, model.hidden_size, stream, build, place, masks, last=index == len(model.layers) - 1)
    build.enter(output_backend, {}, (0, 0))
    stream = build.norm(stream, model.hidden_size * settings.num_outputs * F32)
    weight: tuple[Node, ...] = ()
    if output_offload_bytes:
        weight = (Node(name="host weight", size=output_offload_bytes, external=True, backend=HOST),)
    logits = build.op("logits", model.vocab_size * settings.num_outputs * F32, *weight, stream)
    logits.is_output = True
    build.graph.expand(logits)
    return build.graph


def _masks(model: Model, build: Builder) -> dict[int | None, Node]:
    """Return the attention masks by window: F32 from the host, cast to F16 for flash attention.

    Formula: n_kv x pad(n, 64) x 4, and half of that for the cast.
    """
    settings = build.settings
    masks: dict[int | None, Node] = {}
    for window in {getattr(part, "window", None) for layer in model.layers for part in layer.mixers}:
        num_kv = settings.window_kv if window and settings.window_kv else settings.num_kv
        elements = num_kv * round_up(settings.num_tokens, settings.mask_padding)
        mask = build.input("mask", elements * (F16 if settings.mask_f16 else F32))
        masks[window] = mask
    return masks


def _representatives(model: Model, places: tuple[LayerPlace, ...]) -> list[int]:
    """Return the layers that the graph needs: equal layers in a row repeat the same lifetimes, so a few stand for all.

    The first three and the last two of a run of equal layers in equal places are kept.
    """
    kept = []
    start = 0
    while start < len(places):
        end = start + 1
        while end < len(places) and model.layers[end] == model.layers[start] and places[end] == places[start]:
            end += 1
        run = list(range(start, end))
        kept += run if len(run) <= 5 else run[:3] + run[-2:]
        start = end
    return kept


def _layer(
    layer: Layer,
    hidden: int,
    stream: Node,
    build: Builder,
    place: LayerPlace,
    masks: dict[int | None, Node],
    *,
    last: bool,
) -> Node:
    """One decoder layer: mixer and feed-forward block, each with its norms and its residual."""
    num, post_norms = build.settings.num_tokens, len(layer.norms) > 2
    size = hidden * num * F32
    for mixer in layer.mixers:
        current = build.norm(stream, size)
        if isinstance(mixer, Attention):
            current = _attention(mixer, hidden, current, build, masks[mixer.window])
        elif isinstance(mixer, LatentAttention):
            current = latent_attention(mixer, hidden, current, build, _mask(build, masks[None]))
        else:
            current = build.op("mixer out", size, build.op("mixer in", 4 * size, current))
        if post_norms:
            current = build.norm(current, size)
        if last and mixer is layer.mixers[-1]:
            num = build.settings.num_outputs
            size = hidden * num * F32
            rows = build.input("output rows", num * 4)
            current = build.op("rows", size, current, rows)
            stream = build.op("rows", size, stream, rows)
        stream = build.op("residual", size, current, stream, inplace=True)
    for ffn in layer.ffns:
        current = build.norm(stream, size)
        block: Callable[..., Node] = _mixture if isinstance(ffn, MoEFFN) else _dense
        current = block(ffn, hidden, current, build, place, num)
        if post_norms:
            current = build.norm(current, size)
        stream = build.op("residual", size, current, stream, inplace=True)
    return stream


def _mask(build: Builder, mask: Node) -> Node:
    """The mask as attention reads it: cast once per graph for flash attention."""
    if not build.settings.flash_attention or build.settings.mask_f16:
        return mask
    if id(mask) not in build.casts:
        build.casts[id(mask)] = build.op("mask f16", mask.size // 2, mask)
    return build.casts[id(mask)]


def _attention(part: Attention, hidden: int, current: Node, build: Builder, mask: Node) -> Node:
    """Multi-head or grouped-query attention over the cache.

    Formula: without flash attention the scores take num_heads x n_kv x n x 4 bytes.
    """
    num = build.settings.num_tokens
    value_dim = part.v_head_dim or part.head_dim
    sizes = (
        part.num_heads * part.head_dim * num * F32,
        part.num_kv_heads * part.head_dim * num * F32,
        part.num_kv_heads * value_dim * num * F32,
    )
    if part.fused_qkv:
        whole = build.op("qkv", sum(sizes), current)
        query, key, value = (build.op("part", size, build.view(whole, size)) for size in sizes)
    else:
        roles = zip(("q", "k", "v"), sizes, strict=True)
        query, key, value = (build.op("projection", size, *build.weight(role), current) for role, size in roles)
        if part.q_bias:
            query, key, value = (build.op("bias", item.size, item, inplace=True) for item in (query, key, value))
    query, key = build.view(query), build.view(key)
    if part.qk_norm:
        query, key = build.norm(query, query.size), build.norm(key, key.size)
    query = build.op("rope", query.size, query, build.positions, inplace=True)
    key = build.op("rope", key.size, key, build.positions, inplace=True)
    for item in (query, key, value):
        build.graph.expand(item)
    build.store(key)
    build.store(value)
    mask = _mask(build, mask)
    out = part.num_heads * value_dim * num * F32
    if build.settings.flash_attention:
        mixed = build.view(build.op("flash attention", out, build.view(query), *build.cached(), mask))
    else:
        num_kv = build.settings.window_kv if part.window and build.settings.window_kv else build.settings.num_kv
        scores = build.op("scores", part.num_heads * num_kv * num * F32, build.cached()[0], build.view(query))
        scores = build.op("softmax", scores.size, scores, mask, inplace=True)
        mixed = build.op("merge", out, build.view(build.op("weighted values", out, build.cached()[-1], scores)))
    build.graph.expand(mixed)
    return build.op("projection", hidden * num * F32, *build.weight("output"), mixed)


def _dense(part: DenseFFN, hidden: int, current: Node, build: Builder, place: LayerPlace | None, num: int) -> Node:
    """A dense block: up, gate, their product, down."""
    inner = part.intermediate_size * num * F32
    backend = HOST if place is not None and place.dense_on_host else None
    if part.fused_gate_up:
        both = build.op("gate and up", 2 * inner, *build.weight("up"), current, backend=backend)
        product = build.halves_product(both, backend)
    else:
        up = build.op("up", inner, *build.weight("up"), current, backend=backend)
        product = up
        if part.gated:
            gate = build.op("gate", inner, *build.weight("gate"), current, backend=backend)
            product = build.product(gate, up, backend)
    return build.op("down", hidden * num * F32, *build.weight("down"), product, backend=backend)


def _mixture(part: MoEFFN, hidden: int, current: Node, build: Builder, place: LayerPlace, num: int) -> Node:
    """A mixture of experts: every token's ``top_k`` rows at once, then their weighted sum, then the shared expert."""
    scores = build.op("router", part.num_experts * num * F32, current)
    scores = build.op("probabilities", scores.size, scores, inplace=True)
    biased = build.op("biased", scores.size, scores) if part.correction_bias else scores
    order = build.op("sorted", scores.size, biased)
    chosen = build.view(order, part.top_k * num * 4)
    weights = build.op("weights", part.top_k * num * F32, build.view(scores), chosen)
    width = (part.latent_size or hidden) * part.top_k * num * F32
    inner = part.intermediate_size * part.top_k * num * F32
    up_weight, gate_weight, down_weight = _offloaded(place)
    backend = place.experts if place.offload_bytes is None else 0
    if part.gated and build.settings.fused_moe:
        product = build.op("up and gate", inner, *up_weight, *gate_weight, current, chosen, backend=backend)
    else:
        product = build.op("up", inner, *up_weight, current, chosen, backend=backend)
        if part.gated:
            gate = build.op("gate", inner, *gate_weight, current, chosen, backend=backend)
            product = build.product(gate, product, backend)
    experts = build.op("down", width, *down_weight, product, chosen, backend=backend)
    experts = build.op("weighted", width, experts, weights, inplace=True)
    if build.settings.ik:
        mixed = build.op("sum", hidden * num * F32, build.view(experts, hidden * num * F32))
    else:
        views = [build.view(experts, hidden * num * F32, strided=True) for _ in range(part.top_k)]
        mixed = views[0]
        for view in views[1:]:
            mixed = build.op("sum", hidden * num * F32, mixed, view, inplace=mixed is not views[0])
    if part.shared_intermediate_size:
        shared = DenseFFN(intermediate_size=part.shared_intermediate_size, gated=part.gated)
        out = _dense(shared, hidden, current, build, None, num)
        mixed = build.op("with shared", hidden * num * F32, mixed, out, inplace=True)
    return mixed


def _offloaded(place: LayerPlace) -> tuple[tuple[Node, ...], tuple[Node, ...], tuple[Node, ...]]:
    """The host weights that are copied for a large batch, or nothing."""
    if place.offload_bytes is None:
        return (), (), ()
    up, gate, down = (
        (Node(name="host weight", size=size, external=True, backend=HOST),) for size in place.offload_bytes
    )
    return up, gate, down


__all__ = ["F16", "F32", "GraphSettings", "LayerPlace", "decoder_graph"]
