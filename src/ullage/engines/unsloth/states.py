"""What lies on the GPU between two steps under Unsloth: base, adapters, trained copies, states, buffers, rotations."""

from __future__ import annotations

from dataclasses import replace

from ullage.account.gradients import gradients_term
from ullage.account.lora import adapter_parameters, copied_parameters
from ullage.account.optimizer import Trained, optimizer_terms
from ullage.account.sharding import whole
from ullage.account.weights import weights_term
from ullage.engines.hf_trainer.layers import micro_batch
from ullage.engines.hf_trainer.states import base_quantization, workspaces
from ullage.engines.unsloth.layers import largest_fused, written_out_bytes
from ullage.engines.unsloth.rules import (
    GROWING_ROTARY,
    NARROW_COPIES,
    SHARED_ROTARY,
    TWO_BUFFERS,
    WEIGHT_BUFFER,
    Rules,
)
from ullage.frozen import Frozen
from ullage.ledger import Term, exact, ranged, total
from ullage.spec.model import Attention
from ullage.spec.training import TrainingJob
from ullage.units import dtype_bytes, round_up

#: Elements of a buffer for checkpoints at first. Source: unsloth-zoo@ce232d6c:gradient_checkpointing.py
#: (INITIAL_GPU_BUFFER_SIZE).
FIRST_BUFFER = 2 * 256 * 2048
#: Positions of a table of rotations at first, and how it grows. Source: unsloth@015bdef0:models/llama.py:
#: LlamaRotaryEmbedding.__init__, extend_rope_embedding.
FIRST_POSITIONS, MORE_POSITIONS = 4 * 8192, 8192


class States(Frozen):
    """What stays on the GPU; ``trained`` adapters and full ``copies`` of modules, of ``copies_dtype``.

    ``held`` are the terms of every moment; gradients and optimizer come and go.
    """

    held: tuple[Term, ...]
    trained: Trained
    copies: Trained
    copies_dtype: str
    gradients: Term
    optimizer: Term


def states(job: TrainingJob, rules: Rules) -> States:
    """Return what stays on the GPU under a job: fp32 adapters with fp32 moments, copies in a dtype of their own.

    Source: unsloth-zoo@ce232d6c:training_utils.py:prepare_model_for_training; unsloth@015bdef0:models/llama.py:
        _offload_frozen_module_for_training (fp16 copies become fp32).
    """
    assert job.lora is not None
    trained, copies = adapter_parameters(job.model, job.lora), copied_parameters(job.model, job.lora)
    wide = job.precision.compute == "float16" or rules.version < NARROW_COPIES
    dtype = "float32" if wide else job.precision.compute
    adapters = int(4 * trained.num_elements)
    full = int(copies.num_elements * dtype_bytes(dtype))
    held = [
        base_weights(job, rules),
        exact("adapters", adapters, formula=f"{trained.num_elements:,} x float32", source="arXiv:2106.09685"),
        exact("trained_copies", full, formula=f"{copies.num_elements:,} x {dtype}"),
        checkpoint_buffers(job, rules),
        weight_buffer(job, rules),
        rotary_tables(job, rules),
        workspaces(job),
    ]
    gradients = [gradients_term(trained, dtype="float32"), gradients_term(copies, dtype=dtype)]
    moments = [
        optimizer_terms(job.optimizer, one, moments=width, params=width, master=None)
        for one, width in ((trained, "float32"), (copies, dtype))
        if one.tensors
    ]
    return States(
        held=tuple(term for term in held if term.high_bytes),
        trained=trained,
        copies=copies,
        copies_dtype=dtype,
        gradients=total("gradients", gradients),
        optimizer=total("optimizer", moments, source=moments[0].source),
    )


