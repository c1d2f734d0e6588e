"""Buffers that stay: GEMM workspaces, Megatron-LM's global buffer, stage inputs, rotary tables, dummy gradients."""

from __future__ import annotations

import math

from ullage.engines.megatron.defaults import Settings
from ullage.engines.megatron.holdings import distinct_shapes
from ullage.engines.megatron.layout import Chunk
from ullage.engines.megatron.shape import Sizes
from ullage.engines.megatron.states import Held
from ullage.ledger import Certainty, Term, exact, ranged
from ullage.numeric import larger, shown, some, where
from ullage.spec.model import Attention, LatentAttention, MoEFFN
from ullage.spec.training import TrainingJob
from ullage.units import MiB, tensor_bytes

WORKSPACE = "pytorch@2.9:aten/src/ATen/cuda/CublasHandlePool.cpp:getWorkspaceForHandle"
TE_WORKSPACE = "TransformerEngine@v2.8:transformer_engine/pytorch/module/base.py:get_cublas_workspace_size_bytes"
TE_STREAMS, USERBUFFER_STREAMS = 4, 3


def buffers(
    job: TrainingJob, settings: Settings, parts: tuple[Chunk, ...], sizes: Sizes, held: tuple[Held, ...]
) -> tuple[Term, ...]:
    """Return the persistent buffers of a rank."""
    return (
        _cublas(job, settings, parts),
        _te_workspace(job, settings, parts),
        _global_buffer(job, settings, parts, sizes),
        _stage_inputs(job, parts, sizes),
        _userbuffers(job, settings, sizes),
        _rotary(job, settings, sizes),
        _dummy_gradients(job, settings, held),
        _towers(job, parts),
    )


def _towers(job: TrainingJob, parts: tuple[Chunk, ...]) -> Term:
    """Vision and audio towers: whole on every rank of the first stage, frozen unless a job says otherwise.

    Formula: elements x bytes of a parameter; at least nothing, where the text part alone is trained.
    Source: ms-swift@3602360a:swift/megatron/arguments/megatron_args.py:MegatronTunerMixin (freeze_vit),
        mcore-bridge@1.6.5:model/mm_gpt_model.py.
    Known error: what a tower keeps of its images is not counted; trained, it has gradients and states too.
    """
    if not job.model.towers or not any(chunk.embedding for chunk in parts):
        return exact("vision_towers", 0)
    elements = sum(math.prod(tensor.shape) * tower.copies for tower in job.model.towers for tensor in tower.tensors)
    size = tensor_bytes(elements, job.precision.params)
    return ranged("vision_towers", size, low=0, high=size, formula=f"{elements} x {job.precision.params}, frozen")


def has_moe(job: TrainingJob, parts: tuple[Chunk, ...]) -> bool:
    """Say whether one of the chunks holds a mixture of experts."""
    return any(
        isinstance(block, MoEFFN) for chunk in parts for index in chunk.layers for block in job.model.layers[index].ffns
    )


def _cublas(job: TrainingJob, settings: Settings, parts: tuple[Chunk, ...]) -> Term:
    """PyTorch's own GEMMs keep one workspace for the main thread's handle and one for autograd's.

    They run in the output layer, in unfused attention, in the router and everywhere under ``local``.
    """
    uses = not settings.transformer_engine or settings.attention in ("unfused", "local")
    uses = uses or any(chunk.head for chunk in parts) or has_moe(job, parts)
    each = settings.cublas_workspace_bytes
    number = 2 if uses else 0
    if settings.flags.get("env.CUBLAS_WORKSPACE_CONFIG") or each < 32 * MiB:
        return exact("cublas_workspaces", number * each, formula=f"{number} x {each}", source=WORKSPACE)
    capability = job.machine.gpu.compute_capability or (9, 0)
    low = number * (each if capability < (10, 0) else 8 * MiB + 128 * 1024)
    return ranged(
        "cublas_workspaces",
        number * each,
        low=low,
        high=number * each,
        formula=f"{number} x {each}",
        source=WORKSPACE,
    )


def _te_workspace(job: TrainingJob, settings: Settings, parts: tuple[Chunk, ...]) -> Term:
    """Transformer Engine's workspace; grouped GEMM has four more, overlapped TP communication three in all.

    The router's GEMM is Transformer Engine's even where layers are local.
    """
    if not settings.transformer_engine and not has_moe(job, parts):
        return exact("te_workspaces", 0)
    number = USERBUFFER_STREAMS if settings.on("tp-comm-overlap") else 1
    if settings.grouped_gemm and has_moe(job, parts):
        number += TE_STREAMS
    each = settings.te_workspace_bytes
    return exact("te_workspaces", number * each, formula=f"{number} x {each}", source=TE_WORKSPACE)


