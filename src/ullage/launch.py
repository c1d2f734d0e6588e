"""A serving job as the engine's own launch line: every setting that was asked for, and none that was not.

The flags are those that :mod:`ullage.read.vllm_args`, :mod:`ullage.read.sglang_args` and
:mod:`ullage.read.llamacpp_args` read, so that a line that is printed can be read back.
"""

from __future__ import annotations

import shlex

from ullage.fitting import ELASTIC_POOLS, FitResult
from ullage.i18n import _
from ullage.spec.model import Model
from ullage.spec.serving import ServingJob
from ullage.units import GiB, canonical_dtype

#: Field of the job -> flag that takes its value as it is.
_VLLM = {
    "kv_cache_dtype": "--kv-cache-dtype",
    "max_num_seqs": "--max-num-seqs",
    "max_num_batched_tokens": "--max-num-batched-tokens",
    "memory_fraction": "--gpu-memory-utilization",
    "block_size": "--block-size",
    "kv_cache_memory_bytes": "--kv-cache-memory-bytes",
    "cuda_graph_max_batch_size": "--max-cudagraph-capture-size",
}
_SGLANG = {
    "kv_cache_dtype": "--kv-cache-dtype",
    "max_num_seqs": "--max-running-requests",
    "max_num_batched_tokens": "--chunked-prefill-size",
    "memory_fraction": "--mem-fraction-static",
    "block_size": "--page-size",
    "cuda_graph_max_batch_size": "--cuda-graph-max-bs",
}
_LLAMACPP = {"max_num_batched_tokens": "-ub", "max_num_seqs": "-np"}


def own_flag(engine: str, field: str) -> str:
    """Return the engine's own flag that takes a field of the job as it is; llama.cpp's for what runs on it."""
    return {"vllm": _VLLM, "sglang": _SGLANG}.get(engine, _LLAMACPP)[field]


def launch_line(result: FitResult) -> str:
    """Return the engine's own launch line for the job of a fit."""
    job, asked = result.job, result.asked
    if job.native:
        return job.native
    model, quantization = _weights_words(asked)
    if job.engine == "vllm":
        parts = [f"vllm serve {model}", f"--max-model-len {result.context}", *_vllm_layout(job), quantization]
    elif job.engine == "sglang":
        program = f"python -m sglang.launch_server --model-path {model}"
        parts = [program, f"--context-length {result.context}", *_sglang_layout(job), quantization]
    else:
        return _llamacpp(result)
    return " ".join(part for part in (*parts, *setting_words(asked)) if part)


def model_word(model: Model) -> str:
    """Return what names a model on a command line: its folder or file where it was read from one."""
    path = model.source.partition(", ")[0]
    if ":" in path or not path.endswith((".json", ".gguf")):
        return model.name
    return shlex.quote(path.removesuffix("config.json").rstrip("/") or ".")


def setting_words(job: ServingJob) -> list[str]:
    """Return the settings of a vLLM or SGLang job that are not its layout, in the engine's own words."""
    table = _VLLM if job.engine == "vllm" else _SGLANG
    words = [f"{flag} {getattr(job, name)}" for name, flag in table.items() if getattr(job, name) is not None]
    if job.weights_dtype:
        words.append(f"--dtype {canonical_dtype(job.weights_dtype) if job.weights_dtype != 'auto' else 'auto'}")
    if job.enforce_eager:
        words.append("--enforce-eager" if job.engine == "vllm" else "--disable-cuda-graph")
    if job.cpu_offload_bytes:
        words.append(f"--cpu-offload-gb {job.cpu_offload_bytes / GiB:g}")
    return words + (_vllm_more(job) if job.engine == "vllm" else _sglang_more(job))


def _vllm_more(job: ServingJob) -> list[str]:
    words = []
    if job.cuda_graph_sizes:
        words.append(f"--cudagraph-capture-sizes {' '.join(map(str, job.cuda_graph_sizes))}")
    if job.speculative == "mtp":
        words.append(f'--speculative-config \'{{"method": "mtp", "num_speculative_tokens": {_drafted(job)}}}\'')
    if job.redundant_experts:
        words.append(f"--enable-eplb --eplb-config '{{\"num_redundant_experts\": {job.redundant_experts}}}'")
    return words


