"""Scripts of feed-forward blocks, experts and embeddings.

Source: liger-kernel@0.4.2, @0.8.0:benchmark/scripts/benchmark_swiglu.py, benchmark_geglu.py, benchmark_tiled_mlp.py,
    benchmark_fused_moe.py, benchmark_megatron_swiglu.py, benchmark_embedding.py.
"""

from __future__ import annotations

from ullage.account.kernels import experts, ffn, megatron_moe, ops
from ullage.account.kernels.tape import Tape
from ullage.i18n import _
from ullage.records.compare import NotComparableError
from ullage.records.kernels.case import Case, Trial

#: Before the shared scripts, tables of embeddings hold modules of the rows before: ``torch.compile`` keeps them.
CLEAN_EMBEDDING = (0, 8)


def gated(case: Case, t: Tape) -> Trial:
    """A gated block, whole or in slices."""
    rows, hidden, inner, width = case.tokens, case.size("hidden"), case.size("intermediate"), case.width()
    x = t.leaf(rows * hidden, width)
    gate, up, down = (t.leaf(hidden * inner, width) for _each in range(3))
    weights = ffn.Weights(gate=gate, up=up, down=down)
    beside = [t.empty(case.workspace, 1), t.empty(case.workspace, 1)]
    if case.provider.endswith("_tiled"):
        slices = case.parts("num_shards")
        return Trial(lambda: ffn.in_slices(t, x, weights, rows, slices, fused=case.liger), beside=beside)
    return Trial(lambda: ffn.gated(t, x, weights, rows, fused=case.liger), beside=beside)


def megatron_swiglu(case: Case, t: Tape) -> Trial:
    """The activation of gate and up side by side."""
    x = t.leaf(case.size("seq") * case.size("batch") * 2 * case.size("ffn_local"), 2)
    if case.provider not in ("torch", "megatron", "liger", "liger_in_place"):
        raise case.not_counted()
    return Trial(lambda: ffn.swiglu_of_halves(t, x, kind=case.provider), retain_graph=False, summed=True, cleared=[x])


def fused_moe(case: Case, t: Tape) -> Trial:
    """Routed experts; their weights are leaves times a number. The loop, run in the same process, uses cuBLAS."""
    rows, hidden, inner, width = case.tokens, case.size("hidden"), case.size("intermediate"), case.width()
    num_experts, top_k = case.parts("num_experts"), case.size("topk")
    x = t.leaf(rows * hidden, width)
    gate_up = ops.scale(t, t.leaf(num_experts * 2 * inner * hidden, width))
    down = ops.scale(t, t.leaf(num_experts * inner * hidden, width))
    routing, chosen = t.leaf(rows * top_k, width), t.empty(rows * top_k, 4)
    sizes = (rows, num_experts, hidden, inner)
    run = experts.fused_experts if case.liger else experts.experts_in_a_loop
    beside = [t.empty(case.workspace, 1), t.empty(case.workspace, 1), chosen]
    return Trial(lambda: run(t, x, gate_up, down, routing, sizes), beside=beside)


def embedding(case: Case, t: Tape) -> Trial:
    """A table and the tokens' indices."""
    if case.version < CLEAN_EMBEDDING:
        raise NotComparableError(_("the figure holds compiled modules of the table's rows before it"))
    rows, hidden, width = case.tokens, case.size("hidden"), case.width("fp32")
    weight, ids = t.leaf(case.vocab * hidden, width), t.empty(rows, 8)
    return Trial(lambda: experts.embedding(t, weight, ids, hidden, fused=case.liger))


#: Streams of Transformer Engine's grouped products, each with a workspace of cuBLAS.
#: Source: transformer_engine@2.9:pytorch/cpp_extensions/gemm.py:get_multi_stream_cublas_workspace.
GROUPED_STREAMS = 4
DISPATCHERS: dict[str, megatron_moe.Dispatcher] = {
    "megatron_alltoall": "alltoall",
    "megatron_a2a": "alltoall",
    "megatron_deepep": "deepep",
    "megatron_hybridep": "hybridep",
}


def moe_layer(case: Case, t: Tape) -> Trial:
    """One layer of routed experts in bf16; gradients are dropped before every iteration.

    The script's configuration names neither a gated activation nor shared experts, so the layer has GELU and none of
    them, whatever the table's model has. Output and gradient of the iteration before stay until they are replaced.
    Source: megatron-lm@d98e8a64:tests/functional_tests/test_cases/common/moe_perf/__main__.py:
        _build_transformer_config, _benchmark_moe_layer.
    """
    if case.params.get("fp8"):
        raise NotComparableError(_("no count of products on blocks of eight-bit values"))
    if case.provider not in DISPATCHERS:
        raise case.not_counted()
    tokens, hidden, inner = case.tokens, case.size("hidden"), case.size("moe_intermediate")
    ranks = case.size("ep")
    local = case.size("num_experts") // ranks
    if not 0 < case.size("topk") <= (case.optional("router_group_topk") or ranks) * local:
        raise NotComparableError(_("{key} is too large").format(key="topk"))
    sizes = megatron_moe.Sizes(
        num_tokens=tokens,
        hidden_size=hidden,
        intermediate_size=inner,
        num_local_experts=local,
        top_k=case.size("topk"),
        num_ranks=ranks,
        num_groups=case.optional("router_group_topk"),
    )
    x = t.leaf(tokens * hidden, 2)
    fc1, fc2 = t.leaf(local * hidden * inner, 2), t.leaf(local * hidden * inner, 2)
    probabilities = t.leaf(sizes.num_rows, 4)
    probabilities.per_row = True
    beside = [t.empty(case.workspace, 1) for _each in range(2 + GROUPED_STREAMS)]
    return Trial(
        lambda: megatron_moe.experts_layer(t, x, fc1, fc2, probabilities, sizes, DISPATCHERS[case.provider]),
        retain_graph=False,
        cleared=[x, fc1, fc2, probabilities],
        beside=beside,
        holds=True,
    )
