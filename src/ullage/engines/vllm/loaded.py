"""The weights as vLLM keeps them: what "Model loading took" counts, but for buffers that are no weights.

Beyond the checkpoint's tensors: fused projections rounded by the allocator, kernels' padding, rotary tables, the
dequantised copy of ``kv_b_proj`` that latent attention absorbs, and the workspaces of some kernels.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import lru_cache

from ullage.account.sharding import LocalParameter, frame_share, layer_share
from ullage.account.weights import KEEP, KeepOr, format_of, weights_term
from ullage.engines.vllm.defaults import Setup
from ullage.engines.vllm.layout import Stage, sequence_parallel_moe
from ullage.ledger import Term, ranged, total
from ullage.spec import model as spec
from ullage.units import MiB, dtype_bytes, round_up

#: Kernel workspaces and buffers that are no parameters (Marlin locks, masks, permutations), at most.
_SMALL_BUFFERS = 48 * MiB

#: Positions of a table for time, height and width, for each position that the config declares.
SECTIONED_POSITIONS = 4

_FUSED = (
    (re.compile(r"\.(?:q_proj|k_proj|v_proj|query|key|value)\."), ".qkv."),
    (re.compile(r"\.(?:gate_proj|up_proj|w1|w3)\."), ".gate_up."),
    (re.compile(r"\.(?:q_a_proj|kv_a_proj_with_mqa)\."), ".qkv_a."),
    (re.compile(r"\.in_proj_(?:qkvz|ba|qkv|z|a|b)\."), ".in_proj."),
)


def quantization_of(setup: Setup) -> KeepOr:
    """Return how weights are held when it is not the checkpoint's way.

    Raises:
        InputError: a method that is not known.
    """
    name = setup.job.quantization
    if not name or setup.job.model.quantization is not None:
        return KEEP
    from ullage.read.hf_config.quantization import named_quantization

    return named_quantization(name, setup.job.model)


def rounded(num_bytes: int, *, never_split: bool = False) -> int:
    """Return what torch's CUDA allocator counts for one tensor that stays.

    Formula: multiples of 512 B; from 10 MiB on, a segment of whole 2 MiB is asked for and its rest stays with the
        tensor when it is 1 MiB or less (or always, above the 20 MiB split limit of newer versions).
    Source: pytorch@2.8:c10/cuda/CUDACachingAllocator.cpp:get_allocation_size, should_split;
        vllm@0.33.0:vllm/v1/worker/gpu_worker.py:Worker.load_model (``max_split_size_mb=20``).
    """
    small = round_up(num_bytes, 512)
    if small < 10 * MiB:
        return small
    large = round_up(small, 2 * MiB)
    if large - small <= MiB or (never_split and large >= 20 * MiB):
        return large
    return small


def _fused_name(name: str) -> str:
    for pattern, replacement in _FUSED:
        name = pattern.sub(replacement, name)
    return name


@lru_cache(maxsize=512)
def _rounding_of_layer(
    locals_: tuple[LocalParameter, ...], dtype: str, rules: spec.Quantization | None, never_split: bool
) -> int:
    """Return the bytes that rounding adds to one group of tensors, once projections are fused."""
    sizes: dict[str, int] = {}
    for local in locals_:
        format_ = format_of(local.parameter, dtype=dtype, quantization=rules)
        name = _fused_name(local.parameter.name)
        values = int(math.prod(local.shape) * dtype_bytes(format_.dtype)) * local.copies
        scales = max(0, format_.stored_bytes(local.shape) * local.copies - values)
        sizes[name] = sizes.get(name, 0) + values
        sizes[name + ".scale"] = sizes.get(name + ".scale", 0) + scales
    return sum(rounded(size, never_split=never_split) - size for size in sizes.values())


def _rounding(setup: Setup, stage: Stage, rules: spec.Quantization | None) -> Term:
    model, share = setup.job.model, stage.share
    dtype, never = setup.job.weights_dtype or model.dtype, bool(setup.version.setting("split_limit"))
    added = 0
    for index in range(*share.layers):
        added += _rounding_of_layer(layer_share(model.layers[index], model.hidden_size, share), dtype, rules, never)
    frame = tuple(
        LocalParameter(parameter=held.placed.parameter, component=held.component, shape=held.shape, copies=held.copies)
        for held in frame_share(model, share)
    )
    added += _rounding_of_layer(frame, dtype, rules, never)
    return ranged(
        "allocator_rounding",
        added,
        low=0,
        high=2 * added + _SMALL_BUFFERS,
        formula="fused tensors rounded to 512 B, from 10 MiB on to 2 MiB",
        source="pytorch@2.8:c10/cuda/CUDACachingAllocator.cpp:should_split",
    )


def _rotary(setup: Setup, stage: Stage) -> Term:
    """Return the rotary tables: one for each kind of rotation, cosine and sine side by side, not split.

    Formula: max_position_embeddings x rotary_dim x e, for each distinct (dim, window or not).
    Source: vllm@0.33.0:vllm/model_executor/layers/rotary_embedding/base.py:_compute_cos_sin_cache, __init__.py:get_rope
        (one cached instance for equal arguments); mrope.py:MRotaryEmbedding (four times the positions where they rotate
        by sections, unless a model asks for one). V4's indexer and compressor may keep tables of their own.
    """
    model = setup.job.model
    element = int(dtype_bytes(setup.job.weights_dtype or model.dtype))
    packed = any(isinstance(mixer, spec.CompressedAttention) for mixer in model.layers[0].mixers)
    kinds: set[tuple[int, bool, int]] = set()
    for layer in model.layers[slice(*stage.share.layers)]:
        for mixer in layer.mixers:
            if isinstance(mixer, spec.Attention):
                kinds.add((mixer.rotary_dim or mixer.head_dim, mixer.window is not None and _two_kinds(model), element))
            elif isinstance(mixer, spec.LatentAttention) and mixer.rope:
                kinds.add((mixer.qk_rope_head_dim, False, 4))
            elif isinstance(mixer, spec.CompressedAttention):
                kinds.add((mixer.qk_rope_head_dim, mixer.compress_ratio > 0, 4))
    least = sum(model.max_position_embeddings * dim * size for dim, _kind, size in kinds)
    times = SECTIONED_POSITIONS if model.rotary_sections else 1
    widths = [dim for dim, _kind, _size in sorted(kinds)]
    return ranged(
        "rotary_tables",
        times * least,
        low=least,
        high=(2 if packed else times) * least,
        formula=f"{times * model.max_position_embeddings:,} positions x {widths} values",
        source="vllm@0.33.0:vllm/model_executor/layers/rotary_embedding/base.py:_compute_cos_sin_cache",
    )


@lru_cache(maxsize=64)
def _two_kinds(model: spec.Model) -> bool:
    """Tell whether local and global layers differ in more than the window: Gemma rotates them differently."""
    heads = {
        (mixer.window is None) for layer in model.layers for mixer in layer.mixers if isinstance(mixer, spec.Attention)
    }
    return len(heads) > 1 and any(
        isinstance(mixer, spec.Attention) and mixer.qk_norm is not None and mixer.window is not None
        for mixer in model.layers[0].mixers
    )


def _absorbed(setup: Setup, stage: Stage, rules: spec.Quantization | None) -> Term:
    """Return the dequantised copy of ``kv_b_proj`` that latent attention multiplies into queries and outputs.

    Formula: layers x (N / t) x (Dn + Dv) x r x e where ``kv_b_proj`` is quantised; views of it, hence 0, where not.
    Source: vllm@0.33.0:vllm/model_executor/layers/attention/mla_attention.py:process_weights_after_loading,
        split_kv_b_proj (W_UK_T and W_UV are transposed views of one dequantised matrix; kv_b_proj is kept for prefill).
    """
    model, tp = setup.job.model, stage.share.attention_tp
    num_bytes, layers = 0, 0
    for layer in model.layers[slice(*stage.share.layers)]:
        for mixer in layer.mixers:
            if isinstance(mixer, spec.LatentAttention) and rules is not None and setup.version.setting("mla"):
                width = mixer.num_heads // tp * (mixer.qk_nope_head_dim + mixer.v_head_dim)
                num_bytes += width * mixer.kv_lora_rank * 2
                layers += 1
    return ranged(
        "mla_absorbed",
        num_bytes,
        low=0,
        high=num_bytes,
        formula=f"{layers} layers x heads x (nope + value) x latent x 2 B",
        source="vllm@0.33.0:vllm/model_executor/layers/attention/mla_attention.py:split_kv_b_proj",
    )


def _mxfp4_multiple(setup: Setup) -> tuple[int, int]:
    """Return the multiples that (intermediate per rank, hidden) are padded to by the MXFP4 kernel of the device.

    Source: vllm@0.22.1:vllm/model_executor/layers/fused_moe/oracle/mxfp4.py:mxfp4_round_up_hidden_size_and_
        intermediate_size; vllm@0.11.0:vllm/model_executor/layers/quantization/mxfp4.py:Mxfp4MoEMethod.create_weights.
    """
    gpu = setup.job.machine.gpu
    major = (gpu.compute_capability or (9, 0))[0]
    if gpu.vendor == "amd":
        return 256, 256
    if major == 9:
        return 64, 1  # Triton kernels of Hopper
    if major == 10:
        return 256, 256  # TRT-LLM kernels
    return 128, 256  # Marlin: Ampere, Ada, consumer Blackwell


def padded_model(setup: Setup, share_tp: int, rules: KeepOr) -> spec.Model:
    """Return the model with expert sizes as the kernels pad them (MXFP4 only)."""
    model = setup.job.model
    quantization = model.quantization if rules is KEEP else rules
    if not isinstance(quantization, spec.Quantization) or "mxfp4" not in quantization.method:
        return model
    inner_multiple, _hidden = _mxfp4_multiple(setup)
    kinds: dict[int, spec.Layer] = {}
    for layer in model.layers:
        if id(layer) not in kinds:
            kinds[id(layer)] = replace(
                layer, ffns=tuple(_padded_ffn(ffn, inner_multiple, share_tp) for ffn in layer.ffns)
            )
    return replace(model, layers=tuple(kinds[id(layer)] for layer in model.layers))


def with_values(model: spec.Model) -> spec.Model:
    """Return the model with a value projection in every layer: a shared one is loaded into both slots.

    Source: vllm@0.33.0:vllm/model_executor/models/gemma4.py (attention_k_eq_v: k_proj fills K and V of qkv_proj).
    """
    if not any(isinstance(m, spec.Attention) and m.value_is_key for layer in model.layers for m in layer.mixers):
        return model
    kinds = {id(layer): layer for layer in model.layers}
    loaded = {
        key: replace(
            layer,
            mixers=tuple(
                replace(mixer, value_is_key=False) if isinstance(mixer, spec.Attention) else mixer
                for mixer in layer.mixers
            ),
        )
        for key, layer in kinds.items()
    }
    return replace(model, layers=tuple(loaded[id(layer)] for layer in model.layers))


def _padded_ffn(ffn: spec.FeedForward, multiple: int, tp: int) -> spec.FeedForward:
    if not isinstance(ffn, spec.MoEFFN):
        return ffn
    return replace(ffn, intermediate_size=round_up(-(-ffn.intermediate_size // tp), multiple) * tp)


def _hidden_padding(setup: Setup, stage: Stage, rules: KeepOr, weights: Term) -> Term:
    """Return what padding the hidden axis of MXFP4 experts adds: routed experts x (padded / hidden - 1)."""
    model = setup.job.model
    quantization = model.quantization if rules is KEEP else rules
    routed = next((child.bytes for child in weights.children if child.name == "routed_experts"), 0)
    added = 0
    if isinstance(quantization, spec.Quantization) and "mxfp4" in quantization.method:
        multiple = _mxfp4_multiple(setup)[1]
        added = routed * (round_up(model.hidden_size, multiple) - model.hidden_size) // model.hidden_size
        if multiple == 1:
            added = _swizzled(model, stage, routed)
    return ranged(
        "kernel_padding",
        added,
        low=0,
        high=added,
        formula="experts x (padded hidden / hidden - 1)",
        source="vllm@0.22.1:vllm/model_executor/layers/fused_moe/oracle/mxfp4.py",
    )


def _swizzled(model: spec.Model, stage: Stage, routed: int) -> int:
    """Return what Triton's Hopper layout adds: each row of packed values is padded to 128 bytes, scales are not.

    Formula: values x (2/3 (pad(H) / H - 1) + 1/3 (pad(I/t) / (I/t) - 1)), pad to 256 values; values 16/17 of the bytes.
    Source: triton_kernels (Triton 3.4) tensor_details/layout_details/hopper_value.py:HopperMXValueLayout;
        vllm@0.11.0:vllm/model_executor/layers/quantization/utils/mxfp4_utils.py:_swizzle_mxfp4.
    """
    part = next(ffn for layer in model.layers for ffn in layer.ffns if isinstance(ffn, spec.MoEFFN))
    sizes = ((2, model.hidden_size), (1, -(-part.intermediate_size // stage.share.expert_tp)))
    values = routed * 16 // 17
    return sum(values * weight * (round_up(size, 256) - size) // (3 * size) for weight, size in sizes)


def loaded_weights(setup: Setup, stage: Stage) -> Term:
    """Return the weights of one rank, less what is offloaded to the host.

    Source: vllm@0.33.0:vllm/v1/worker/gpu_model_runner.py:load_model (DeviceMemoryProfiler around it).

    Raises:
        LayoutError: the layout does not divide the model.
    """
    job, rules = setup.job, quantization_of(setup)
    quantization = job.model.quantization if rules is KEEP else rules
    assert quantization is None or isinstance(quantization, spec.Quantization)
    model = with_values(padded_model(setup, stage.share.expert_tp, rules))
    tensors = weights_term(model, stage.share, quantization=rules, dtype=job.weights_dtype)
    children = [
        *tensors.children,
        _hidden_padding(setup, stage, rules, tensors),
        _absorbed(setup, stage, quantization),
        _rotary(setup, stage),
        _rounding(setup, stage, quantization),
    ]
    if job.draft_model is not None and stage.last:
        drafted = replace(setup, job=replace(job, model=job.draft_model, draft_model=None, quantization=None))
        share = replace(stage.share, layers=(0, len(job.draft_model.layers)), embedding=True, mtp=False, towers=False)
        drafts = weights_term(drafted.job.model, share, dtype=job.weights_dtype)
        children.append(replace(drafts, name="draft_model"))
    term = total("weights", [child for child in children if child.high_bytes])
    # Small tensors that the engine drops or fuses (unused biases, norms of tied layers) are within two thousandths.
    return _offloaded(job.cpu_offload_bytes, replace(term, low_bytes=term.low_bytes - term.low_bytes // 500))


def _offloaded(offload: int, term: Term) -> Term:
    """Take weights that stay in host memory off the device's; whole parameters move, up to the budget."""
    if not offload:
        return term
    kept = max(0, term.bytes - offload)
    layer = max(1, term.bytes // 40)
    return replace(
        term,
        bytes=kept,
        low_bytes=max(0, kept - layer),
        high_bytes=max(kept, kept + layer),
        children=(),
        formula=f"{term.bytes:,} - {offload:,} offloaded to the host",
    )


__all__ = ["loaded_weights", "quantization_of", "rounded", "sequence_parallel_moe"]
