"""The activation peak of the profiling run: what torch holds at most while a full batch goes through.

Two moments compete: the widest layer of the forward pass over ``max_num_batched_tokens`` tokens, and the sampler over
``max_num_seqs`` rows of logits. With 1,024 rows and a large vocabulary the sampler wins.
"""

from __future__ import annotations

import math

from ullage.engines.vllm.defaults import Setup
from ullage.engines.vllm.dequantised import unpacked_bytes
from ullage.engines.vllm.layout import Stage, expert_parallel_size
from ullage.engines.vllm.sampler import SamplerPath, sampler_bytes, sampler_path
from ullage.engines.vllm.workspace import at_profile, logits_bytes
from ullage.ledger import Term, ranged
from ullage.spec import model as spec
from ullage.units import GiB, MiB, dtype_bytes


def cublas_workspace(setup: Setup) -> int:
    """Return the cuBLAS workspace that torch allocates at the first matrix product: 32 MiB from Hopper on, else 8.125.

    Source: pytorch@2.8:aten/src/ATen/cuda/CublasHandlePool.cpp:parseChosenWorkspaceSize.
    """
    major = (setup.job.machine.gpu.compute_capability or (8, 0))[0]
    return 32 * MiB if major in (9, 10) else 4096 * 1024 * 2 + 16 * 1024 * 8


def _dense_width(part: spec.DenseFFN, tp: int) -> int:
    """Values a token holds in a dense block: fused gate and up, and their product."""
    return (3 if part.gated else 2) * part.intermediate_size // tp


def _attention_width(part: spec.Mixer, tp: int) -> int:
    """Values a token holds inside a mixer: projections and what attention writes."""
    if isinstance(part, spec.Attention):
        dim, v_dim = part.head_dim, part.v_head_dim or part.head_dim
        return (part.num_heads * (dim + v_dim) + max(part.num_kv_heads, tp) * (dim + v_dim)) // tp
    if isinstance(part, spec.LatentAttention):
        key = part.qk_nope_head_dim + part.qk_rope_head_dim
        return part.num_heads // tp * (2 * key + part.qk_nope_head_dim + 3 * part.v_head_dim)
    if isinstance(part, spec.CompressedAttention):
        return 3 * part.num_heads * part.head_dim // tp
    if isinstance(part, spec.GatedDeltaNet):
        return 3 * (2 * part.num_k_heads * part.k_head_dim + 2 * part.num_v_heads * part.v_head_dim) // tp
    if isinstance(part, (spec.Mamba, spec.Mamba2)):
        inner = part.inner_size if isinstance(part, spec.Mamba) else part.num_heads * part.head_dim
        return 4 * inner // tp
    if isinstance(part, spec.ShortConvolution):
        return 4 * part.size // tp  # two gates, the input, and their product
    return 6 * part.num_heads * part.head_dim // tp


def moe_bytes(setup: Setup, part: spec.MoEFFN, stage: Stage, element: int) -> int:
    """Return the buffers of one fused mixture of experts.

    Formula: M x k x (max(2I/t, H) + I/t) x e + T x H x e (result) + T x E x 4 (router) + shared experts; as modular
        kernels (0.14 on) M x k x (max(2I/t, H) + max(I/t, H)) x e, the result in one of the two.
    Symbols: M tokens of one call (T, or the chunk), k top_k, I intermediate_size, t slices of an expert, E experts.
    Source: vllm@0.11.0:vllm/model_executor/layers/fused_moe/fused_moe.py:fused_experts_impl (cache1 and cache3 share
        a buffer; cache2 is its own); vllm@0.26.0:vllm/model_executor/layers/fused_moe/experts/triton_moe.py:
        TritonExperts.workspace_shapes, modular_kernel.py:_allocate_buffers.
    Known error: grouped and DeepGEMM kernels add padding per expert and a quantised copy of the input.
    """
    tokens = setup.tokens * (setup.job.parallel.data_parallel_size if expert_parallel_size(setup) > 1 else 1)
    chunk = int(setup.version.setting("moe_chunk_tokens"))
    width = part.latent_size or setup.job.model.hidden_size
    inner = part.intermediate_size // stage.share.expert_tp
    gate_up = (2 if part.gated else 1) * inner
    modular = bool(setup.version.setting("modular_experts"))
    second = max(inner, width) if modular else inner
    caches = min(tokens, chunk or tokens) * part.top_k * (max(gate_up, width) + second)
    shared = tokens * 3 * part.shared_intermediate_size // stage.share.shared_expert_tp
    result = 0 if modular else tokens * width
    return (caches + shared + result) * element + tokens * part.num_experts * 4


