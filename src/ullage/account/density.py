"""Ratios of a phase: how many of the parameters in memory are used, and how much is computed per byte moved.

A *pass* is ``num_tokens`` tokens going through the model at once: a prompt or its chunk (prefill), one token of each
running request (decode), or a micro-batch (training, forward).
"""

from __future__ import annotations

import math
from fractions import Fraction

from ullage.account.kv_cache import mixer_rows
from ullage.account.parameters import Parameter, Role, layer_parameters
from ullage.account.weights import format_of
from ullage.errors import LayoutError
from ullage.frozen import Frozen
from ullage.spec import model as spec
from ullage.units import dtype_bytes

_MATRICES = (Role.LINEAR, Role.EXPERT, Role.ROUTER)


class Pass(Frozen):
    """FLOPs and bytes of one pass over the decoder layers, and the parameters it touched of those there are."""

    flops: float
    bytes_moved: float
    used_parameters: float
    parameters: int

    @property
    def compute_density(self) -> float:
        """FLOPs per byte moved to or from device memory: the arithmetic intensity of the roofline model."""
        return self.flops / self.bytes_moved if self.bytes_moved else 0.0

    @property
    def parameter_utilisation(self) -> float:
        """Parameters used over parameters in memory."""
        return self.used_parameters / self.parameters if self.parameters else 0.0


def touched_share(top_k: int, num_experts: int, num_tokens: int) -> float:
    """Return the share of the routed experts that ``num_tokens`` tokens reach, when routing is balanced.

    Formula: 1 - (1 - k / E)^T.
    Symbols: k top_k, E num_experts, T num_tokens.
    Source: k of E experts per token, drawn evenly and independently (DeepSeekMoE's balanced case, arXiv:2401.06066).
    Known error: real routing is skewed, so fewer experts are reached.
    """
    return 1.0 - max(0.0, 1.0 - top_k / num_experts) ** num_tokens


def count_pass(model: spec.Model, *, num_tokens: int, context: int, kv_dtype: str, num_sequences: int) -> Pass:
    """Count one pass of ``num_tokens`` tokens that attend to ``context`` tokens each, in ``num_sequences`` sequences.

    Formula: FLOPs = sum over matrices 2 T r c + sum over attention 2 T n h (d_qk + d_v); bytes = stored weights touched
        + T e (r + c) per matrix + cached rows read once per sequence.
    Symbols: T tokens (T k / E per expert), r x c a matrix, n context, h heads, e bytes of an activation.
    Source: Williams et al., Roofline (CACM 52(4), 2009) for the ratio; the matrices are the inventory's.
    Known error: norms, rotary, softmax and what caches save of re-reading are left out.
    """
    flops = moved = used = 0.0
    parameters = 0
    each = float(dtype_bytes(model.dtype))
    kinds: dict[int, tuple[spec.Layer, int]] = {}
    for layer in model.layers:
        kinds[id(layer)] = (layer, kinds.get(id(layer), (layer, 0))[1] + 1)
    for layer, times in kinds.values():
        for parameter in layer_parameters(layer, model.hidden_size):
            counted = _matrix(parameter, model, num_tokens, each)
            flops, moved, used = flops + times * counted[0], moved + times * counted[1], used + times * counted[2]
            parameters += times * math.prod(parameter.shape) * parameter.copies * (not parameter.buffer)
        attention = _attention(layer, num_tokens, context, kv_dtype, num_sequences)
        flops, moved = flops + times * attention[0], moved + times * attention[1]
    return Pass(flops=flops, bytes_moved=moved, used_parameters=used, parameters=parameters)


#: Products of attention's backward over those of its forward: five matrix products against two.
#: Source: Dao 2023, arXiv:2307.08691, sec. 4.1 (backward 2.5 times the FLOPs of the forward).
ATTENTION_BACKWARD = 2.5
#: FLOPs of AdamW for one parameter: decay 2, first moment 3, second 4, root, sum, quotient 3, update 2.
#: Source: Loshchilov and Hutter 2019, arXiv:1711.05101, alg. 2.
ADAMW_FLOPS = 14


