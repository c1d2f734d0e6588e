"""Names spelled otherwise, things that are no files, pipes that close, terminals that know only ASCII."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ullage.cli import main

FIT = ["fit", "serve", "deepseek-v3", "--no-advice"]


def of(capsys, words):
    main([*words, "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "machine", ["H200:8", "H200x8", "8 H200", "H200 x 8", "8*H200", "8 x h200", "8xH200-SXM-141GB"]
)
def test_one_machine_has_one_answer_however_it_is_spelled(capsys, machine):
    assert of(capsys, [*FIT, "--on", machine]) == of(capsys, [*FIT, "--on", "8xH200"])


@pytest.mark.parametrize("machine", ["2xRTX4090", "RTX4090x2", "2 RTX 4090", "RTX-4090:2"])
def test_digits_of_a_card_are_not_its_number(capsys, machine):
    found = of(capsys, ["fit", "serve", "qwen3-8b", "--no-advice", "--on", machine])
    assert (found["device"]["gpu"], found["device"]["num_gpus"]) == ("RTX-4090-24GB", 2)


@pytest.mark.parametrize("name", ["deepseekv3", "DeepSeek V3", "deepseek_v3", "deepseek-ai/deepseek-v3"])
def test_hyphens_of_a_model_may_be_set_otherwise(capsys, name):
    assert of(capsys, ["models", name])["name"] == "deepseek-ai/DeepSeek-V3"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["models", "{file}"], "neither a config.json nor a .gguf"),
        (["models", "{folder}/none/config.json"], "no such file"),
        (["models", "{folder}"], "neither a config.json nor a .gguf"),
        (["validate", "{folder}"], "is a folder"),
        (["replay", "{folder}"], "is a folder"),
        (["fit", "train", "--from", "megatron:{folder}", "--on", "8xH100"], "is a folder"),
        (["fit", "train", "--from", "megatron:nothing.sh", "--on", "8xH100"], "no such file"),
    ],
)
def test_what_is_no_file_is_said_to_be_none(capsys, tmp_path, words, said):
    (tmp_path / "notes.txt").write_text("nothing")
    filled = [word.format(folder=tmp_path, file=tmp_path / "notes.txt") for word in words]
    assert main(filled) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def ullage(arguments, tail="", **environment):
    command = f"{sys.executable} -m ullage {arguments} {tail}"
    return subprocess.run(["bash", "-c", command], capture_output=True, env={**os.environ, **environment})


@pytest.mark.parametrize(
    "words", ["fit serve deepseek-v3 --on 8xH200", "fit train qwen2.5-0.5b --on H100", "models --json"]
)
def test_a_pipe_that_closes_is_no_internal_error(words):
    done = ullage(words, tail="| true; echo ${PIPESTATUS[0]}")
    assert done.stdout.decode().strip() in ("0", "141")  # 0: all of it was in the pipe before it closed
    assert done.stderr == b""


def test_a_terminal_that_knows_only_ascii_gets_all_figures():
    done = ullage("fit serve deepseek-v3 --on 8xH200 --no-advice", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stderr == b""
    assert b"79.57 GiB" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_is_one_sentence():
    done = ullage("fit serve deepseek-v3 --on 8xH200", tail="> /dev/full")
    assert done.returncode == 1
    assert done.stderr.decode().startswith("ullage: the answer could not be written")


def test_requests_longer_than_the_model_was_made_for_are_warned_of(capsys):
    long = of(capsys, ["fit", "serve", "llama-3.1-8b", "--on", "H200", "--context", "200k", "--no-advice"])
    assert any("131,072 that the model declares" in warning and "VLLM" in warning for warning in long["warnings"])
    fair = of(capsys, ["fit", "serve", "llama-3.1-8b", "--on", "H200", "--context", "100k", "--no-advice"])
    assert not any("declares" in warning for warning in fair["warnings"])
