"""The graph of one decoder layer, made from its spec: attention, feed-forward, norms, residual sums."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from ullage.account.activations.blocks import Builder, Style, Training
from ullage.account.activations.graph import Graph
from ullage.account.activations.recurrent import RECURRENT, recurrent_core
from ullage.errors import LayoutError, UnknownArchitectureError
from ullage.i18n import _
from ullage.spec import model as spec


@dataclass(frozen=True, kw_only=True)
class Slice:
    """What of a micro-batch and a layer one rank works on.

    ``seq_len``: after context parallelism. ``sequence_parallel``: norms and residual stream hold n/t tokens.
    ``rearranges``: DTensor's collectives work on the first dimension, and the sequence is the second: what is gathered
    (``gathered_copies``) is copied into place afterwards, what is scattered before. ``holds_inputs``: not compiled, so
    that the frame of a module's function holds its input until it returns.
    ``expert_load``: received over balanced tokens; ``expert_parallel_size`` spreads routed experts.
    """

    batch: int
    seq_len: int
    tensor_parallel_size: int = 1
    sequence_parallel: bool = False
    rearranges: bool = False
    gathered_copies: bool = True
    holds_inputs: bool = False
    expert_parallel_size: int = 1
    expert_load: float = 1.0

    @property
    def num_tokens(self) -> int:
        """Tokens outside sequence-parallel parts."""
        return self.batch * self.seq_len

    @property
    def num_split_tokens(self) -> int:
        """Tokens on the residual stream."""
        return self.num_tokens // (self.tensor_parallel_size if self.sequence_parallel else 1)


@lru_cache(maxsize=1024)
def decoder_graph(layer: spec.Layer, hidden_size: int, slice_: Slice, style: Style, training: Training) -> Graph:
    """Return the graph of a layer.

    Formula: norm, attention, sum, norm, feed-forward, sum; layers with one norm share it, parallel layers
        with two read their input twice (GPT-NeoX), layers with four have norms after the blocks too (Gemma 2).

    Raises:
        UnknownArchitectureError: a part of the layer has no graph.
        LayoutError: heads or widths that do not divide.
    """
    build = Builder(style=style, training=training, num_tokens=slice_.num_tokens)
    stream = slice_.num_split_tokens * hidden_size * style.element_bytes
    norms = [norm for norm in layer.norms if norm.size == hidden_size]
    x, residual = "x", "x"
    sandwich, shared = len(norms) == 4, len(norms) == 1
    blocks = [*layer.mixers, *layer.ffns]
    normed = before = ""
    for number, part in enumerate(blocks):
        if not (shared and number):
            norm = norms[min(2 * number if sandwich else number, len(norms) - 1)]
            normed = build.norm(f"norm{number}", x, hidden_size, kind=norm.kind, rows=slice_.num_split_tokens)
            before = normed
            normed = _gathered(build, normed, number, hidden_size, slice_)
        out = _part(build, part, normed, number, hidden_size, slice_)
        out = _scattered(build, out, number, hidden_size, slice_)
        if slice_.holds_inputs:
            build.ops[-1] = replace(build.ops[-1], reads=(before, normed))
        if sandwich:
            after = norms[2 * number + 1]
            out = build.norm(f"after{number}", out, hidden_size, kind=after.kind, rows=slice_.num_split_tokens)
        if style.dropout:
            rows = slice_.num_split_tokens * hidden_size
            out = build.op(f"dropped{number}", stream, (out,), aside_bytes=rows)
        residual = build.add(f"sum{number}", stream, out, residual)
        if not shared and not layer.parallel:
            x = residual
    return Graph(ops=tuple(build.ops), input_bytes=stream)


def _gathered(build: Builder, x: str, number: int, hidden_size: int, slice_: Slice) -> str:
    """All-gather of a sequence-parallel part's output before split linears; backward scatters its gradient.

    Source: torch@2.13.0:torch/distributed/_functional_collectives.py:all_gather_single, reduce_scatter_single.
    """
    if not slice_.sequence_parallel or slice_.tensor_parallel_size == 1:
        return x
    size = slice_.num_tokens * hidden_size * build.style.element_bytes
    gathers, scatters = rearranged_bytes(slice_, size)
    return build.op(f"gathered{number}", size, (x,), kind="comm", work_bytes=gathers, grad_work_bytes=scatters)


def rearranged_bytes(slice_: Slice, num_bytes: int) -> tuple[int, int]:
    """Return the bytes of the copies that a gather and a scatter of a whole tensor make."""
    if not slice_.rearranges:
        return 0, 0
    return num_bytes if slice_.gathered_copies else 0, num_bytes


def _scattered(build: Builder, x: str, number: int, hidden_size: int, slice_: Slice) -> str:
    """Reduce-scatter (or all-reduce) of a row-split linear's output."""
    if slice_.tensor_parallel_size == 1:
        return x
    size = slice_.num_split_tokens * hidden_size * build.style.element_bytes
    gathers, scatters = rearranged_bytes(slice_, slice_.num_tokens * hidden_size * build.style.element_bytes)
    return build.op(f"scattered{number}", size, (x,), kind="comm", work_bytes=scatters, grad_work_bytes=gathers)


