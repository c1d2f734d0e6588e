"""The attention backend, where it keeps memory of its own: FlashInfer's workspace.

The workspace is allocated when metadata of a batch are first built, which is after the profiling run. Versions that
subtract a graph estimate capture a full graph for it, so that the workspace stands in the estimate.
"""

from __future__ import annotations

from ullage.engines.vllm.defaults import Setup
from ullage.engines.vllm.graph_mode import json_flag
from ullage.engines.vllm.layout import Stage
from ullage.ledger import Term, exact
from ullage.spec import model as spec
from ullage.units import MiB

#: Bytes for each value of a batch's queries in the workspace, from 0.26 on.
WORKSPACE_BYTES_EACH = 16


def _attention(setup: Setup) -> list[spec.Attention]:
    found = {id(mixer): mixer for layer in setup.job.model.layers for mixer in layer.mixers}
    return [mixer for mixer in found.values() if isinstance(mixer, spec.Attention)]


def _asked(setup: Setup) -> str:
    for name in ("attention_backend", "VLLM_ATTENTION_BACKEND", "vllm_attention_backend"):
        if setup.flag(name):
            return setup.flag(name).upper()
    return str(json_flag(setup, "attention_config").get("backend") or "").upper()


def uses_flashinfer(setup: Setup) -> bool:
    """Tell whether plain attention runs on FlashInfer.

    Rule: as asked; else on Blackwell data-centre cards, for an NVFP4 cache, and for an fp8 cache that FlashAttention
        cannot read (it can on Hopper only); on Turing up to 0.24, which FlashAttention leaves out. Head sizes 64, 128,
        256 (512 from 0.22), no sinks but on Blackwell. Up to 0.11.0 the package is an extra: only as asked. A card
        whose capability is not known is taken to have FlashAttention.
    Source: vllm@0.11.1, vllm@0.29.0:vllm/platforms/cuda.py:_get_backend_priorities; vllm@0.20.0, vllm@0.29.0:
        vllm/v1/attention/backends/flashinfer.py:FlashInferBackend, flash_attn.py:FlashAttentionBackend,
        fa_utils.py:flash_attn_supports_fp8.
    """
    mixers, gpu = _attention(setup), setup.job.machine.gpu
    if not mixers or gpu.vendor != "nvidia" or setup.version.engine != "V1":
        return False
    asked = _asked(setup)
    if asked:
        return asked == "FLASHINFER"
    if not setup.version.at_least("0.11.1"):
        return False
    cache, capability = (setup.job.kv_cache_dtype or "").lower(), gpu.compute_capability or (8, 0)
    if cache.startswith("nvfp4"):
        return True
    heads = (64, 128, 256, 512) if setup.version.at_least("0.22.1") else (64, 128, 256)
    if any(mixer.head_dim not in heads or (mixer.sinks and capability[0] != 10) for mixer in mixers):
        return False
    if capability[0] == 10:
        return True
    if capability < (8, 0):
        return capability >= (7, 5) and not setup.version.at_least("0.25.0")
    return "float8" in cache and gpu.compute_capability is not None and capability[0] != 9


def workspace(setup: Setup, stage: Stage) -> Term:
    """Return FlashInfer's workspace: one for all layers of a kind.

    Formula: 256 MiB; 394 MiB from 0.11.1; from 0.26 at least T x (N / t) x D x 16 B.
    Symbols: T max_num_batched_tokens, N query heads, t tensor parallelism, D head width.
    Source: vllm@0.11.1:vllm/envs.py:VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE; vllm@0.26.0:
        vllm/v1/attention/backends/flashinfer.py:FlashInferMetadataBuilder._get_workspace_buffer.
    """
    if not uses_flashinfer(setup):
        return exact("attention_workspace", 0, formula="no FlashInfer attention")
    size = int(setup.version.setting("flashinfer_workspace_mib")) * MiB
    given = setup.flag("VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE")
    size = int(given) if given.isdigit() else size
    if setup.version.at_least("0.26.0"):
        widest = max(mixer.num_heads * mixer.head_dim for mixer in _attention(setup))
        size = max(size, setup.tokens * widest // stage.share.attention_tp * WORKSPACE_BYTES_EACH)
    return exact(
        "attention_workspace",
        size,
        formula="FlashInfer's workspace",
        source="vllm@0.29.0:vllm/v1/attention/backends/flashinfer.py:_get_workspace_buffer",
    )


def whole_graphs_of_drafts(setup: Setup) -> bool:
    """Tell whether decode batches of several tokens (drafts) are captured whole: FlashInfer only on Blackwell.

    Source: vllm@0.20.0:vllm/v1/attention/backends/flashinfer.py:FlashInferMetadataBuilder.get_cudagraph_support
        (UNIFORM_SINGLE_TOKEN_DECODE unless TRT-LLM kernels serve, which the engine turns into PIECEWISE).
    """
    major = (setup.job.machine.gpu.compute_capability or (8, 0))[0]
    return not uses_flashinfer(setup) or major == 10 or (major == 12 and setup.version.at_least("0.29.0"))


def warmed_up(setup: Setup) -> bool:
    """Tell whether the workspace exists before graphs are captured: where every layer's backend is FlashInfer.

    Source: vllm@0.29.0:vllm/model_executor/warmup/kernel_warmup.py:kernel_warmup.
    """
    return all(isinstance(mixer, spec.Attention) for layer in setup.job.model.layers for mixer in layer.mixers)
