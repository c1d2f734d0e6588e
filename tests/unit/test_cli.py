"""The command line: exit codes, one sentence on stderr, results on stdout."""

import json
import os
import subprocess
import sys

import jsonschema
import pytest

from ullage import __version__
from ullage.cli import COMMANDS, main

FIT = ["fit", "serve", "deepseek-v3", "--on", "8xH200", "--context", "8k"]


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def fit_json(capsys, *arguments):
    code, out, err = run(capsys, *arguments, "--json")
    values = json.loads(out)
    assert code == values["exit_code"], err
    return values


def test_fit_prints_the_verdict_on_stdout_and_nothing_else_on_stderr(capsys):
    code, out, err = run(capsys, *FIT)
    assert code == 0
    assert "fits" in out.splitlines()[0]
    assert err == ""


@pytest.mark.parametrize("engine", ["vllm", "sglang", "vllm@0.11.0", "sglang@0.5.9"])
def test_fit_json(capsys, engine):
    values = fit_json(capsys, *FIT, "--engine", engine)
    assert values["schema_version"] == 1
    assert values["model"]["name"] == "deepseek-ai/DeepSeek-V3"
    assert values["job"]["parallel"]["tensor_parallel_size"] == 8
    assert any("layout not given" in sentence for sentence in values["job"]["assumed"])
    assert 70 < values["serving"]["weights_bytes"] / 2**30 < 95


def test_exit_codes_are_the_verdict(capsys):
    assert fit_json(capsys, *FIT)["exit_code"] == 0
    assert fit_json(capsys, *FIT, "--reserve", "45%")["exit_code"] == 4
    assert fit_json(capsys, "fit", "serve", "deepseek-v3", "--on", "8xA100-40GB")["exit_code"] == 3


def test_flags_reach_the_job(capsys):
    values = fit_json(
        capsys, *FIT, "--tp", 4, "--pp", 2, "--max-batched-tokens", 4096, "--max-num-seqs", 64, "--kv-dtype", "fp8",
        "--memory-fraction", 0.8, "--enforce-eager", "--block-size", 64, "--ep", "--concurrency", 7,
    )  # fmt: skip
    job, parallel = values["job"], values["job"]["parallel"]
    assert (parallel["tensor_parallel_size"], parallel["pipeline_parallel_size"], parallel["expert_parallel"]) == (
        4,
        2,
        True,
    )
    assert (job["max_num_batched_tokens"], job["max_num_seqs"], job["memory_fraction"]) == (4096, 64, 0.8)
    assert (job["concurrency"], job["context"], job["enforce_eager"]) == (7, 8000, True)
    assert job["kv_cache_dtype"] in ("fp8", "fp8_e4m3", "float8_e4m3")


def test_cheaper_settings_need_less(capsys):
    plain = fit_json(capsys, *FIT, "--concurrency", 64)
    for flags in (["--kv-dtype", "fp8"], ["--max-batched-tokens", "2048"]):
        assert (
            fit_json(capsys, *FIT, "--concurrency", 64, *flags)["worst"]["needed_bytes"]
            < plain["worst"]["needed_bytes"]
        )


def test_metrics_are_printed_on_demand(capsys):
    assert "parameter_utilisation" in run(capsys, *FIT, "--metrics")[1]
    assert "parameter_utilisation" not in run(capsys, *FIT)[1]


@pytest.mark.parametrize(
    "line",
    [
        "vllm:vllm serve deepseek-ai/DeepSeek-V3 --tensor-parallel-size 8 --max-model-len 8192",
        "sglang:python -m sglang.launch_server --model-path deepseek-ai/DeepSeek-V3 --tp 8 --context-length 8192",
    ],
)
def test_launch_lines(capsys, line):
    values = fit_json(capsys, "fit", "serve", "--from", line, "--on", "8xH200")
    assert values["job"]["engine"] == line.partition(":")[0]
    assert values["job"]["parallel"]["tensor_parallel_size"] == 8
    assert values["job"]["max_model_len"] == 8192
    assert values["job"]["native"] == line.partition(":")[2]


def test_a_launch_line_in_a_file(capsys, tmp_path):
    script = tmp_path / "run.sh"
    script.write_text("vllm serve deepseek-ai/DeepSeek-V3 \\\n  -tp 8 \\\n  --max-model-len 8192\n")
    assert fit_json(capsys, "fit", "--from", f"vllm:{script}", "--on", "8xH200")["job"]["max_model_len"] == 8192