def _sglang_more(job: ServingJob) -> list[str]:
    words = []
    if job.cuda_graph_sizes:
        words.append(f"--cuda-graph-bs {' '.join(map(str, job.cuda_graph_sizes))}")
    if job.speculative == "mtp":
        steps = _drafted(job)
        words.append(f"--speculative-algorithm NEXTN --speculative-num-steps {steps} --speculative-eagle-topk 1")
        words.append(f"--speculative-num-draft-tokens {steps + 1}")
    if job.redundant_experts:
        words.append(f"--ep-num-redundant-experts {job.redundant_experts}")
    return words


def _drafted(job: ServingJob) -> int:
    return job.num_speculative_tokens or 1


def _vllm_layout(job: ServingJob) -> list[str]:
    parallel = job.parallel
    sizes = {
        "--tensor-parallel-size": parallel.tensor_parallel_size,
        "--pipeline-parallel-size": parallel.pipeline_parallel_size,
        "--data-parallel-size": parallel.data_parallel_size,
        "--decode-context-parallel-size": parallel.decode_context_parallel_size,
    }
    words = [f"{flag} {size}" for flag, size in sizes.items() if size > 1]
    return [*words, "--enable-expert-parallel"] if parallel.expert_parallel else words


def _sglang_layout(job: ServingJob) -> list[str]:
    parallel = job.parallel
    experts = parallel.expert_parallel_size or parallel.tensor_parallel_size
    sizes = {
        "--tp-size": parallel.tensor_parallel_size,
        "--pp-size": parallel.pipeline_parallel_size,
        "--dp-size": parallel.data_parallel_size,
        "--ep-size": experts if parallel.expert_parallel else 1,
        "--dcp-size": parallel.decode_context_parallel_size,
    }
    words = [f"{flag} {size}" for flag, size in sizes.items() if size > 1]
    return [*words, "--enable-dp-attention"] if parallel.dp_attention else words


def _llamacpp(result: FitResult) -> str:
    """Return a line of llama.cpp, or the environment in which ollama serves as many tokens."""
    job, asked = result.job, result.asked
    context, requests = result.context, result.concurrency
    if job.engine == "ollama":
        words = [f"OLLAMA_CONTEXT_LENGTH={context}", f"OLLAMA_NUM_PARALLEL={requests}"]
        if asked.kv_cache_dtype:
            words += ["OLLAMA_FLASH_ATTENTION=1", f"OLLAMA_KV_CACHE_TYPE={asked.kv_cache_dtype}"]
        return " ".join([*words, "ollama serve"])
    kind = (job.quantization or "").removeprefix("gguf:")
    source = job.model.source if job.model.source.endswith(".gguf") else ""
    file = shlex.quote(source) if source else (f"MODEL-{kind}.gguf" if kind else "MODEL.gguf")
    slots = f"{own_flag(job.engine, 'max_num_seqs')} {requests}"
    words = [f"llama-server -m {file} -c {context * requests} {slots} -ngl 999"]
    if asked.kv_cache_dtype:
        words.append(f"-fa on -ctk {asked.kv_cache_dtype} -ctv {asked.kv_cache_dtype}")
    if asked.max_num_batched_tokens:
        words.append(f"{own_flag(job.engine, 'max_num_batched_tokens')} {asked.max_num_batched_tokens}")
    return " ".join(words)


def _weights_words(job: ServingJob) -> tuple[str, str]:
    """Return what stands for the model in a launch line, and the flag that makes the engine quantise it."""
    name = job.quantization
    if not name or job.engine not in ELASTIC_POOLS:
        return model_word(job.model), ""
    if job.model.quantization is None:
        from ullage.read.quantization_names import MADE_AT_LOAD, named_quantization

        method = named_quantization(name, job.model).method
        return model_word(job.model), f"--quantization {MADE_AT_LOAD.get(method, name)}"
    return shlex.quote(_("{model} in {scheme}").format(model=job.model.name, scheme=name)), ""
