"""What is printed to be typed next does what was promised: it is read back, and gives the same figures."""

import json
import shlex

import pytest

from ullage.cli import main

V3 = "deepseek-v3 --on 8xH200"
SETTINGS = "--kv-dtype fp8 --max-num-seqs 64 --max-batched-tokens 4096 --memory-fraction 0.85 --enforce-eager"
CASES = [
    V3,
    f"{V3} --dcp 8",
    f"{V3} --mtp 2",
    f"{V3} --ep --redundant-experts 32",
    f"{V3} --tp 4 --pp 2 --block-size 64 {SETTINGS}",
    "deepseek-v3 --on 8xH100 --cpu-offload 34GiB",
    "llama-3.1-8b --on 4xH100 --dp 4 --dtype float16",
    "llama-3.1-8b --on H100 --quantization fp8 --context 8K",
    f"{V3} --engine sglang --mtp 2",
    f"{V3} --engine sglang --ep --redundant-experts 32",
    f"{V3} --engine sglang --dp-attention --kv-dtype fp8_e4m3",
    f"{V3} --engine sglang --dcp 2",
    f"{V3} --engine sglang --tp 4 --pp 2 --block-size 64 {SETTINGS.replace('fp8', 'fp8_e4m3')}",
    "llama-3.1-8b --on H100 --engine sglang --dtype float16 --cpu-offload 4GiB",
]


def of(capsys, words):
    main([*words, "--json"])
    out, err = capsys.readouterr()
    assert out, err
    return json.loads(out)


@pytest.mark.parametrize("case", CASES)
def test_the_launch_line_holds_every_setting(capsys, case):
    """A line that leaves the offload out would run out of memory at the first try."""
    asked = of(capsys, ["fit", "serve", *shlex.split(case), "--reserve", "0"])
    assert asked["verdict"] == "fits"
    job, line = asked["job"], asked["next_command"]
    machine = case.split("--on ")[1].split()[0]
    again = of(
        capsys,
        [
            "fit",
            "serve",
            "--from",
            f"{job['engine']}@{job['engine_version']}:{line}",
            "--on",
            machine,
            "--reserve",
            "0",
        ],
    )
    assert (again["worst"], again["serving"]) == (asked["worst"], asked["serving"]), line


def test_options_over_a_launch_line_are_in_the_line_that_is_printed(capsys):
    line = "vllm:vllm serve deepseek-v3 --tensor-parallel-size 8 --max-model-len 64k --seed 3"
    words = ["--on", "8xH200", "--context", "32k", "--kv-dtype", "fp8", "--ep"]
    asked = of(capsys, ["fit", "serve", "--from", line, *words])
    told = asked["next_command"]
    assert "--seed 3" in told
    again = of(capsys, ["fit", "serve", "--from", f"vllm:{told}", "--on", "8xH200"])
    assert (again["worst"], again["serving"]) == (asked["worst"], asked["serving"])


@pytest.mark.parametrize(
    "case",
    [
        "deepseek-v3 --on 8xH100 --reserve 10% --max-num-seqs 16",
        "qwen3-8b --on RTX4090 --kv-dtype fp8 --reserve 30%",
        "gpt-oss-120b --on H100 --max-batched-tokens 4096",
        "qwen3-30b-a3b --on RTX4090 --engine llamacpp --quantization gguf:Q4_K_M --context 131072 --concurrency 8",
    ],
)
def test_the_fit_with_the_advice_keeps_what_was_typed_and_gives_what_was_said(capsys, case):
    words = ["fit", "serve", *shlex.split(case)]
    before = of(capsys, words)
    assert before["verdict"] != "fits"
    advice, told = before["advice"][0], before["next_command"]
    after = of(capsys, shlex.split(told)[1:])
    assert told.startswith("ullage fit serve")
    assert after["verdict"] == advice["verdict"]
    assert after["serving"]["max_concurrency"] == advice["max_concurrency"]
    assert after["device"]["reserve_bytes"] == before["device"]["reserve_bytes"]
    for flag in ("--max-num-seqs", "--reserve", "--kv-dtype"):
        assert (flag in told) == (flag in case)


def test_a_model_that_was_read_from_a_folder_is_named_by_it(capsys, tmp_path):
    config = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 80}
    config |= {"num_attention_heads": 32, "vocab_size": 32000, "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    fits = of(capsys, ["fit", "serve", str(tmp_path), "--on", "8xH100"])
    assert fits["next_command"].startswith(f"vllm serve {tmp_path} ")
    small = of(capsys, ["fit", "serve", str(tmp_path), "--on", "T4"])
    assert str(tmp_path) in small["next_command"]
    assert main(shlex.split(small["next_command"])[1:]) in (0, 3, 4)
    capsys.readouterr()


def test_where_nothing_mends_it_the_explanation_is_of_this_machine(capsys):
    lost = of(capsys, ["fit", "serve", "llama-3.1-405b", "--on", "T4"])
    told = lost["next_command"]
    assert told == "ullage explain weights fit serve llama-3.1-405b --on T4"
    assert main(shlex.split(told)[1:]) == 0
    assert f"{lost['serving']['weights_bytes'] / 2**30:,.2f} GiB" in capsys.readouterr().out


def test_ollama_is_told_in_its_own_words(capsys):
    told = of(capsys, ["fit", "serve", "llama-3.1-8b", "--on", "T4", "--engine", "ollama", "--context", "8K"])
    assert told["next_command"] == "OLLAMA_CONTEXT_LENGTH=8192 OLLAMA_NUM_PARALLEL=1 ollama serve"
