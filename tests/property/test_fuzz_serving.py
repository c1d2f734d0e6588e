"""Whatever is given, the answer is a result or one sentence with a documented exit code: never a traceback or a hang.

A small number of examples with a fixed seed runs by default; ``ULLAGE_FUZZ_EXAMPLES=20000`` runs more, freshly drawn.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from fuzzing import (
    CONFIGS,
    WORDS,
    all_configs,
    gguf_header,
    safetensors_header,
    spoilt_argv,
    spoilt_bytes,
    spoilt_configs,
    time_limit,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ullage.account.parameters import count
from ullage.account.weights import checkpoint_bytes
from ullage.errors import UllageError
from ullage.read.hf_config import read_config, read_config_object

ON_DEMAND = int(os.environ.get("ULLAGE_FUZZ_EXAMPLES", "0"))
SECONDS = 60.0  # a hang, not a slow machine
DOCUMENTED = {0, 2, 3, 4, 5}


def budget(examples: int) -> Any:
    return settings(
        max_examples=ON_DEMAND or examples,
        derandomize=not ON_DEMAND,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("ULLAGE_DEBUG", "1")  # an internal error is raised here, with its traceback, instead of told


def command(argv: list[str]) -> tuple[int, str, str]:
    """Run the command line in this process."""
    from ullage.cli import main

    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(argv)
        except SystemExit as exit_:  # argparse
            code = exit_.code if isinstance(exit_.code, int) else 1
    return int(code or 0), out.getvalue(), err.getvalue()


def check_command(argv: list[str]) -> None:
    with time_limit(SECONDS):
        code, out, err = command(argv)
    assert code in DOCUMENTED, (argv, err)
    assert "Traceback" not in err
    if code == 2 or code == 5:
        assert err.strip(), argv
    if "--json" in argv and "--help" not in argv and "-h" not in argv and code in (0, 3, 4) and out.strip():
        json.loads(out)


@budget(300)
@given(config=spoilt_configs(all_configs()))
def test_configs(config: dict[str, Any]) -> None:
    with time_limit(SECONDS):
        try:
            model = read_config_object(config, where="config.json", name="fuzzed")
            counts = count(model)
            size = checkpoint_bytes(model)
        except UllageError as error:
            assert error.exit_code in DOCUMENTED
            assert len(str(error)) < 20_000
            return
    assert counts.total >= counts.active >= 0
    assert size >= 0


@budget(150)
@given(config=spoilt_configs(CONFIGS), engine=st.sampled_from(["vllm", "sglang", "llamacpp"]), data=st.data())
def test_fit_of_spoilt_configs(
    tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any], engine: str, data: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8", errors="surrogatepass")
    machine = data.draw(st.sampled_from(["8xH200", "1xT4-16GB", "2x8xH20", "24GiB"]))
    check_command(["fit", "serve", str(path), "--on", machine, "--engine", engine, "--json"])


FIT = [
    line.split()
    for line in (
        "fit serve deepseek-v3 --on 8xH200 --engine vllm --tp 8 --context 32k --concurrency 64 --json",
        "fit serve deepseek-v3 --on 2x8xH20 --engine sglang@0.5.2 --tp 16 --dp-attention 8 --reserve 10% --json",
        "fit serve qwen3-8b --on 24GiB --engine llamacpp --context 8192",
        "fit serve deepseek-r1 --on 16xA100-80GB --tp 8 --pp 2 --kv-cache-dtype fp8 --json",
        "models --json",
        "gpus --json",
        "engines --json",
        "schema fit",
        "validate /nonexistent.jsonl --json",
        "explain kv_cache",
    )
]
ENGINE_LINES = [
    "vllm serve deepseek-ai/DeepSeek-V3 --tensor-parallel-size 8 --max-model-len 32768 --gpu-memory-utilization 0.9 "
    "--enable-expert-parallel --max-num-seqs 256 --max-num-batched-tokens 8192 --kv-cache-dtype fp8",
    "VLLM_USE_V1=1 vllm serve Qwen/Qwen3-8B --dtype bfloat16 --enforce-eager --block-size 16 --swap-space 4",
    "python -m vllm.entrypoints.openai.api_server --model deepseek-ai/DeepSeek-R1 -tp 8 -pp 2 --cpu-offload-gb 10",
    "python -m sglang.launch_server --model-path deepseek-ai/DeepSeek-V3 --tp 8 --enable-dp-attention --dp 8 "
    "--mem-fraction-static 0.88 --chunked-prefill-size 8192 --cuda-graph-max-bs 128 --context-length 65536",
    "llama-server -m deepseek-ai/DeepSeek-R1 -c 32768 -ngl 99 -fa -ctk q8_0 -ctv q8_0 -b 4096 -ub 4096 -ot exps=CPU",
]


@budget(150)
@given(argv=spoilt_argv(FIT, WORDS))
def test_command_lines(argv: list[str]) -> None:
    check_command(argv)


@budget(150)
@given(tokens=spoilt_argv([line.split() for line in ENGINE_LINES], WORDS), data=st.data())
def test_engine_lines(tokens: list[str], data: Any) -> None:
    prefix = data.draw(st.sampled_from(["vllm:", "sglang:", "llamacpp:", "", "megatron:", "nonsense:"]))
    check_command(["fit", "--from", prefix + " ".join(tokens), "--on", "8xH200", "--json"])


@budget(100)
@given(data=spoilt_bytes(gguf_header()))
def test_gguf_headers(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "model.gguf"
    path.write_bytes(data)
    check_command(["fit", "serve", str(path), "--on", "24GiB", "--engine", "llamacpp", "--json"])


@budget(100)
@given(data=spoilt_bytes(safetensors_header({"model.embed_tokens.weight": ("BF16", [1024, 256], 2 * 1024 * 256)})))
def test_safetensors_headers(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    from ullage.read import safetensors_header as reader

    path = tmp_path_factory.getbasetemp() / "model.safetensors"
    path.write_bytes(data)
    with time_limit(SECONDS):
        try:
            reader.read_header(path)
        except UllageError as error:
            assert error.exit_code in DOCUMENTED


RECORD = {
    "id": "one",
    "group": "g",
    "completeness": "full",
    "job": {
        "kind": "serve",
        "model": "deepseek-ai/DeepSeek-V3",
        "gpu": "H200-141GB",
        "num_gpus": 8,
        "engine": "vllm",
        "engine_version": "0.10.1",
        "quantization": "fp8_block",
        "kv_cache_dtype": "auto",
        "parallel": {"tp": 8, "ep": True, "dp": 1},
        "max_model_len": 32768,
        "gpu_memory_utilization": 0.9,
        "enforce_eager": None,
        "flags": {"free_memory_on_device": "78.84/79.25 GiB", "cuda_graph_bs": [1, 2], "speculative_config": {}},
    },
    "measured": [
        {"quantity": "weights", "value": 80.5, "unit": "GiB", "gib": 80.5, "rank": "0"},
        {"quantity": "kv_cache", "value": 100, "unit": "MiB", "rank": "all", "per_rank": [1, 2], "note": "start fails"},
    ],
}


@budget(200)
@given(record=spoilt_configs([RECORD]))
def test_records(tmp_path_factory: pytest.TempPathFactory, record: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "records.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8", errors="surrogatepass")
    check_command(["validate", str(path), "--json"])


def hostile_files(folder: Path) -> Iterator[Path]:
    huge = folder / "huge"
    huge.mkdir()
    with (huge / "config.json").open("wb") as file:
        file.truncate(100 * 2**20)  # sparse: zeros
    yield huge
    for name, text in {
        "deep": "[" * 200_000,
        "deep_object": '{"a":' * 100_000 + "1" + "}" * 100_000,
        "long_number": '{"model_type": "llama", "hidden_size": ' + "9" * 100_000 + "}",
        "many_layers": json.dumps({**CONFIGS[0], "num_hidden_layers": 10**9}),
        "long_list": json.dumps({**CONFIGS[6], "layer_types": ["full_attention"] * 1_000_000}),
        "bytes": "\ufeff\x00",
        "empty": "",
        "list": "[]",
    }.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(text)
        yield folder / name
    folder_as_file = folder / "folder" / "config.json"
    folder_as_file.mkdir(parents=True)
    yield folder_as_file


def test_hostile_files_are_refused_with_a_sentence(tmp_path: Path) -> None:
    for path in hostile_files(tmp_path):
        with time_limit(SECONDS):
            code, _out, err = command(["fit", "serve", str(path), "--on", "8xH200", "--json"])
        assert code in (2, 5), path
        assert err.strip() and "Traceback" not in err, path


def test_a_valid_header_passes(tmp_path: Path) -> None:
    """The spoilt files start from files that are right: what is refused above is refused for its fault."""
    (tmp_path / "model.gguf").write_bytes(gguf_header())
    code, out, err = command(
        ["fit", "serve", str(tmp_path / "model.gguf"), "--on", "24GiB", "--engine", "llamacpp", "--json"]
    )
    assert code in (0, 3, 4), err
    assert json.loads(out)["model"]["num_layers"] == 2
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[0]))
    assert read_config(tmp_path / "config.json").hidden_size == 256
