"""Scripts of norms, pointwise layers, rotary embeddings and sparse distributions.

Source: liger-kernel@0.3.1, @0.7.0, @0.8.0:benchmark/scripts/benchmark_rms_norm.py, benchmark_layer_norm.py,
    benchmark_group_norm.py, benchmark_fused_add_rms_norm.py, benchmark_dyt.py, benchmark_poly_norm.py,
    benchmark_softmax.py, benchmark_sparsemax.py, benchmark_rope.py, benchmark_llama4_rope.py,
    benchmark_megatron_rms_norm.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ullage.account.kernels import attention, norms, ops, rotary
from ullage.account.kernels.tape import Tape, Tensor
from ullage.i18n import _
from ullage.records.compare import NotComparableError
from ullage.records.kernels.case import Case, Trial

#: Liger's LayerNorm added its weights' gradients with atomics in between; the rows of 0.6.0 came with that change.
#: Source: liger-kernel@6a2c4913, @0.6.4:ops/layer_norm.py:layer_norm_backward.
ATOMIC_LAYER_NORM = ((0, 6), (0, 6, 4))
#: Liger's RMSNorm kept one row of the weight's gradient for each row of the input before this version.
#: Source: liger-kernel@0.3.1, @0.4.0:ops/rms_norm.py:rms_norm_backward.
PARTIAL_SUMS = (0, 4)
#: First version that has Liger's sparsemax; the rows of an earlier one repeat PyTorch's to the byte.
FIRST_SPARSEMAX = (0, 5, 10)


def _row_trial(case: Case, t: Tape, x: Tensor, forward: Callable[[], Tensor]) -> Trial:
    """The older scripts make one gradient before and run forward and backward in every mode."""
    given = None if case.shared else [t.empty(x.num_elements, x.width)]
    return Trial(forward, given=given, always_full=not case.shared)


def _partials(case: Case) -> int:
    return case.device.num_multiprocessors if case.liger else 0


def rms_norm(case: Case, t: Tape) -> Trial:
    """Input in the compute dtype, weight in fp32."""
    rows, hidden = case.tokens, case.size("hidden")
    x, weight = t.leaf(rows * hidden, case.width()), t.leaf(hidden, 4)
    if not case.liger:
        return _row_trial(case, t, x, lambda: norms.rms_norm(t, x, weight, rows))
    partials = rows if case.version < PARTIAL_SUMS else _partials(case)
    return _row_trial(
        case,
        t,
        x,
        lambda: norms.fused_norm(t, x, [weight], statistics=4 * rows, num_partials=partials, in_place=True),
    )


def megatron_rms_norm(case: Case, t: Tape) -> Trial:
    """One kernel for every provider; the output's sum is differentiated, so its gradient is made contiguous first."""
    rows, hidden = case.tokens, case.size("hidden")
    x, weight = t.leaf(rows * hidden, 2), t.leaf(hidden, 2)
    partials = _partials(case)
    return Trial(
        lambda: norms.fused_norm(t, x, [weight], statistics=4 * rows, num_partials=partials, contiguous_gradient=True),
        retain_graph=False,
        summed=True,
    )


def fused_add_rms_norm(case: Case, t: Tape) -> Trial:
    """Input and residual; the shared scripts differentiate the first output only."""
    rows, hidden, width = case.tokens, case.size("hidden"), case.width()
    x, residual = t.leaf(rows * hidden, width), t.leaf(rows * hidden, width)
    weight, inner = t.leaf(hidden, 4), t.leaf(hidden, 4)
    partials = _partials(case)

    def forward() -> tuple[Tensor, Tensor]:
        if case.provider.endswith("fused_add_rms_norm"):
            return norms.fused_add_norm(t, x, residual, weight, statistics=4 * rows, num_partials=partials)
        if not case.liger:
            return norms.added_rms_norm(t, x, residual, weight, rows)
        wide = ops.add(t, ops.cast(t, x, 4), ops.cast(t, residual, 4))
        normed = norms.fused_norm(t, wide, [inner], statistics=4 * rows, num_partials=partials)
        return ops.mul(t, weight, ops.cast(t, normed, width)), ops.cast(t, wide, width)

    if case.shared:
        return Trial(lambda: forward()[0])
    given = [t.empty(rows * hidden, width) for _each in range(2)]
    return Trial(forward, given=given, retain_graph=False)


def layer_norm(case: Case, t: Tape) -> Trial:
    """Input in the compute dtype, weight and bias."""
    rows, hidden, width = case.tokens, case.size("hidden"), case.width()
    x, weights = t.leaf(rows * hidden, width), [t.leaf(hidden, 4), t.leaf(hidden, 4)]
    atomic = ATOMIC_LAYER_NORM[0] <= case.version < ATOMIC_LAYER_NORM[1]
    partials = 0 if atomic else _partials(case)
    return _row_trial(case, t, x, lambda: norms.fused_norm(t, x, weights, statistics=8 * rows, num_partials=partials))


def group_norm(case: Case, t: Tape) -> Trial:
    """Groups of channels; weights have one value a channel."""
    if case.params.get("channels"):
        rows, size = case.size("rows"), case.size("channels") * case.size("positions")
    else:
        rows, size = case.tokens, case.size("hidden")
    x = t.leaf(rows * size, case.width())
    return _row_trial(case, t, x, lambda: norms.fused_norm(t, x, [], statistics=8 * rows))


