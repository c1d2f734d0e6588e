"""A serving job: a model, a machine, an engine at a version, and its settings.

``None`` means *not given*: the engine's own default for that version applies, and the engine room that resolves it
says so in ``assumed``.
"""

from __future__ import annotations

from ullage.frozen import Frozen
from ullage.spec.machine import Machine
from ullage.spec.model import Model


class ServingParallel(Frozen):
    """How a replica is spread.

    Attributes:
        tensor_parallel_size, pipeline_parallel_size, data_parallel_size: as engines name them.
        expert_parallel: routed experts are spread over all ranks of the replica instead of sliced by TP.
        expert_parallel_size: explicit size (SGLang); None: derived from the engine's rule.
        dp_attention: attention runs data-parallel while experts stay spread (SGLang ``--enable-dp-attention``,
            vLLM with data_parallel_size > 1 and expert parallelism).
        decode_context_parallel_size: the KV cache of a sequence spread over this many TP ranks.
        pipeline_layers: layers per stage as written out by the user, or None.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    expert_parallel: bool = False
    expert_parallel_size: int | None = None
    dp_attention: bool = False
    decode_context_parallel_size: int = 1
    pipeline_layers: tuple[int, ...] | None = None


class ServingJob(Frozen):
    """What the user wants served.

    Attributes:
        engine: vllm, sglang or llamacpp; engine_version such as ``0.33.0``.
        quantization: how weights are held, when it differs from the checkpoint (``fp8`` on the fly, ``gguf:Q4_K_M``).
        weights_dtype: the ``--dtype`` of the engine.
        kv_cache_dtype: as the engine names it: auto, fp8, fp8_e5m2, fp8_ds_mla, bfloat16, q8_0 ...
        max_model_len: context of one request in tokens; max_num_seqs: requests at a time;
        max_num_batched_tokens: tokens of one step (SGLang: chunked prefill size; llama.cpp: ubatch).
        memory_fraction: vLLM gpu_memory_utilization, SGLang mem_fraction_static.
        kv_cache_memory_bytes: fixed pool size given by the user.
        cuda_graph_max_batch_size: largest captured batch; cuda_graph_sizes: the list when given.
        redundant_experts: EPLB copies over all ranks.
        speculative: "mtp", "eagle", "draft" ... or None; draft_model for a separate one; num_speculative_tokens.
        cpu_offload_bytes: weights kept in host memory, per GPU.
        device_total_bytes: total of the device when the user or a log states it (it wins over the catalog).
        device_free_bytes: free before start, when stated.
        flags: everything else, as typed (name without dashes, underscores), for the engine room to read or name.
        native: the line as typed, when there was one.
        assumed: sentences on what had to be assumed so far.
    """

    model: Model
    machine: Machine
    engine: str
    engine_version: str
    parallel: ServingParallel = ServingParallel()
    quantization: str | None = None
    weights_dtype: str | None = None
    kv_cache_dtype: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    memory_fraction: float | None = None
    kv_cache_memory_bytes: int | None = None
    enforce_eager: bool | None = None
    block_size: int | None = None
    cuda_graph_max_batch_size: int | None = None
    cuda_graph_sizes: tuple[int, ...] | None = None
    redundant_experts: int = 0
    speculative: str | None = None
    num_speculative_tokens: int | None = None
    draft_model: Model | None = None
    cpu_offload_bytes: int = 0
    device_total_bytes: int | None = None
    device_free_bytes: int | None = None
    flags: tuple[tuple[str, str], ...] = ()
    native: str = ""
    assumed: tuple[str, ...] = ()
