"""Start-up logs, written here in the engines' words: figures, terms, and what they leave unexplained."""

from __future__ import annotations

import io

import pytest

from ullage.observe.inspection import Inspection, inspect_stream
from ullage.units import GiB, MiB

VLLM_V0 = """INFO 01-01 10:00:00 [model_runner.py:1115] Model loading took 15.0000 GiB and 7.243515 seconds
INFO 01-01 10:00:09 [worker.py:295] the current vLLM instance can use total_gpu_memory (80.00GiB) x gpu_memory_utilization (0.90) = 72.00GiB
INFO 01-01 10:00:09 [worker.py:295] model weights take 15.00GiB; non_torch_memory takes 0.50GiB; PyTorch activation peak memory takes 1.25GiB; the rest of the memory reserved for KV Cache is 55.25GiB.
INFO 01-01 10:00:10 [executor_base.py:113] # cuda blocks: 28288, # CPU blocks: 2048
INFO 01-01 10:00:10 [executor_base.py:118] Maximum concurrency for 8192 tokens per request: 55.25x
INFO 01-01 10:00:30 [model_runner.py:1570] Graph capturing finished in 20 secs, took 0.30 GiB
"""  # noqa: E501
VLLM_V1 = """(EngineCore_DP0 pid=7) INFO 01-01 [gpu_model_runner.py:5089] Model loading took 30.5 GiB memory and 9.0 seconds
(EngineCore_DP0 pid=7) INFO 01-01 [gpu_worker.py:773] Available KV cache memory: 39.5 GiB
(EngineCore_DP0 pid=7) INFO 01-01 [kv_cache_utils.py:1149] GPU KV cache size: 431,000 tokens, Maximum concurrency for 32,768 tokens per request: 13.15x
(EngineCore_DP0 pid=7) INFO 01-01 [gpu_model_runner.py:6517] Graph capturing finished in 12 secs, took 0.75 GiB
(EngineCore_DP0 pid=7) INFO 01-01 [gpu_worker.py:1065] Free memory on device (78.5/79.2 GiB) on startup. Desired GPU memory utilization is (0.92, 72.86 GiB). Actual usage is 31.5 GiB for consumed memory (weights + non-torch), 1.8 GiB for peak activation, and 0.75 GiB for CUDAGraph memory. Replace gpu_memory_utilization config with `--kv-cache-memory=1`
"""  # noqa: E501
SGLANG = """[2026-01-01 10:00:00 TP0] Init torch distributed ends. elapsed=4.20 s, mem usage=1.75 GB
[2026-01-01 10:00:01 TP0] Load weight begin. avail mem=77.50 GB
[2026-01-01 10:00:20 TP0] Load weight end. elapsed=19.0 s, type=Glm4ForCausalLM, dtype=torch.bfloat16, avail mem=47.25 GB, mem usage=30.25 GB.
[2026-01-01 10:00:21 TP0] KV Cache is allocated. dtype: torch.bfloat16, #tokens: 190000, K size: 17.00 GB, V size: 17.00 GB
[2026-01-01 10:00:21 TP0] Memory pool end. avail mem=12.75 GB
[2026-01-01 10:00:40 TP0] Capture target decode CUDA graph end. bs=[1, 2, 4], elapsed=9.00 s, mem usage=1.00 GB, avail mem=11.70 GB.
[2026-01-01 10:00:41 TP0] max_total_num_tokens=190000, chunked_prefill_size=8192, max_prefill_tokens=16384, max_running_requests=2048, context_len=131072, available_gpu_mem=11.60 GB
"""  # noqa: E501
LLAMA = """load_tensors: offloaded 33/33 layers to GPU
load_tensors:        CUDA0 model buffer size =  9000.50 MiB
load_tensors:        CUDA1 model buffer size =  8000.25 MiB
load_tensors:   CPU_Mapped model buffer size =   500.00 MiB
llama_kv_cache:      CUDA0 KV buffer size =  2048.00 MiB
llama_kv_cache:      CUDA1 KV buffer size =  2048.00 MiB
llama_context:      CUDA0 compute buffer size =   304.75 MiB
llama_context:  CUDA_Host compute buffer size =    24.01 MiB
"""


def inspect(text: str) -> Inspection:
    return inspect_stream(io.BytesIO(text.encode()))


def terms(found: Inspection) -> dict[str, int]:
    return {term.name: term.bytes for term in found.terms}


def test_vllm_before_v1_adds_up_to_its_share() -> None:
    found = inspect(VLLM_V0)
    assert (found.kind, found.cause, found.framework) == ("engine_log", "none", "vllm")
    assert terms(found) == {
        "weights": 15 * GiB,
        "non_torch": GiB // 2,
        "activation_peak": GiB + GiB // 4,
        "kv_cache": 55 * GiB + GiB // 4,
        "cuda_graphs": round(0.30 * GiB),
        "unexplained": 0,
    }
    figures = {figure.quantity: figure.value for figure in found.figures if figure.size is None}
    assert figures == {"num_gpu_blocks": 28288, "max_concurrency": 55.25}
    assert not found.partial


def test_vllm_v1_leaves_what_its_log_does_not_say() -> None:
    found = inspect(VLLM_V1)
    named = terms(found)
    assert named["weights"] == 30 * GiB + GiB // 2
    assert named["kv_cache"] == 39 * GiB + GiB // 2
    assert named["unexplained"] == round(72.86 * GiB) - named["weights"] - named["kv_cache"] - round(1.8 * GiB)
    values = {figure.quantity: figure.value for figure in found.figures if figure.size is None}
    assert values == {"kv_cache_tokens": 431000, "max_concurrency": 13.15}


def test_sglang_accounts_from_what_was_free_before_the_weights() -> None:
    found = inspect(SGLANG)
    assert found.framework == "sglang"
    named = terms(found)
    assert named["kv_cache"] == 34 * GiB
    assert named["free_at_end"] == round(11.60 * GiB)
    assert named["unexplained"] == pytest.approx(0.65 * GiB, abs=MiB)
    assert any(figure.place == "TP0" for figure in found.figures)


def test_llamacpp_buffers_of_each_card_and_the_host() -> None:
    found = inspect(LLAMA)
    assert terms(found)["weights"] == round(9000.5 * MiB)
    places = {figure.place for figure in found.figures if figure.quantity == "weights"}
    assert places == {"CUDA0", "CUDA1", "host CPU_Mapped"}
    assert terms(found)["activation_peak"] == round(304.75 * MiB)


def test_a_start_that_fails_shows_the_arithmetic_of_its_log() -> None:
    failed = VLLM_V0.replace("0.90) = 72.00", "0.20) = 16.00").replace("is 55.25GiB", "is -0.75GiB")
    failed = failed.splitlines()[:3]
    failed.append("ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when")
    found = inspect("\n".join(failed))
    assert found.cause == "kv_pool"
    assert "15.00 GiB of weights go into a share of 16.00 GiB" in found.why
    assert "0.2" in found.advice[0].change
    assert terms(found)["kv_cache"] == round(-0.75 * GiB)


def test_a_half_of_a_log_is_called_partial() -> None:
    assert inspect(VLLM_V0.splitlines()[0]).partial