def dyt(case: Case, t: Tape) -> Trial:
    """Dynamic tanh with or without a bias; weights in fp32."""
    rows, hidden = case.tokens, case.size("hidden")
    x, alpha, gamma = t.leaf(rows * hidden, case.width()), t.leaf(1, 4), t.leaf(hidden, 4)
    beta = t.leaf(hidden, 4) if case.params.get("beta") else None
    weights = [gamma] if beta is None else [gamma, beta]
    if case.compiled:
        return _row_trial(case, t, x, lambda: norms.compiled_pointwise(t, x, [alpha, *weights], width=4))
    if case.liger:
        partials = _partials(case)
        return _row_trial(case, t, x, lambda: norms.fused_norm(t, x, weights, statistics=0, num_partials=partials))
    return _row_trial(case, t, x, lambda: norms.dynamic_tanh(t, x, alpha, gamma, beta))


def poly_norm(case: Case, t: Tape) -> Trial:
    """A weighted sum of three normed powers."""
    rows = case.tokens
    x, weights = t.leaf(rows * case.size("hidden"), case.width()), [t.leaf(3, 4), t.leaf(1, 4)]
    if not case.liger:
        return _row_trial(case, t, x, lambda: norms.polynomial_norm(t, x, weights[0], weights[1], rows))
    in_place = not case.cutile
    return _row_trial(case, t, x, lambda: norms.fused_norm(t, x, weights, statistics=12 * rows, in_place=in_place))


def softmax(case: Case, t: Tape) -> Trial:
    """Softmax over rows."""
    x = t.leaf(case.tokens * case.size("hidden"), case.width())
    if case.liger:
        return _row_trial(case, t, x, lambda: norms.fused_pointwise(t, x, keeps_result=True))
    return _row_trial(case, t, x, lambda: ops.softmax(t, x))


def relu_squared(case: Case, t: Tape) -> Trial:
    """Squared ReLU."""
    x = t.leaf(case.tokens * case.size("hidden"), case.width())
    if case.liger:
        return _row_trial(case, t, x, lambda: norms.fused_pointwise(t, x))
    return _row_trial(case, t, x, lambda: norms.squared_relu(t, x))


def sparsemax(case: Case, t: Tape) -> Trial:
    """Sparsemax over rows."""
    size = case.size("features" if case.params.get("features") else "hidden")
    x = t.leaf(case.tokens * size, case.width("fp32"))
    if not case.liger:
        return _row_trial(case, t, x, lambda: attention.sparsemax(t, x, size))
    if case.version < FIRST_SPARSEMAX:
        raise NotComparableError(_("measured before the kernel was released: its code is not known"))
    return _row_trial(case, t, x, lambda: attention.liger_sparsemax(t, x, size))


def _heads(case: Case) -> tuple[int, int]:
    key = "num_q_heads" if case.params.get("num_q_heads") else "num_heads"
    return case.size(key), case.size("num_kv_heads")


def rope(case: Case, t: Tape) -> Trial:
    """Queries and keys with heads before positions (views of their leaves), tables in their format.

    The tables come from a product of positions and frequencies: one cuBLAS workspace.
    """
    tokens, width = case.size("seq"), case.width()
    heads, kv_heads = _heads(case)
    dim = case.size("hidden") // heads
    q, k = (t.view(t.leaf(tokens * count * dim, width)) for count in (heads, kv_heads))
    tables = [t.empty(tokens * dim, width) for _each in range(2)]
    beside = [t.empty(case.workspace, 1), *tables, t.empty(tokens, 8)]
    if case.liger:
        return _rotary_trial(case, t, q, k, lambda: rotary.in_place(t, q, k, tables), beside)
    return _rotary_trial(case, t, q, k, lambda: rotary.rotate_halves(t, q, k, *tables), beside)


def llama4_rope(case: Case, t: Tape) -> Trial:
    """Queries and keys, and complex tables that are not contiguous."""
    tokens, width = case.size("seq"), case.width()
    heads, kv_heads = _heads(case)
    dim = case.size("hidden") // heads
    q, k = (t.leaf(tokens * count * dim, width) for count in (heads, kv_heads))
    angles = t.empty(tokens * dim // 2, 8)
    beside = [t.empty(case.workspace, 1), angles, t.empty(tokens, 8)]
    if not case.liger:
        return _rotary_trial(case, t, q, k, lambda: rotary.complex_product(t, q, k, angles), beside)
    part = tokens * dim // 2
    copies = 8 * part if case.version >= (0, 8) else 3 * part * width
    return _rotary_trial(case, t, q, k, lambda: rotary.in_place(t, q, k, [angles], copies=copies), beside)


def _rotary_trial(
    case: Case,
    t: Tape,
    q: Tensor,
    k: Tensor,
    forward: Callable[[], Sequence[Tensor]],
    beside: list[Tensor],
) -> Trial:
    """The shared scripts differentiate the queries only; the older ones ask for both gradients."""
    if case.shared:
        return Trial(lambda: forward()[0], beside=beside)
    given = [t.empty(each.num_elements, each.width) for each in (q, k)]
    return Trial(forward, given=given, into=[q, k], beside=beside)