def _global_buffer(job: TrainingJob, settings: Settings, parts: tuple[Chunk, ...], sizes: Sizes) -> Term:
    """The global buffer ``mpu``: attention scores of the local kernel, or the gathered input of a Megatron linear.

    Formula: max(b * a/t * s^2 local attention, b * s * h where sequence parallel meets a Megatron-LM linear).
    Source: Megatron-LM@adc69db:megatron/core/utils.py:GlobalMemoryBuffer, transformer/dot_product_attention.py,
    tensor_parallel/layers.py:LinearWithGradAccumulationAndAsyncCommunication.
    """
    elements, formula = 0, ""
    if settings.attention == "local":
        kinds = {id(job.model.layers[index]): job.model.layers[index] for chunk in parts for index in chunk.layers}
        for part in (part for layer in kinds.values() for part in layer.mixers):
            if isinstance(part, Attention):
                elements, formula = _fuller(
                    elements, formula, sizes.scores(part.num_heads, cross=part.cross), "b*a/t*s^2"
                )
    rows = _gathered_for_experts(job, settings, parts, sizes)
    elements, formula = _fuller(elements, formula, rows, "n*h*t_e*EP")
    if any(chunk.head for chunk in parts) or not settings.transformer_engine:
        whole_stream = where(sizes.sequence, sizes.tokens * job.model.hidden_size, 0)
        elements, formula = _fuller(elements, formula, whole_stream, "b*s*h")
    return exact(
        "global_memory_buffer",
        tensor_bytes(elements, job.precision.compute),
        formula=formula,
        source="Megatron-LM@adc69db:megatron/core/utils.py:GlobalMemoryBuffer",
    )


def _fuller(elements: int, formula: str, other: int, words: str) -> tuple[int, str]:
    """Return the larger use of the buffer, with its formula."""
    return larger(elements, other), words if some(other > elements) else formula


def _gathered_for_experts(job: TrainingJob, settings: Settings, parts: tuple[Chunk, ...], sizes: Sizes) -> int:
    """Elements that the allgather dispatcher gathers from all ranks of the expert group.

    Source: Megatron-LM@adc69db:megatron/core/transformer/moe/token_dispatcher.py:MoEAllGatherTokenDispatcher.
    """
    ranks = sizes.expert * sizes.expert_tensor
    if settings.dispatcher != "allgather" or not has_moe(job, parts):
        return 0
    return where(ranks == 1, 0, sizes.stream_tokens * job.model.hidden_size * ranks)


def _stage_inputs(job: TrainingJob, parts: tuple[Chunk, ...], sizes: Sizes) -> Term:
    """The last micro-batch's input of each chunk and its gradient: the module holds on to them.

    Formula: 2*n*h per chunk that receives; transfers under way may hold up to 2*P more.
    Source: Megatron-LM@adc69db:megatron/core/transformer/transformer_block.py:TransformerBlock.set_input_tensor.
    """
    pipeline = job.parallel.pipeline_parallel_size
    number = sum(chunk.receives for chunk in parts) if pipeline > 1 else 0
    each = tensor_bytes(sizes.stream_tokens * job.model.hidden_size, job.precision.compute)
    return ranged(
        "stage_inputs",
        2 * number * each,
        low=0,
        high=2 * (number + (pipeline if number else 0)) * each,
        formula=f"2 x {number} x n*h",
        source="Megatron-LM@adc69db:megatron/core/transformer/transformer_block.py:TransformerBlock.set_input_tensor",
    )


def _userbuffers(job: TrainingJob, settings: Settings, sizes: Sizes) -> Term:
    """Buffers through which tensor-parallel communication overlaps GEMMs: one of T*h per overlapped GEMM.

    Formula: 10 x T*h x 2 bytes (four forward, four data-gradient and two weight-gradient GEMMs), at most.
    Source: TransformerEngine@v2.8:transformer_engine/pytorch/module/base.py:initialize_ub.
    """
    if not settings.on("tp-comm-overlap"):
        return exact("userbuffers", 0)
    size = 10 * tensor_bytes(sizes.tokens * job.model.hidden_size, job.precision.compute)
    return ranged("userbuffers", size, low=size // 2, high=2 * size, formula="10 x T*h", source=TE_WORKSPACE)


def _rotary(job: TrainingJob, settings: Settings, sizes: Sizes) -> Term:
    """Cached rotary tables: s x d fp32 (MLA: cosine and sine)."""
    width = 0
    for layer in job.model.layers[:1]:
        for part in layer.mixers:
            if isinstance(part, LatentAttention):
                width = 2 * part.qk_rope_head_dim
            elif isinstance(part, Attention) and not job.model.learned_positions:
                width = part.head_dim
    if settings.flags.get("position-embedding-type") == "none":
        width = 0
    source = "Megatron-LM@adc69db:megatron/core/models/common/embeddings/rotary_pos_embedding.py"
    return exact("rotary_tables", 4 * width * job.seq_len, formula="4*s*d", source=source)


def _dummy_gradients(job: TrainingJob, settings: Settings, held: tuple[Held, ...]) -> Term:
    """Transformer Engine's dummy weight gradients under fused accumulation: one per distinct weight shape.

    Formula: sum over distinct shapes (rows, columns) of rows * columns in the parameter format.
    Source: TransformerEngine@v2.8:transformer_engine/pytorch/module/base.py:get_dummy_wgrad.
    """
    if not (settings.transformer_engine and settings.wgrad_fusion):
        return exact("dummy_weight_gradients", 0)
    kinds = {id(kind): kind for chunk in held for kind, _times in chunk}
    elements, number = distinct_shapes(list(kinds.values()))
    return Term(
        name="dummy_weight_gradients",
        bytes=tensor_bytes(elements, job.precision.params),
        low_bytes=0,
        high_bytes=tensor_bytes(elements, job.precision.params),
        certainty=Certainty.MODELLED,
        formula=f"{shown(number)} shapes, {shown(elements)} elements",
        source="TransformerEngine@v2.8:transformer_engine/pytorch/module/base.py:get_dummy_wgrad",
    )