def test_a_job_file(capsys, tmp_path):
    job = {"kind": "serve", "model": "deepseek-ai/DeepSeek-V3", "gpu": "H200-141GB", "num_gpus": 8, "engine": "vllm"}
    job |= {"parallel": {"tp": 8}, "max_model_len": 8192}
    path = tmp_path / "job.json"
    path.write_text(json.dumps({"job": job}))
    assert fit_json(capsys, "fit", path)["device"]["num_gpus"] == 8
    path.write_text(json.dumps(job))
    assert fit_json(capsys, "fit", path, "--on", "2x8xH20")["device"]["num_nodes"] == 2


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["fit"], 2, "nothing to fit"),
        (["fit", "serve"], 2, "no model"),
        (["fit", "serve", "deepseek-v3"], 2, "--on"),
        (["fit", "serve", "deepseek-v33", "--on", "8xH200"], 2, "DeepSeek-V3"),
        (["fit", "serve", "deepseek-v3", "--on", "8xH9"], 2, "H100"),
        (["fit", "serve", "deepseek-v3", "--on", "8xH200", "--tp", "16"], 2, "16 GPUs"),
        (["fit", "serve", "deepseek-v3", "--on", "8xH200", "--tp", "0"], 2, "--tp"),
        (["fit", "serve", "deepseek-v3", "--on", "8xH200", "--context", "long"], 2, "--context"),
        (["fit", "serve", "deepseek-v3", "--on", "8xH200", "--engine", "magic"], 2, "vllm"),
        (["fit", "serve", "deepseek-v3", "--on", "8xH200", "--reserve", "much"], 2, "reserve"),
        (["fit", "serve", "deepseek-v3", "--on", "8xH200", "--memory-fraction", "1.5"], 2, "share"),
        (["fit", "serve", "deepseek-v3", "--on", "8xH200", "--nonsense"], 2, "--nonsense"),
        (["fit", "serve", "--from", "vllm:vllm serve deepseek-v3 --nonsense 1", "--on", "8xH200"], 2, "nonsense"),
        (["fit", "serve", "--from", "magic:x y", "--on", "8xH200"], 2, "unknown engine"),
        (["fit", "serve", "--from", "vllm:vllm serve deepseek-v3"], 2, "--on"),
        (["fit", "no-such-file.json"], 2, "no-such-file.json"),
        (["fit", "train", "deepseek-v3"], 2, "train"),
        (["nonsense"], 2, "nonsense"),
        (["--nonsense"], 2, "--nonsense"),
        (["schema", "nonsense"], 2, "fit"),
        (["models", "nonsense-9000"], 2, "nonsense-9000"),
        (["gpus", "nonsense"], 2, "nonsense"),
        (["explain", "nonsense"], 2, "nonsense"),
    ],
)
def test_wrong_input_is_one_sentence_on_stderr(capsys, arguments, code, words):
    got, out, err = run(capsys, *arguments)
    assert (got, out) == (code, "")
    assert err.startswith("ullage: ")
    assert err.count("\n") == 1
    assert words in err


def test_an_unknown_architecture_is_exit_5(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "never_seen", "hidden_size": 64}))
    code, out, err = run(capsys, "fit", "serve", tmp_path, "--on", "H100")
    assert (code, out) == (5, "")
    assert "never_seen" in err and err.count("\n") == 1