def base_weights(job: TrainingJob, rules: Rules) -> Term:
    """Return the frozen base: 16 bits, or 4 bits with nested scales; nothing is made fp32.

    Formula: less the frozen embeddings and head of which there are trained copies, where checkpoints go to the host:
        their originals are files then.
    Source: unsloth@015bdef0:models/llama.py:FastLlamaModel.from_pretrained (bnb_4bit_use_double_quant, nf4),
        get_peft_model (offload_input_embeddings, offload_output_embeddings); unsloth-zoo@ce232d6c:training_utils.py:
        prepare_model_for_training (no fp32 norms beside adapters).
    """
    share = replace(whole(job.model), mtp=False, towers=False)
    compute = job.precision.compute
    base = weights_term(job.model, share, quantization=base_quantization(job), dtype=compute)
    assert job.lora is not None
    if not rules.offloads or not job.lora.trained_modules or job.model.tied_embeddings:
        return base
    gone = int(copied_parameters(job.model, job.lora).num_elements * dtype_bytes(compute))
    size = base.bytes - gone
    return exact("weights", size, formula="without the frozen embeddings, which are on the disk", source=base.source)


def checkpoint_buffers(job: TrainingJob, rules: Rules) -> Term:
    """Return the buffers that checkpoints come back into.

    Formula: nh in the compute dtype, 2 MiB at least; from 2026-05 on two, where 512 MiB are free.
    Source: unsloth-zoo@ce232d6c:gradient_checkpointing.py:initialize_unsloth_gradient_checkpointing,
        UnslothCheckpointFunction.forward.
    """
    if rules.checkpoints != "buffered":
        return exact("checkpoint_buffers", 0)
    width = dtype_bytes(job.precision.compute)
    one = int(max(FIRST_BUFFER, micro_batch(job).num_tokens * job.model.hidden_size) * width)
    first = int(FIRST_BUFFER * width) if rules.version >= TWO_BUFFERS else 0
    size = 2 * one if first else one
    source = "unsloth-zoo@ce232d6c:gradient_checkpointing.py:UnslothCheckpointFunction"
    return ranged("checkpoint_buffers", size, low=one, high=size, formula="input of a layer", source=source)


def weight_buffer(job: TrainingJob, rules: Rules) -> Term:
    """Return the buffer into which 4-bit weights are written out in forward: of the largest, with its scales.

    Source: unsloth@015bdef0:kernels/utils.py:fast_dequantize (WEIGHT_BUFFER, ABSMAX_BUFFER), matmul_lora.
    """
    size = written_out_bytes(job, largest_fused(job)) if rules.version >= WEIGHT_BUFFER else 0
    return exact(
        "weight_buffer",
        size,
        formula="the largest packed weight, written out",
        source="unsloth@015bdef0:kernels/utils.py:fast_dequantize",
    )


def rotary_tables(job: TrainingJob, rules: Rules) -> Term:
    """Return cosines and sines of every position of the context, not of the sequence.

    Formula: 2 x positions x head size; one table for all layers, before 2025-01 one each, of no more than 32,768
        positions or the sequence from 2024-07 on.
    Source: unsloth@015bdef0:models/llama.py:LlamaModel_fast_forward (extend_rope_embedding to
        max_position_embeddings), LlamaRotaryEmbedding; unsloth@54dd81de; unsloth@659889c5.
    Known error: transformers before 4.48 has no position_embeddings, and its tables grow with the sequence only.
    """
    mixer = next(part for part in job.model.layers[0].mixers if isinstance(part, Attention))
    positions = job.model.max_position_embeddings or FIRST_POSITIONS
    longest = min(FIRST_POSITIONS, positions)
    if longest < job.seq_len:
        longest = round_up(job.seq_len, MORE_POSITIONS)
    per_position = int(2 * mixer.head_dim * dtype_bytes(job.precision.compute))
    if rules.version < SHARED_ROTARY:
        each = longest if rules.version >= GROWING_ROTARY else positions
        size = len(job.model.layers) * each * per_position
        low = longest * per_position
    else:
        size, low = max(longest, positions) * per_position, longest * per_position
    source = "unsloth@015bdef0:models/llama.py:LlamaRotaryEmbedding"
    return ranged(
        "rotary_tables", size, low=min(low, size), high=size, formula=f"{positions:,} positions", source=source
    )
