"""The fullest moments of one layer's backward pass: what stands beside, and what has gone of, the kept tensors."""

from __future__ import annotations

from ullage.account.activations.recurrent import implemented_core
from ullage.account.activations.saved import Implementation, SavedTensor, Shape, table_bytes
from ullage.frozen import Frozen
from ullage.spec import model as spec
from ullage.units import dtype_bytes, round_up

Table = tuple[SavedTensor, ...]


class Point(Frozen):
    """One moment of a layer's backward.

    Attributes:
        name: what is differentiated.
        extra_bytes: gradients of activations and temporaries that stand, less the kept tensors that have gone already.
        num_weights: elements of the layer's weights whose gradients stand.
    """

    name: str
    extra_bytes: int
    num_weights: int = 0


def backward_points(
    layer: spec.Layer,
    hidden_size: int,
    shape: Shape,
    implementation: Implementation,
    table: Table,
    *,
    recomputed: bool = False,
) -> tuple[Point, ...]:
    """Return the moments of a layer's backward that may be its fullest, the last part of the layer first.

    ``recomputed``: the layer is a checkpoint, which lets go of a tensor as soon as its operator has read it.

    Known error: below 0.5 % of the peak against traces of transformers 5.23 (docs/agreement.md).
    """
    residual = int(shape.num_split_tokens * hidden_size * dtype_bytes(implementation.residual_dtype))
    found: list[Point] = []
    for ffn in layer.ffns:
        if isinstance(ffn, spec.DenseFFN):
            found.append(_dense(ffn, hidden_size, residual, shape, implementation))
        elif implementation.moe == "loop":
            found.append(_one_expert(ffn, hidden_size, residual, shape, implementation))
        else:
            found += _grouped(ffn, hidden_size, residual, shape, implementation, table, recomputed=recomputed)
    for mixer in layer.mixers:
        if isinstance(mixer, (spec.Attention, spec.LatentAttention)):
            found.append(_attention(mixer, layer, hidden_size, residual, shape, implementation, table))
            if recomputed and implementation.attention in ("eager", "unfused"):
                found.append(_scores_again(mixer, layer, hidden_size, residual, shape, implementation, table))
            continue
        recurrence = _recurrence(mixer, layer, hidden_size, residual, shape, implementation, table)
        found += [recurrence] if recurrence else []
    return tuple(found) or (Point(name="layer", extra_bytes=residual),)