def test_a_bug_is_one_line_and_a_traceback_only_on_demand(capsys, monkeypatch):
    def broken(*_arguments, **_settings):
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr("ullage.fitting.fit_serving", broken)
    monkeypatch.delenv("ULLAGE_DEBUG", raising=False)
    code, _out, err = run(capsys, *FIT)
    assert code == 1
    assert "ZeroDivisionError: two lines" in err and err.count("\n") == 1
    monkeypatch.setenv("ULLAGE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(FIT)


def test_control_c_is_clean(capsys, monkeypatch):
    def interrupted(*_arguments, **_settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("ullage.fitting.fit_serving", interrupted)
    code, _out, err = run(capsys, *FIT)
    assert code == 130
    assert err.count("\n") == 1


def test_a_closed_pipe_is_clean():
    command = f"{sys.executable} -m ullage models | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stderr == ""


def test_version_and_help(capsys):
    assert run(capsys, "--version")[:2] == (0, f"ullage {__version__}\n")
    code, out, _err = run(capsys)
    assert code == 0
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(capsys, command):
    code, out, err = run(capsys, command, "--help")
    assert (code, err) == (0, "")
    assert "usage: ullage" in out


def test_models_lists_and_counts(capsys, tmp_path):
    code, out, _err = run(capsys, "models", "--json")
    assert code == 0
    assert {"name", "num_parameters"} <= set(json.loads(out)[0])
    facts = json.loads(run(capsys, "models", "deepseek-v3", "--json")[1])
    assert (facts["num_parameters"], facts["num_layers"], facts["kv_bytes_per_token"]) == (
        671026404352,
        61,
        61 * 576 * 2,
    )
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "vocab_size": 100, "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert json.loads(run(capsys, "models", tmp_path / "config.json", "--json")[1])["num_layers"] == 2
    assert "DeepSeek-V3" in run(capsys, "models")[1]
    assert "671,026,404,352" in run(capsys, "models", "deepseek-v3")[1]


def test_gpus(capsys):
    found = json.loads(run(capsys, "gpus", "--json")[1])
    assert len(found) > 60
    assert all(len(entry["total"]["source"]) > 20 for entry in found)
    assert "H200" in run(capsys, "gpus", "H200")[1]


def test_engines_schema_doctor(capsys):
    engines = {engine["name"] for engine in json.loads(run(capsys, "engines", "--json")[1])}
    assert {"vllm", "sglang", "llamacpp"} <= engines
    assert "vllm" in run(capsys, "engines")[1]
    jsonschema.Draft202012Validator.check_schema(json.loads(run(capsys, "schema", "fit")[1]))
    assert "fit" in run(capsys, "schema")[1].split()
    assert json.loads(run(capsys, "doctor", "--json")[1])["ullage"] == __version__
    assert "mirrored" in run(capsys, "doctor")[1]


def test_explain(capsys):
    code, out, _err = run(capsys, "explain", "latent_attention")
    assert code == 0
    assert "Formula:" in out and "Source:" in out
    out = run(capsys, "explain", "weights", "deepseek-v3", "--on", "8xH200")[1]
    assert "deepseek-v3 on 8xH200: weights = " in out
    assert json.loads(run(capsys, "explain", "latent_attention", "--json")[1])["formulas"]


def test_python_minus_m_works():
    done = subprocess.run([sys.executable, "-m", "ullage", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"ullage {__version__}\n"


@pytest.mark.parametrize(
    ("engine", "flags", "sizes"),
    [
        ("vllm", [], (8, 1, 1)),
        ("vllm", ["--pp", "2"], (4, 2, 1)),
        ("vllm", ["--dp", "2"], (4, 1, 2)),
        ("vllm", ["--dp-attention"], (1, 1, 8)),
        ("vllm", ["--tp", "4"], (4, 1, 1)),
        ("sglang", ["--dp-attention"], (8, 1, 8)),
        ("sglang", ["--dp-attention", "4"], (8, 1, 4)),
        ("sglang", ["--tp", "4", "--dp-attention"], (4, 1, 4)),
    ],
)
def test_a_layout_given_in_part_is_completed(capsys, engine, flags, sizes):
    parallel = fit_json(capsys, *FIT, "--engine", engine, *flags)["job"]["parallel"]
    assert tuple(parallel[f"{name}_parallel_size"] for name in ("tensor", "pipeline", "data")) == sizes
    assert parallel["dp_attention"] == ("--dp-attention" in flags)


def test_a_quantisation_that_is_not_known_is_refused(capsys):
    code, _out, err = run(capsys, *FIT, "--quantization", "nonsense")
    assert code == 2
    assert "nonsense" in err


LLAMA_CPP = ["fit", "serve", "qwen3-30b-a3b", "--on", "2xRTX4090", "--engine", "llamacpp", "--quantization", "Q4_K_M"]


@pytest.mark.parametrize(
    "words",
    [[*LLAMA_CPP, "--pp", "2"], [*LLAMA_CPP, "--ep"], [*LLAMA_CPP, "--enforce-eager"], [*LLAMA_CPP, "--mtp", "2"],
     [*FIT, "--redundant-experts", "32"]],
)  # fmt: skip
def test_options_that_the_engine_would_pass_over_are_refused(capsys, words):
    code, _out, err = run(capsys, *words)
    assert code == 2 and err.count("\n") == 1 and words[-2 if words[-1].isdigit() else -1] in err


@pytest.mark.parametrize("unknown", [True, "the optimizer", 3, {"a": 1}, ["DoRA on"]])
def test_what_a_job_file_calls_unknown_need_not_be_a_list(capsys, tmp_path, unknown):
    job = {
        "kind": "train",
        "model": "meta-llama/Llama-3.2-1B",
        "gpu": "H100-80GB",
        "num_gpus": 1,
        "engine": "hf_trainer",
    }
    job |= {"micro_batch_size": 1, "seq_len": 512, "method": "lora", "lora": {"rank": 8}, "unknown": unknown}
    path = tmp_path / "job.json"
    path.write_text(json.dumps({"job": job}))
    assert fit_json(capsys, "fit", path)["verdict"] == "fits"