def _part(build: Builder, part: object, x: str, number: int, hidden_size: int, slice_: Slice) -> str:
    if isinstance(part, spec.Attention):
        return _attention(build, part, x, number, hidden_size, slice_)
    if isinstance(part, spec.LatentAttention):
        return _latent(build, part, x, number, hidden_size, slice_)
    if isinstance(part, spec.DenseFFN):
        split = _divided(part.intermediate_size, slice_.tensor_parallel_size, "intermediate size")
        return _ffn(build, part, x, f"ffn{number}", hidden_size, split, slice_.num_tokens)
    if isinstance(part, spec.MoEFFN):
        return _moe(build, part, x, number, hidden_size, slice_)
    if isinstance(part, RECURRENT):
        return _recurrent(build, part, x, number, hidden_size, slice_)
    raise UnknownArchitectureError(
        _("what training keeps of a {part} layer is not known yet").format(part=type(part).__name__)
    )


def _divided(value: int, by: int, what: str) -> int:
    if value % by:
        raise LayoutError(
            _("{what} {value} cannot be split over {by} ranks").format(what=what, value=value, by=by),
            remedy=_("choose a size that divides it"),
        )
    return value // by


def _attention(build: Builder, part: spec.Attention, x: str, number: int, hidden_size: int, slice_: Slice) -> str:
    style, n, e = build.style, slice_.num_tokens, build.style.element_bytes
    heads = _divided(part.num_heads, slice_.tensor_parallel_size, "number of heads")
    kv_heads = max(1, part.num_kv_heads // slice_.tensor_parallel_size)
    dim, v_dim = part.head_dim, part.v_head_dim or part.head_dim
    widths = {"q": heads * dim, "k": kv_heads * dim, "v": kv_heads * v_dim}
    at = f"attention{number}"
    found: dict[str, str] = {}
    if style.fused_qkv or part.fused_qkv:
        found = _fused_qkv(build, part, x, at, hidden_size, widths)
    else:
        for one, names in (("q", (part.q_name, "query")), ("k", (part.k_name, "key")), ("v", (part.v_name, "value"))):
            found[one] = build.linear(f"{at}.{one}", x, hidden_size, widths[one], names=names)
    for one in ("q", "k"):
        if part.qk_norm:
            per_head = part.qk_norm == "head"
            rows = n * (widths[one] // dim if per_head else 1)
            found[one] = build.norm(
                f"{at}.{one}norm", found[one], dim if per_head else widths[one], kind=part.qk_norm_kind, rows=rows
            )
        found[one] = build.rope(f"{at}.{one}turned", found[one], n * widths[one])
    if style.repeat_kv and kv_heads < heads:
        for one, width in (("k", heads * dim), ("v", heads * v_dim)):
            found[one] = build.op(f"{at}.{one}repeated", n * width * e, (found[one],))
    core = build.written_out if style.scores else build.flash
    sizes = {"batch": slice_.batch, "heads": heads, "seq_len": slice_.seq_len, "width": heads * v_dim}
    if not style.scores:
        sizes["head_dim"] = dim
    out = core(f"{at}.core", found["q"], found["k"], found["v"], **sizes)
    if build.training.adapter:
        size = n * heads * v_dim * e
        build.op(f"{at}.prefix", size, (found["q"],), keeps=(found["q"], f"{at}.prefix"), aside_bytes=4 * n * heads)
        build.op(f"{at}.gated", size, (f"{at}.prefix",), keeps=(f"{at}.prefix",), grad_work_bytes=size)
        out = build.add(f"{at}.joined", size, out, f"{at}.gated")
    return build.linear(f"{at}.o", out, heads * v_dim, hidden_size, names=(part.o_name, "projection", "output_proj"))


def _fused_qkv(
    build: Builder, part: spec.Attention, x: str, at: str, hidden_size: int, widths: dict[str, int]
) -> dict[str, str]:
    """One projection for q, k and v; low-rank pairs on some of them are laid into zeros of the whole width.

    Source: litgpt@26857050:litgpt/lora.py:LoRAQKVLinear.
    """
    training, e = build.training, build.style.element_bytes
    on = [one for one, long in (("q", "query"), ("k", "key"), ("v", "value")) if training.lora_on(long, f"{one}_proj")]
    names = ("query", "key", "value", "q_proj", "k_proj", "v_proj", part.fused_qkv or "qkv")
    whole = sum(widths.values())
    qkv = build.linear(
        f"{at}.qkv",
        x,
        hidden_size,
        whole,
        names=names,
        split_lora=max(1, len(on)),
        pad_lora=0 < len(on) < 3,
        lora_out=sum(widths[one] for one in on) or None,
    )
    return {one: build.view(f"{at}.{one}", qkv, build.num_tokens * width * e) for one, width in widths.items()}


def _latent(build: Builder, part: spec.LatentAttention, x: str, number: int, hidden_size: int, slice_: Slice) -> str:
    """Multi-head latent attention with keys written out per head.

    Source: torchtitan@b5bcd76:torchtitan/models/deepseek_v3/model.py:Attention.forward;
        transformers@5.23.0:models/deepseek_v3/modeling_deepseek_v3.py:DeepseekV3Attention.forward.
    """
    n, e = slice_.num_tokens, build.style.element_bytes
    heads = _divided(part.num_heads, slice_.tensor_parallel_size, "number of heads")
    nope, rope, v_dim = part.qk_nope_head_dim, part.qk_rope_head_dim, part.v_head_dim
    at, wide = f"attention{number}", heads * (nope + rope)
    if part.q_lora_rank is None:
        q = build.linear(f"{at}.q", x, hidden_size, wide, names=("q_proj",))
    else:
        build.linear(f"{at}.q_a", x, hidden_size, part.q_lora_rank, names=("q_a_proj",))
        build.norm(f"{at}.q_norm", f"{at}.q_a", part.q_lora_rank, rows=n)
        q = build.linear(f"{at}.q", f"{at}.q_norm", part.q_lora_rank, wide, names=("q_b_proj",))
    turned = build.rope(f"{at}.qrope", build.view(f"{at}.qpart", q, n * heads * rope * e), n * heads * rope)
    q = build.op(f"{at}.qjoined", n * wide * e, (q, turned))
    rank = part.kv_lora_rank
    build.linear(f"{at}.kv_a", x, hidden_size, rank + rope, names=("kv_a_proj_with_mqa",))
    krope = build.rope(f"{at}.krope", build.view(f"{at}.kpart", f"{at}.kv_a", n * rope * e), n * rope)
    latent = build.view(f"{at}.latent", f"{at}.kv_a", n * rank * e)
    build.norm(f"{at}.kv_norm", latent, rank, rows=n)
    build.linear(f"{at}.kv", f"{at}.kv_norm", rank, heads * (nope + v_dim), names=("kv_b_proj",))
    k = build.op(f"{at}.kjoined", n * wide * e, (f"{at}.kv", krope))
    v = build.view(f"{at}.v", f"{at}.kv", n * heads * v_dim * e)
    core = build.flash(
        f"{at}.core",
        q,
        k,
        v,
        batch=slice_.batch,
        heads=heads,
        seq_len=slice_.seq_len,
        width=heads * v_dim,
        head_dim=nope + rope,
    )
    return build.linear(f"{at}.o", core, heads * v_dim, hidden_size, names=("o_proj",))


def _recurrent(build: Builder, part: object, x: str, number: int, hidden_size: int, slice_: Slice) -> str:
    """A recurrent mixer: its projections, one operation that keeps what the table says, its output projection.

    Projections whose output is kept are held by the operation itself; temporaries are those of its backward.
    """
    core = recurrent_core(part, tensor_parallel_size=slice_.tensor_parallel_size)
    assert core is not None
    n, e, at = slice_.num_tokens, build.style.element_bytes, f"recurrent{number}"
    projected = [build.linear(f"{at}.{name}", x, hidden_size, width, names=(name,)) for name, width in core.projections]
    out = build.op(
        f"{at}.core",
        n * core.out_width * e,
        projected,
        aside_bytes=n * core.row_bytes(e, trained=build.training.base),
        grad_work_bytes=n * core.work_bytes(e),
    )
    if core.keeps_out_input:
        return build.linear(f"{at}.out", out, core.out_width, hidden_size, names=(core.out_name,))
    weights = core.out_width * hidden_size * build.style.grad_bytes if build.training.base else 0
    return build.op(f"{at}.out", n * hidden_size * e, (out,), kind="mm", weight_grad_bytes=weights)


def _ffn(build: Builder, part: spec.DenseFFN, x: str, at: str, hidden_size: int, inner: int, rows: int) -> str:
    size = rows * inner * build.style.element_bytes
    if not part.gated:
        build.linear(f"{at}.up", x, hidden_size, inner, names=(part.up_name, "mlp"), num_tokens=rows)
        build.op(f"{at}.active", size, (f"{at}.up",), keeps=(f"{at}.up",))
        return build.linear(
            f"{at}.down", f"{at}.active", inner, hidden_size, names=(part.down_name, "mlp"), num_tokens=rows
        )
    build.linear(f"{at}.gate", x, hidden_size, inner, names=(part.gate_name, "mlp"), num_tokens=rows)
    if build.style.gates_first:
        build.linear(f"{at}.up", x, hidden_size, inner, names=(part.up_name, "mlp"), num_tokens=rows)
    build.op(f"{at}.active", size, (f"{at}.gate",), keeps=(f"{at}.gate",))
    if not build.style.gates_first:
        build.linear(f"{at}.up", x, hidden_size, inner, names=(part.up_name, "mlp"), num_tokens=rows)
    build.op(f"{at}.product", size, (f"{at}.active", f"{at}.up"), keeps=(f"{at}.active", f"{at}.up"))
    return build.linear(
        f"{at}.down", f"{at}.product", inner, hidden_size, names=(part.down_name, "mlp"), num_tokens=rows
    )


def _moe(build: Builder, part: spec.MoEFFN, x: str, number: int, hidden_size: int, slice_: Slice) -> str:
    """A mixture with grouped matrix products: scores in fp32, permuted copies of the tokens, experts, weighted sum.

    Formula: received rows m = n * top_k * expert_load on each rank (each rank sends and receives n*top_k rows when
        routing is balanced), whatever the expert-parallel size.
    Source: torchtitan@b5bcd76:torchtitan/models/common/moe.py:MoE.forward, GroupedExperts.
    """
    n, e, at = slice_.num_tokens, build.style.element_bytes, f"moe{number}"
    rows = int(n * part.top_k * slice_.expert_load)
    inner = _divided(part.intermediate_size, 1, "expert size")
    build.linear(f"{at}.router", x, hidden_size, part.num_experts)
    build.op(f"{at}.scores", n * part.num_experts * 4, (f"{at}.router",), keeps=(f"{at}.scores",))
    build.op(f"{at}.routed", rows * hidden_size * e, (x,), aside_bytes=rows * 16)
    source = f"{at}.routed"
    if slice_.expert_parallel_size > 1:
        source = build.op(f"{at}.received", rows * hidden_size * e, (source,), kind="comm")
        source = build.op(f"{at}.sorted", rows * hidden_size * e, (source,), aside_bytes=rows * 8)
    experts = spec.DenseFFN(intermediate_size=inner, gated=part.gated)
    local = part.num_experts // slice_.expert_parallel_size
    before = len(build.ops)
    out = _ffn(build, experts, source, f"{at}.experts", hidden_size, inner, rows)
    _scale_weight_grads(build, before, local)
    if slice_.expert_parallel_size > 1:
        out = build.op(f"{at}.returned", rows * hidden_size * e, (out,), kind="comm")
    build.op(
        f"{at}.weighted", rows * hidden_size * e, (out, f"{at}.scores"), keeps=(out,), work_bytes=4 * rows * hidden_size
    )
    combined = build.op(f"{at}.combined", n * hidden_size * e, (f"{at}.weighted",))
    if part.shared_intermediate_size:
        shared = spec.DenseFFN(intermediate_size=part.shared_intermediate_size, gated=part.gated)
        other = _ffn(build, shared, x, f"{at}.shared", hidden_size, part.shared_intermediate_size, n)
        combined = build.add(f"{at}.all", n * hidden_size * e, other, combined)
    return combined


def _scale_weight_grads(build: Builder, start: int, times: int) -> None:
    """Make the weight gradients of operations from ``start`` on those of ``times`` experts."""
    for index in range(start, len(build.ops)):
        op = build.ops[index]
        if op.weight_grad_bytes:
            build.ops[index] = replace(op, weight_grad_bytes=op.weight_grad_bytes * times)
