"""Lines that start SGLang, as people type them."""

from __future__ import annotations

import pytest

from ullage.catalog import load
from ullage.engines.sglang import start
from ullage.errors import InputError
from ullage.read.machine import parse_machine
from ullage.read.model_source import load_model
from ullage.read.sglang_args import parse_sglang_args
from ullage.spec.serving import ServingJob
from ullage.units import GiB


def parse(line: str, machine: str = "8xH200") -> ServingJob:
    return parse_sglang_args(line, machine=parse_machine(machine), load_model=load_model, engine_version="0.5.23")


def test_a_whole_line_with_environment_and_continuations() -> None:
    found = parse(
        """SGLANG_X=1 python3 -m sglang.launch_server --model-path deepseek-ai/DeepSeek-V3 \\
        --tp 8 --dp 8 --enable-dp-attention --trust-remote-code --mem-fraction-static=0.85 \\
        --chunked-prefill-size 4096 --context-length 32k --max-running-requests 64 --kv-cache-dtype fp8_e4m3 \\
        --cuda-graph-bs 1 2 4 8 --ep-num-redundant-experts 32 --moe-a2a-backend deepep --page-size 64 \\
        --cpu-offload-gb 2 --host 0.0.0.0 --port 30000"""
    )
    assert found.parallel.tensor_parallel_size == found.parallel.data_parallel_size == 8
    assert found.parallel.dp_attention
    assert found.memory_fraction == 0.85
    assert (found.max_num_batched_tokens, found.max_model_len, found.max_num_seqs) == (4096, 32_000, 64)
    assert found.cuda_graph_sizes == (1, 2, 4, 8)
    assert (found.redundant_experts, found.block_size, found.cpu_offload_bytes) == (32, 64, 2 * GiB)
    assert ("moe_a2a_backend", "deepep") in found.flags
    assert start(found).starts


@pytest.mark.parametrize(
    "line",
    [
        "sglang serve --model-path deepseek-v3 --tp-size 8",
        "/opt/venv/bin/sglang serve deepseek-v3 --tensor-parallel-size 8",
        "--model deepseek-v3 --tensor-parallel-siz 8",
        "python -m sglang.launch_server --model deepseek-v3 --tp=8 > server.log 2>&1 &",
    ],
)
def test_spellings_of_one_job(line: str) -> None:
    assert parse(line).parallel.tensor_parallel_size == 8


def test_attention_replicas_in_both_spellings() -> None:
    old = parse("--model deepseek-v3 --tp 8 --dp-size 4 --enable-dp-attention").parallel
    new = parse("--model deepseek-v3 --tp 8 --attn-dp-size 4").parallel
    assert old == new
    plain = parse("--model deepseek-v3 --tp 8 --dp-size 2").parallel
    assert not plain.dp_attention and plain.data_parallel_size == 2


def test_speculation_and_graphs() -> None:
    found = parse(
        "--model deepseek-v3 --tp 8 --speculative-algorithm NEXTN --speculative-num-steps 2"
        " --speculative-eagle-topk 1 --speculative-num-draft-tokens 3 --disable-cuda-graph"
    )
    assert found.speculative == "mtp" and found.num_speculative_tokens == 2 and found.draft_model is None
    assert found.enforce_eager is True
    assert not start(found).job.cuda_graph_sizes


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--model deepseek-v3 --tpsize 8", "--tpsize is not a flag.*--tp-size"),
        ("--model deepseek-v3 --mem_fraction_static 0.8", "--mem-fraction-static"),
        ("--model deepseek-v3 --mem-fraction-static high", "not a number"),
        ("--model deepseek-v3 --tp 0", "at least 1"),
        ("--model deepseek-v3 --tp", "wants a value"),
        ("--tp 8", "no model"),
        ("--model deepseek-v3 stray", "where a flag should"),
        ("--model 'deepseek-v3", "cannot be split"),
        ("--model deepseek-v3 --dp-size 2 --attn-dp-size 2 --tp 8", "replicas of replicas"),
        ("--model deepseek-v3 --speculative-num", "not a flag"),
    ],
)
def test_what_cannot_be_used_is_named(line: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse(line)


def test_a_flag_that_is_known_and_not_counted_is_said() -> None:
    assert any("--enable-two-batch-overlap" in sentence for sentence in parse(
        "--model deepseek-v3 --tp 8 --enable-two-batch-overlap"
    ).assumed)  # fmt: skip


def test_the_flags_of_the_engine_are_known() -> None:
    flags = load("engines/sglang.json")["flags"]
    names = [name for kind in ("none", "one", "optional", "list") for name in flags[kind]]
    assert len(names) == len(set(names)) > 600
    for name in ("tp-size", "mem-fraction-static", "attn-dp-size", "mamba-full-memory-ratio", "swa-full-tokens-ratio"):
        assert name in flags["one"]
    assert "cuda-graph-bs-decode" in flags["list"] and "enable-dp-attention" in flags["none"]
