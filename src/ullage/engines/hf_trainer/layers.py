"""The activations of one pass: what every layer keeps and works with, and which layer's backward is the worst."""

from __future__ import annotations

import math
from dataclasses import replace

from ullage.account.activations.backward import backward_points
from ullage.account.activations.layer import layer_table
from ullage.account.activations.norms import norm_table
from ullage.account.activations.packed import written_out_points
from ullage.account.activations.recompute import LayerMemory, is_recomputed, layer_memory
from ullage.account.activations.saved import SavedTensor, Shape, table_bytes
from ullage.account.parameters import layer_parameters
from ullage.engines.hf_trainer import adapted, experts
from ullage.engines.hf_trainer.defaults import Recipe
from ullage.frozen import Frozen
from ullage.spec import model as spec
from ullage.spec.training import TrainingJob
from ullage.units import dtype_bytes


class Pass(Frozen):
    """One micro-batch through the model.

    Attributes:
        layers: in order; equal layers are equal values.
        grad_bytes: trained gradients that each layer's backward leaves.
        stream_bytes: one copy of the residual stream; head_input_bytes: of the head's input.
        frame_bytes: final norm, rotary tables, token ids, embeddings that stay.
    """

    layers: tuple[LayerMemory, ...]
    grad_bytes: tuple[int, ...]
    stream_bytes: int
    head_input_bytes: int
    frame_bytes: int

    @property
    def kept_bytes(self) -> int:
        """What all layers keep."""
        return sum(layer.kept_bytes for layer in self.layers)


def micro_batch(job: TrainingJob) -> Shape:
    """Return the sizes of one micro-batch."""
    return Shape(micro_batch_size=job.micro_batch_size, seq_len=job.seq_len)


def forward_pass(job: TrainingJob, recipe: Recipe) -> Pass:
    """Return what one micro-batch keeps, layer by layer.

    Source: transformers@5.23.0:modeling_layers.py:GradientCheckpointingLayer.__call__ and the tables it runs.
    """
    model, shape, implementation = job.model, micro_batch(job), recipe.implementation
    width = dtype_bytes(implementation.residual_dtype)
    stream = int(shape.num_tokens * model.hidden_size * width)
    narrow = int(shape.num_tokens * model.hidden_size * dtype_bytes(implementation.compute_dtype))
    memory: dict[tuple[spec.Layer, bool, bool], LayerMemory] = {}
    layers: list[LayerMemory] = []
    for index, layer in enumerate(model.layers):
        again = is_recomputed(job.recompute, index, len(model.layers))
        blind = not index and not again and _no_gradient_before(job)
        key = (layer, again, blind)
        if key not in memory:
            memory[key] = _layer(job, recipe, layer, again=again, stream=stream, blind=blind)
        found = memory[key]
        if not index and again and recipe.norms_fp32:  # embeddings stay narrow; the first norm widens the stream
            found = replace(found, kept_bytes=found.kept_bytes - (stream - narrow))
        layers.append(found)
    return Pass(
        layers=tuple(layers),
        grad_bytes=tuple(_grads(job, layer, recipe) for layer in model.layers),
        stream_bytes=stream,
        head_input_bytes=stream if recipe.norms_fp32 else narrow,
        frame_bytes=_frame(job, recipe, shape),
    )


def _no_gradient_before(job: TrainingJob) -> bool:
    """Return whether nothing before the first adapter has a gradient, so that the first norm keeps nothing.

    Source: peft@0.19.1:peft_model.py:PeftModel._prepare_model_for_gradient_checkpointing (embeddings that require a
        gradient, only where layers are recomputed); utils/other.py:prepare_model_for_kbit_training likewise.
    """
    lora = job.lora
    blind = lora is not None and not lora.trained_modules and not adapted.reaches_input(job)
    return blind and job.recompute.kind == "none"


def _layer(
    job: TrainingJob, recipe: Recipe, layer: spec.Layer, *, again: bool, stream: int, blind: bool
) -> LayerMemory:
    """Return one layer: its table, its adapters', and what its backward needs. ``blind``: no gradient comes before."""
    shape, implementation, hidden = micro_batch(job), recipe.implementation, job.model.hidden_size
    table: tuple[SavedTensor, ...] = layer_table(layer, hidden, shape, implementation)
    rows = adapted.rows_of(job, layer, recipe.adapters, shape)
    masks = adapted.mask_rows(job, recipe, layer, shape)
    table = _before_first(layer, (*table, *masks), rows) if blind else (*table, *masks)
    table += rows
    width = dtype_bytes(job.precision.grads) if implementation.trained else 0
    more = (stream if again and recipe.reentrant else 0) + experts.dequantised_bytes(job, layer)
    more += adapted.work_of(job, layer, recipe.adapters)
    points = tuple(
        (point.extra_bytes + more, int(point.num_weights * width))
        for point in backward_points(layer, hidden, shape, implementation, table, recomputed=again)
    )
    if job.base_quantization is not None:
        written = written_out_points(
            layer, hidden, shape, implementation, table, recomputed=again, reentrant=recipe.reentrant
        )
        points += tuple((point.extra_bytes, 0) for point in written)
    if again:
        table = _without_input(table, layer, implementation.residual_dtype)
    return layer_memory(table, recomputed=again, recompute=job.recompute, input_bytes=stream, backward=points)


