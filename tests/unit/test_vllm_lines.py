"""Launch lines of vLLM as people type them."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullage.errors import InputError
from ullage.read.vllm_args import parse_command, settings
from ullage.units import GiB


def test_a_full_line() -> None:
    command = parse_command(
        "VLLM_USE_V1=1 vllm serve deepseek-ai/DeepSeek-V3 -tp 8 --pipeline_parallel_size=2 \\\n"
        "  --max-model-len 32K --max-num-batched-tokens 8k --gpu-memory-utilization 0.95 --enforce-eager "
        '--kv-cache-dtype fp8 -ep --speculative-config \'{"method": "mtp", "num_speculative_tokens": 2}\' '
        "--cudagraph-capture-sizes 1 2 4 8 --no-enable-prefix-caching --cpu-offload-gb 4 --trust-remote-code"
    )
    assert command.model == "deepseek-ai/DeepSeek-V3"
    assert dict(command.environment) == {"VLLM_USE_V1": "1"}
    found = settings(command)
    assert (found["max_model_len"], found["max_num_batched_tokens"]) == (32768, 8000)
    assert found["memory_fraction"] == 0.95
    assert found["enforce_eager"] is True
    assert found["cuda_graph_sizes"] == (1, 2, 4, 8)
    assert (found["speculative"], found["num_speculative_tokens"]) == ("mtp", 2)
    assert found["cpu_offload_bytes"] == 4 * GiB
    assert found["parallel"].tensor_parallel_size == 8
    assert found["parallel"].expert_parallel
    assert dict(found["flags"])["enable_prefix_caching"] == "false"


@pytest.mark.parametrize(
    "line",
    [
        "vllm serve Qwen/Qwen3-8B --max-model-len auto",
        "python3 -m vllm.entrypoints.openai.api_server --model Qwen/Qwen3-8B --max-model-len -1",
        "/usr/bin/vllm serve --model Qwen/Qwen3-8B --max_model_len=-1",
        "--model Qwen/Qwen3-8B --max-model-len -1",
    ],
)
def test_forms_of_a_line(line: str) -> None:
    command = parse_command(line)
    assert command.model == "Qwen/Qwen3-8B"
    assert settings(command)["max_model_len"] == -1


def test_dotted_json_and_stages() -> None:
    command = parse_command(
        "env VLLM_PP_LAYER_PARTITION=16,32 vllm serve m -pp 2 -sc.method eagle3 "
        "--speculative-config.num_speculative_tokens 3"
    )
    found = settings(command)
    assert found["parallel"].pipeline_layers == (16, 32)
    assert (found["speculative"], found["num_speculative_tokens"]) == ("eagle3", 3)


def test_an_unknown_flag_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"--tensor-paralel-size.*--tensor-parallel-size"):
        parse_command("vllm serve m --tensor-paralel-size 8")


@pytest.mark.parametrize(
    "line",
    [
        "vllm serve m --max-model-len",
        "vllm serve m extra",
        "vllm serve 'm",
        "vllm serve m --max-model-len ten",
        "vllm serve m --gpu-memory-utilization 92",
        "vllm serve m -tp 0",
        "vllm serve m --speculative-config '{'",
        "vllm serve m --max-model-len 25.6K",
    ],
)
def test_bad_lines_are_refused(line: str) -> None:
    with pytest.raises(InputError):
        settings(parse_command(line))


def test_what_is_not_counted_is_said() -> None:
    assert any(
        "--enable-lora" in sentence for sentence in settings(parse_command("vllm serve m --enable-lora"))["assumed"]
    )
    assert settings(parse_command("vllm serve m --seed 1"))["assumed"] == ()


@given(st.text(max_size=80))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(InputError):
        settings(parse_command(text))