def _dense(ffn: spec.DenseFFN, hidden_size: int, residual: int, shape: Shape, implementation: Implementation) -> Point:
    """The product of gate and up.

    Formula: its gradient and those of both factors, 3bsI, less the product itself, which its linear has let go (only
        where it was kept), + the gradient of the residual stream bsh.
    Source: torch@2.13.0:tools/autograd/derivatives.yaml (mul, silu); the order of a reverse pass.
    """
    values = shape.num_tokens * (ffn.intermediate_size // shape.tensor_parallel_size)
    released = values if implementation.trained else 0
    extra = int((_factors(values, ffn.gated) - released) * _width(implementation))
    return Point(name="feed-forward", extra_bytes=residual + extra, num_weights=hidden_size * ffn.intermediate_size)


def _one_expert(
    ffn: spec.MoEFFN, hidden_size: int, residual: int, shape: Shape, implementation: Implementation
) -> Point:
    """Experts one after another: only one expert's rows count at a time."""
    rows = -(-shape.num_routed_tokens(ffn.top_k) // ffn.num_experts)
    values = rows * (ffn.intermediate_size // shape.expert_tensor_parallel_size)
    extra = int(_factors(values, ffn.gated) * _width(implementation))
    weights = hidden_size * ffn.intermediate_size * ffn.num_experts
    return Point(name="one expert", extra_bytes=residual + extra, num_weights=weights)


def _grouped(
    ffn: spec.MoEFFN,
    hidden_size: int,
    residual: int,
    shape: Shape,
    implementation: Implementation,
    table: Table,
    *,
    recomputed: bool,
) -> list[Point]:
    """Experts as grouped products: the weighted sum, the product of gate and up, the gate itself, the first product.

    Formula: R rows of width h, inner size I. Weighted sum: the gradient laid into new rows and the products with
        weights and outputs, 3Rh in the weights' format, + Rh where that is not the compute dtype (in the place of the
        output where a checkpoint has let that go).
        Product: 3RI. Gate: 4RI (gradients of both halves and of the whole; clamped 5RI). First product: 2RI + Rh.
        The shared expert, which ran last, is done by then; every point has two gradients of the residual stream.
    Source: transformers@5.23.0:integrations/moe.py:grouped_mm_experts_forward; models/gpt_oss/modeling_gpt_oss.py:
        GptOssExperts._apply_gate; torch@2.13.0:torch/csrc/autograd/FunctionsManual.cpp:index_backward, split_backward.
    """
    rows = shape.num_routed_tokens(ffn.top_k)
    width = int(dtype_bytes(implementation.compute_dtype))
    weighted = int(dtype_bytes(implementation.router_dtype))
    per_row = ffn.latent_size or hidden_size
    outer, inner = rows * per_row, rows * (ffn.intermediate_size // shape.expert_tensor_parallel_size) * width
    one = per_row * ffn.intermediate_size * ffn.num_experts
    shared = hidden_size * ffn.shared_intermediate_size * (3 if ffn.gated else 2)
    kept = _experts_rows(table)
    done = residual
    if ffn.shared_intermediate_size:
        done += residual - _rows(table, f"{ffn.shared_name}.")
        done -= _rows(table, "input", ffn.prefix) if implementation.router_wide else 0
    behind = _experts_rows(table, "output", "down_proj.input")
    clamped = implementation.gated_ffn == "clamped"
    cast = outer * width if weighted != width and not recomputed else 0
    again = _run_again(ffn, outer, inner, residual, shape, implementation, table) if recomputed else []
    return [
        *again,
        Point(name="weighted sum", extra_bytes=done + 3 * outer * weighted + cast, num_weights=shared),
        Point(
            name="product of gate and up",
            extra_bytes=done + _factors(inner, ffn.gated) - behind,
            num_weights=shared + one,
        ),
        Point(
            name="gate",
            extra_bytes=done + (5 if clamped else 4) * inner - kept + _experts_rows(table, "input"),
            num_weights=shared + one,
        ),
        Point(
            name="first product of the experts",
            extra_bytes=done + 2 * inner + outer * width - kept + _experts_rows(table, "input"),
            num_weights=shared + (3 if ffn.gated else 2) * one,
        ),
    ]


def _run_again(
    ffn: spec.MoEFFN,
    outer: int,
    inner: int,
    residual: int,
    shape: Shape,
    implementation: Implementation,
    table: Table,
) -> list[Point]:
    """The forward pass of grouped experts that a checkpoint runs again: tensors that only its variables hold.

    Formula: the middle of the residual stream bsh; frozen weights: normed input bsh and permuted rows Rh (else they are
        kept); weighted rows twice while they are permuted back, or once beside their fp32 copy where autocast sums in
        fp32. Clamped gate: gathered biases 2RI and the clamped half RI. Where no shared expert ran the layer again
        before, the gradient of the weighted rows stands already.
    Source: transformers@5.23.0:integrations/moe.py:grouped_mm_experts_forward; torch@2.13.0:aten/src/ATen/
        autocast_mode.h (sum in fp32).
    """
    width, weighted = int(dtype_bytes(implementation.compute_dtype)), int(dtype_bytes(implementation.router_dtype))
    frozen = not implementation.trained
    held = 2 * residual + (outer * width + residual if frozen else 0)
    shared = _rows(table, f"{ffn.shared_name}.") if ffn.shared_intermediate_size else 0
    held += 0 if shared else outer * weighted
    copied = 4 * outer if implementation.autocast and weighted < 4 else 0
    summed = 2 * residual if copied or weighted == 4 else residual
    found = [
        Point(
            name="weighted sum, run again",
            extra_bytes=held - shared + outer * weighted + max(copied + summed, outer * weighted),
        )
    ]
    if implementation.gated_ffn == "clamped":
        gate = 3 * inner + (inner if frozen else 0) - _experts_rows(table, "output")
        found.append(Point(name="gate, run again", extra_bytes=held + gate - shared))
    return found


def _attention(
    mixer: spec.Attention | spec.LatentAttention,
    layer: spec.Layer,
    hidden_size: int,
    residual: int,
    shape: Shape,
    implementation: Implementation,
    table: Table,
) -> Point:
    """The core of attention: feed-forward block and second norm are done.

    Formula: kernels: gradients of output, q, k, v and the kernel's workspace. Written out: the gradient of the
        probabilities, its product with them, and the gradient of the scores, with the softmax's fp32 result where it
        has one.
    Source: torch@2.13.0:aten/src/ATen/native/cuda/SoftMax.cu:softmax_backward_cuda_out;
        torch@2.13.0:aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp:mha_bwd;
        cuda/attention_backward.cu; transformers@5.23.0:models/llama/modeling_llama.py:eager_attention_forward.
    """
    heads, kv_heads, dim, v_dim = _head_sizes(mixer, shape)
    tokens, width = shape.num_tokens, int(dtype_bytes(implementation.compute_dtype))
    done = _behind_mixer(layer, table)
    weights = sum(_ffn_weights(ffn, hidden_size) for ffn in layer.ffns) + heads * v_dim * hidden_size
    output = tokens * heads * v_dim * width
    if implementation.attention in ("eager", "unfused"):
        scores = tokens * heads * (shape.seq_len + (1 if getattr(mixer, "sinks", False) else 0))
        made = 3 * scores * int(dtype_bytes(implementation.softmax_dtype)) + output
        gone = _rows(table, "value", mixer.prefix) + _rows(table, "o_proj.input", mixer.prefix)
        if implementation.softmax_dtype != implementation.compute_dtype:
            gone += scores * width
        return Point(name="attention", extra_bytes=residual + made - gone - done, num_weights=weights)
    if implementation.repeat_kv:
        kv_heads = heads
    made = output + tokens * (heads * dim + kv_heads * (dim + v_dim)) * width
    made += _kernel_bytes(heads, kv_heads, dim, v_dim, shape, implementation)
    return Point(name="attention", extra_bytes=residual + made - done, num_weights=weights)


def _recurrence(
    mixer: spec.Mixer,
    layer: spec.Layer,
    hidden_size: int,
    residual: int,
    shape: Shape,
    implementation: Implementation,
    table: Table,
) -> Point | None:
    """A recurrent mixer's own backward: feed-forward block, second norm, output projection and gate are done."""
    core = implemented_core(mixer, shape, implementation)
    if core is None:
        return None
    width = int(dtype_bytes(implementation.compute_dtype))
    done = _behind_mixer(layer, table)
    done += _rows(table, f"{core.out_name}.input", mixer.prefix) + _rows(table, f"{mixer.prefix}.{core.out_name}.lora")
    done += shape.num_tokens * core.row_bytes(width, trained=implementation.trained, behind_only=True)
    weights = sum(_ffn_weights(ffn, hidden_size) for ffn in layer.ffns) + core.out_width * hidden_size
    made = shape.num_tokens * core.work_bytes(width)
    return Point(name="recurrence", extra_bytes=residual + made - done, num_weights=weights)


def _scores_again(
    mixer: spec.Attention | spec.LatentAttention,
    layer: spec.Layer,
    hidden_size: int,
    residual: int,
    shape: Shape,
    implementation: Implementation,
    table: Table,
) -> Point:
    """Attention written out that a checkpoint runs again: scores that only its variables hold.

    Formula: one more copy of the scores; with sinks two more (scores, joined, less their largest, probabilities).
    Source: transformers@5.23.0:models/gpt_oss/modeling_gpt_oss.py:eager_attention_forward; models/llama/
        modeling_llama.py:eager_attention_forward.
    """
    width, sinks = int(dtype_bytes(implementation.compute_dtype)), bool(getattr(mixer, "sinks", False))
    scores = shape.num_tokens * _head_sizes(mixer, shape)[0] * (shape.seq_len + sinks) * width
    later = (
        _behind_mixer(layer, table)
        + _rows(table, "o_proj.input", mixer.prefix)
        + _rows(table, f"{mixer.prefix}.o_proj.lora")
    )
    held = residual if implementation.trained else 2 * residual
    for ffn in layer.ffns:
        if isinstance(ffn, spec.MoEFFN) and not ffn.shared_intermediate_size and implementation.moe != "loop":
            rows = shape.num_routed_tokens(ffn.top_k) * (ffn.latent_size or hidden_size)
            held += int(rows * dtype_bytes(implementation.router_dtype))
    return Point(name="attention, run again", extra_bytes=held + scores * (2 if sinks else 1) - later)


def _behind_mixer(layer: spec.Layer, table: Table) -> int:
    """Return the bytes of what runs behind a mixer, and has gone when backward comes to it: FFNs, the second norm."""
    blocks = sum(_rows(table, "", ffn.prefix) for ffn in layer.ffns)
    return blocks + sum(_rows(table, "", norm.name) for norm in layer.norms[1:2])


def _kernel_bytes(heads: int, kv_heads: int, dim: int, v_dim: int, shape: Shape, implementation: Implementation) -> int:
    """Return the workspace of a kernel's backward: dq and row sums in fp32, and expanded gradients of k and v.

    Source: torch@2.13.0:aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp:mha_bwd;
        cuda/mem_eff_attention/kernel_backward.h:workspace_elements_gq (where head sizes differ).
    """
    batch, length = shape.micro_batch_size, shape.seq_len // shape.context_parallel_size
    if dim != v_dim and not implementation.pads_values:
        workspace = round_up(length, 64) * round_up(dim, 64) if max(dim, v_dim) > 64 else 0
        return int(4 * batch * heads * (round_up(length, 32) + workspace))
    rows, wide = round_up(length, 128), round_up(dim, 32 if dim <= 128 else 64)
    expanded = 2 * batch * length * heads * dim * int(dtype_bytes(implementation.compute_dtype))
    return int(4 * batch * heads * rows * (1 + wide)) + (expanded if kv_heads != heads else 0)


def _head_sizes(mixer: spec.Attention | spec.LatentAttention, shape: Shape) -> tuple[int, int, int, int]:
    """Return (query heads, key heads, size of q and k, size of v) on this rank."""
    heads = mixer.num_heads // shape.tensor_parallel_size
    if isinstance(mixer, spec.LatentAttention):
        return heads, heads, mixer.qk_nope_head_dim + mixer.qk_rope_head_dim, mixer.v_head_dim
    kv_heads = max(1, mixer.num_kv_heads // shape.tensor_parallel_size)
    return heads, kv_heads, mixer.head_dim, mixer.v_head_dim or mixer.head_dim


def _ffn_weights(ffn: object, hidden_size: int) -> int:
    if isinstance(ffn, spec.DenseFFN):
        return hidden_size * ffn.intermediate_size * (3 if ffn.gated else 2)
    if isinstance(ffn, spec.MoEFFN):
        inner = ffn.intermediate_size * ffn.num_experts + ffn.shared_intermediate_size
        return hidden_size * inner * (3 if ffn.gated else 2)
    return 0


def _rows(table: Table, start: str, module: str = "") -> int:
    """Return the bytes of the rows whose name begins with ``start``, of a module and what it holds."""
    return table_bytes(
        row
        for row in table
        if row.name.startswith(start) and (not module or row.module == module or row.module.startswith(f"{module}."))
    )


def _experts_rows(table: Table, *ends: str) -> int:
    """Return the bytes of rows of the routed experts, indices and routing weights apart; all of them without a name."""
    apart = ("routing weights", "indices")
    names = {row.name: row.name.removeprefix("experts.") for row in table if row.name.startswith("experts.")}
    return table_bytes(
        row
        for row in table
        if row.name in names and (names[row.name] in ends if ends else names[row.name] not in apart)
    )


def _factors(values: int, gated: bool) -> int:
    return 3 * values if gated else 2 * values


def _width(implementation: Implementation) -> int:
    return int(dtype_bytes(implementation.ffn_dtype or implementation.compute_dtype))