def forward_bytes(setup: Setup, stage: Stage) -> tuple[int, int]:
    """Return (expected, high) bytes of the widest layer of the forward pass.

    Formula: T x H x e x 3 (residual, the block's input and output) + the widest block: a dense block keeps gate, up
        and their product; an MoE see :func:`moe_bytes`; attention its projections; each also with an unpacked matrix
        where its kernel makes one (:func:`unpacked_bytes`). High: twice that, or the tokens of an offline engine where
        the default was taken.
    Source: vllm@0.6.4:vllm/model_executor/models/llama.py:LlamaDecoderLayer.forward (what its frames keep alive).
    Known error: compiled graphs free a little earlier; quantised inputs add a byte per value.
    """
    model, tokens = setup.job.model, setup.tokens
    element = int(dtype_bytes(setup.job.weights_dtype or model.dtype))
    widest, logits = 0, logits_bytes(setup, stage)
    for layer in {id(layer): layer for layer in model.layers[slice(*stage.share.layers)]}.values():
        for mixer in layer.mixers:
            scores = logits if getattr(mixer, "indexer", None) is not None else 0
            widest = max(widest, tokens * _attention_width(mixer, stage.share.attention_tp) * element + scores)
            widest = max(widest, unpacked_bytes(setup, mixer, stage.share.attention_tp, element))
        for block in layer.ffns:
            if isinstance(block, spec.MoEFFN):
                widest = max(widest, moe_bytes(setup, block, stage, element))
            else:
                widest = max(widest, tokens * _dense_width(block, stage.share.dense_tp) * element)
                widest = max(widest, unpacked_bytes(setup, block, stage.share.dense_tp, element))
    # Hyper-connections mix all streams at once: the old and the new ones, and the mix in float32.
    residual = max((4 * layer.residual.num_streams if layer.residual else 1) for layer in model.layers)
    hidden = tokens * model.hidden_size * element * (2 + residual)
    high = max(2 * (widest + hidden), (widest + hidden) * 6 * setup.tokens_high // (5 * tokens))
    return widest + hidden, high


#: Tokens of the largest image that Qwen's processors make (max_pixels / (patch x merge)^2), and patches to a token.
LARGEST_IMAGE_TOKENS, PATCHES_PER_TOKEN = 16384, 4


def _encoder_tokens(setup: Setup) -> int:
    """Tokens of the encoder's profiling budget: the batch, or the largest image where that is larger.

    Source: vllm@0.22.1:vllm/multimodal/encoder_budget.py:MultiModalBudget, vllm/v1/core/encoder_cache_manager.py:
        compute_mm_encoder_budget; start logs of Qwen models ("a budget of 16384 tokens").
    """
    if setup.job.model.rotary_sections:
        return max(setup.tokens, min(LARGEST_IMAGE_TOKENS, setup.job.max_model_len or 1))
    return max(setup.tokens, 2048 if not setup.version.at_least("0.8.0") else setup.tokens)


def encoder_high_bytes(setup: Setup) -> int:
    """Return an upper bound of the vision or audio encoder's share of the peak.

    Formula: B x H x e (outputs kept for the decoder) x 2 + 48 values of the tower's width for each patch, four
        patches to a token. A bound, not an estimate: the encoder's image sizes are its processor's. Where positions
        rotate by sections (Qwen): B x H x e + 4 B x (2 C + 2 I + P) x e, and a quarter of it.
    Symbols: B tokens of the budget, C width of the tower, I of its widest layer, P values of a patch.
    Source: vllm@0.11.0:vllm/v1/worker/gpu_model_runner.py:profile_run (encoder budget, expanded outputs);
        vllm@0.22.1:vllm/model_executor/models/qwen3_vl.py:Qwen3_VisionBlock, Qwen3_VisionMLP (in, norm, fc1 and its
        activation); published profiles of a 27B on one card: 1.7 GiB.
    """
    if not setup.multimodal or setup.truth("skip_mm_profiling", False):
        return 0
    model, budget = setup.job.model, _encoder_tokens(setup)
    element = int(dtype_bytes(setup.job.weights_dtype or model.dtype))
    shapes = [extra.shape for tower in model.towers for extra in tower.tensors if extra.shape]
    width = max((max(shape) for shape in shapes), default=0)
    tower = max((tower.hidden_size for tower in model.towers), default=0)
    if not (model.rotary_sections and tower):
        return budget * (2 * model.hidden_size + 4 * 8 * min(width, 8192)) * element
    inner = max((shape[0] for shape in shapes if len(shape) == 2 and shape[1] == tower), default=tower)
    patch = max((math.prod(shape[1:]) for shape in shapes if len(shape) > 2), default=0)
    held = model.hidden_size + PATCHES_PER_TOKEN * (2 * tower + 2 * inner + patch)
    return budget * held * element * 5 // 4


def activation_peak(setup: Setup, stage: Stage) -> Term:
    """Return the activation peak: torch's peak during the profiling run less what was allocated before it.

    Formula: cuBLAS workspace + sparse attention's + max(forward, sampler).
    Source: vllm@0.33.0:vllm/utils/mem_utils.py:memory_profiling; see :func:`sampler_bytes`, :func:`forward_bytes`.
    """
    workspace = cublas_workspace(setup) + at_profile(setup, stage)
    forward, forward_high = forward_bytes(setup, stage)
    path = sampler_path(setup)
    samples = stage.last and not setup.pooling
    low_end, sampler, high_end = (
        sampler_bytes(setup, each) if samples else 0 for each in (path.low, path.each, path.high)
    )
    expected = workspace + max(forward, sampler)
    low = max(low_end, forward // 2)
    high = workspace + max(high_end, forward_high, high_end and encoder_high_bytes(setup)) + 64 * MiB
    if setup.version.setting("profile_counts") == "free_difference":
        high = max(high, 6 * forward + workspace)  # every cached segment counts, however fragmented
    if setup.multimodal:
        high = max(high, workspace + forward + encoder_high_bytes(setup))
    return ranged(
        "activation_peak",
        expected,
        low=min(int(low * 0.97), expected),
        high=int(high * 1.03),
        formula=_formula(setup, path, forward, sampler, workspace),
        source="vllm@0.11.0:vllm/v1/worker/gpu_model_runner.py:profile_run, _dummy_sampler_run",
    )


def _formula(setup: Setup, path: SamplerPath, forward: int, sampler: int, workspace: int) -> str:
    return (
        f"max(forward of {setup.tokens:,} tokens {forward / GiB:.2f} GiB, sampler of {setup.rows:,} rows x "
        f"{setup.job.model.vocab_size:,} x {path.each:.3g} B {sampler / GiB:.2f} GiB) + "
        f"workspaces {workspace / MiB:.0f} MiB"
    )