def _before_first(
    layer: spec.Layer, table: tuple[SavedTensor, ...], rows: tuple[SavedTensor, ...]
) -> tuple[SavedTensor, ...]:
    """Drop what lies before the first adapter, where no gradient arrives: a norm, or all of attention and two norms."""
    mixers = tuple(mixer.prefix for mixer in layer.mixers)
    inside = any(row.module.startswith(mixers) or row.name.startswith(mixers) for row in rows)
    whole = rows and not inside and len(layer.norms) == 2 and not layer.parallel
    gone = {norm.name for norm in layer.norms[: 2 if whole else 1]}
    return tuple(
        row
        for row in table
        if row.module not in gone and not (whole and (row.module in mixers or row.module.startswith(mixers)))
    )


def _without_input(table: tuple[SavedTensor, ...], layer: spec.Layer, residual: str) -> tuple[SavedTensor, ...]:
    """Drop the first norm's input where it is the checkpoint itself: no cast lies between."""
    first = layer.norms[0].name if layer.norms else ""
    for row in table:
        if row.module == first and row.name.startswith("input") and row.dtype == residual:
            return tuple(one for one in table if one is not row)
    return table


def _grads(job: TrainingJob, layer: spec.Layer, recipe: Recipe) -> int:
    if not recipe.implementation.trained:
        return 0
    parameters = layer_parameters(layer, job.model.hidden_size)
    elements = sum(math.prod(one.shape) * one.copies for one in parameters if not one.buffer)
    return int(elements * dtype_bytes(job.precision.grads))


def _frame(job: TrainingJob, recipe: Recipe, shape: Shape) -> int:
    """Return what is kept outside the layers.

    Formula: final norm + rotary cosine and sine of one sequence + with adapters
        and scaled embeddings the unscaled ones, a leaf that requires a gradient.
    Source: transformers@4.45.2:models/granite/modeling_granite.py:GraniteModel.forward;
        peft@0.13.2:peft_model.py (make_inputs_require_grad).
    """
    implementation = recipe.implementation
    found = sum(table_bytes(norm_table(norm, shape, implementation)) for norm in job.model.final_norms)
    if implementation.attention in ("eager", "unfused") and job.recompute.kind == "full":
        found += _masks(job, shape, int(dtype_bytes(implementation.compute_dtype)))
    found += 2 * job.seq_len * _rotary_width(job.model) * int(dtype_bytes(implementation.compute_dtype))
    found += adapted.frame_of(job, shape)
    if recipe.scaled_embeddings and job.lora is not None:
        found += shape.num_tokens * job.model.hidden_size * int(dtype_bytes(implementation.compute_dtype))
    return found


def _masks(job: TrainingJob, shape: Shape, width: int) -> int:
    """Return the masks of attention written out: one of b s s per kind of attention, held as arguments of checkpoints.

    Source: transformers@5.23.0:masking_utils.py:eager_mask, create_sliding_window_causal_mask.
    """
    kinds = {bool(getattr(mixer, "window", None)) for layer in job.model.layers for mixer in layer.mixers}
    return shape.num_tokens * job.seq_len * width * len(kinds)


def _rotary_width(model: spec.Model) -> int:
    for mixer in model.layers[0].mixers:
        if isinstance(mixer, spec.Attention):
            return mixer.rotary_dim or mixer.head_dim
        if isinstance(mixer, spec.LatentAttention):
            return mixer.qk_rope_head_dim
    return 0


class Fullest(Frozen):
    """The fullest moment of a backward pass: a layer, one of its points, and the gradients of weights by then."""

    layer: int
    point: int
    grad_bytes: int


def worst_backward(one_pass: Pass, *, grads_before: int, all_grads: bool) -> Fullest:
    """Return the moment of the backward that needs most: checkpoints, working set and gradients so far.

    Args:
        one_pass: the micro-batch.
        grads_before: gradients that the head's and final norm's backward left.
        all_grads: the gradients of every layer stand already (an earlier micro-batch made them).
    """
    best, found = -1, Fullest(layer=0, point=0, grad_bytes=0)
    kept, grads = one_pass.kept_bytes, 0 if all_grads else grads_before
    for index in range(len(one_pass.layers) - 1, -1, -1):
        layer = one_pass.layers[index]
        for number, (extra, own) in enumerate(layer.points):
            with_own = grads + (0 if all_grads else own)
            if kept + extra + with_own > best:
                best = kept + extra + with_own
                found = Fullest(layer=index, point=number, grad_bytes=with_own)
        kept -= layer.kept_bytes
        grads += 0 if all_grads else one_pass.grad_bytes[index]
    return found