def count_backward(
    model: spec.Model, forward: Pass, *, num_tokens: int, context: int, grad_dtype: str, trained: bool, recomputed: bool
) -> Pass:
    """Count the backward pass of a micro-batch of which ``forward`` is the forward pass.

    Formula: gradients of inputs: FLOPs and bytes of the matrices' forward pass again; of trained weights: the same
        FLOPs, T e (r + c) and the gradient written; attention 2.5 times its forward; recomputed layers: the forward
        pass again.
    Source: the matrices are the inventory's; ATTENTION_BACKWARD.
    Known error: as :func:`count_pass`; adapters are left out.
    """
    width, each = float(dtype_bytes(grad_dtype)), float(dtype_bytes(model.dtype))
    flops, moved = (forward.flops, forward.bytes_moved) if recomputed else (0.0, 0.0)
    kinds: dict[int, tuple[spec.Layer, int]] = {}
    for layer in model.layers:
        kinds[id(layer)] = (layer, kinds.get(id(layer), (layer, 0))[1] + 1)
    for layer, times in kinds.values():
        for parameter in layer_parameters(layer, model.hidden_size):
            ahead, bytes_moved, used = _matrix(parameter, model, num_tokens, each)
            flops, moved = flops + times * ahead, moved + times * bytes_moved
            if trained and not parameter.buffer:
                activations = bytes_moved - _weights_moved(parameter, model, num_tokens)
                flops, moved = flops + times * ahead, moved + times * (activations + used * width)
        attention = _attention(layer, num_tokens, context, model.dtype, 1)
        flops += times * ATTENTION_BACKWARD * attention[0]
    return Pass(flops=flops, bytes_moved=moved, used_parameters=forward.used_parameters, parameters=forward.parameters)


def count_step(
    num_elements: int, *, params: str, grads: str, master: str | None, moments: str, num_moments: int
) -> Pass:
    """Count a step of AdamW (or of another with moments): everything read once and written once.

    Formula: FLOPs 14 a parameter; bytes: gradient read, parameters (master and 16-bit copy) and moments read and
        written.
    Source: ADAMW_FLOPS. Known error: a foreach step reads and writes more.
    """
    own = float(dtype_bytes(params)) + (float(dtype_bytes(master)) if master else 0.0)
    per_element = float(dtype_bytes(grads)) + 2 * own + 2 * num_moments * float(dtype_bytes(moments))
    return Pass(
        flops=float(ADAMW_FLOPS) * num_elements,
        bytes_moved=per_element * num_elements,
        used_parameters=num_elements,
        parameters=num_elements,
    )


def _weights_moved(parameter: Parameter, model: spec.Model, num_tokens: int) -> float:
    """Return the stored bytes of a tensor's weights that a pass reads."""
    copies = float(parameter.copies)
    if parameter.role is Role.EXPERT:
        copies *= touched_share(parameter.active_copies, parameter.copies, num_tokens)
    stored = format_of(parameter, dtype=model.dtype, quantization=model.quantization).stored_bytes(parameter.shape)
    return copies * stored


def _matrix(parameter: Parameter, model: spec.Model, num_tokens: int, each: float) -> tuple[float, float, float]:
    """Return (FLOPs, bytes, parameters used) of one tensor of a layer."""
    if parameter.buffer:
        return 0.0, 0.0, 0.0
    size, copies, tokens = math.prod(parameter.shape), float(parameter.copies), float(num_tokens)
    if parameter.role is Role.EXPERT:
        tokens *= parameter.active_copies / parameter.copies
        copies *= touched_share(parameter.active_copies, parameter.copies, num_tokens)
    stored = format_of(parameter, dtype=model.dtype, quantization=model.quantization).stored_bytes(parameter.shape)
    if parameter.role not in _MATRICES or len(parameter.shape) != 2:
        return 0.0, copies * stored, copies * size
    rows, columns = parameter.shape
    products = parameter.copies * tokens
    return 2.0 * products * size, copies * stored + products * each * (rows + columns), copies * size


def _attention(
    layer: spec.Layer, num_tokens: int, context: int, kv_dtype: str, num_sequences: int
) -> tuple[float, float]:
    """Return (FLOPs, cached bytes read) of the scores and their products with the values."""
    flops = moved = 0.0
    for mixer in layer.mixers:
        seen = context
        if isinstance(mixer, spec.Attention):
            seen = min(context, mixer.window or mixer.chunk or context)
            flops += 2.0 * num_tokens * seen * mixer.num_heads * (mixer.head_dim + (mixer.v_head_dim or mixer.head_dim))
        elif isinstance(mixer, spec.LatentAttention):
            seen = min(context, mixer.indexer.top_k) if mixer.indexer else context
            width = mixer.qk_nope_head_dim + mixer.qk_rope_head_dim + mixer.v_head_dim
            if num_tokens == num_sequences:  # decoding absorbs the up-projections: scores over the latent, and its sum
                width = 2 * mixer.kv_lora_rank + mixer.qk_rope_head_dim
            flops += 2.0 * num_tokens * seen * mixer.num_heads * width
        try:
            rows = mixer_rows(mixer, kv_dtype)
        except LayoutError:  # a packed format that this mixer does not have
            rows = ()
        moved += float(sum((row.bytes_per_token for row in rows), Fraction(0))) * seen * num_sequences
    return flops, moved
