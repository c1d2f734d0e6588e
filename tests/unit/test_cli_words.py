"""What people mistype: the nearest name is said; what cannot go together, or nothing would follow, is refused."""

import json

import pytest

from ullage.cli import main

FIT = ["fit", "serve", "deepseek-v3", "--on", "8xH200"]
LINE = ["fit", "serve", "--from", "vllm:vllm serve deepseek-v3 --tensor-parallel-size 8", "--on", "8xH200"]
LLAMA = ["fit", "serve", "llama-3.1-8b", "--on", "8xH200"]
TRAIN = ["fit", "train", "llama-3.1-8b", "--on", "8xH100"]


def refused(capsys, words):
    code = main(words)
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1), err
    return err


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["fot"], "did you mean fit?"),
        (["modls"], "did you mean models?"),
        ([*FIT, "--contxt", "32k"], "did you mean --context?"),
        ([*FIT, "--contxt=32k"], "did you mean --context?"),
        ([*TRAIN, "--micro-bath", "2"], "did you mean --micro-batch?"),
        ([*TRAIN, "--fsdp", "ful_shard"], "did you mean full_shard?"),
        ([*TRAIN, "--zero", "5"], "see ullage fit train --help"),
        ([*FIT, "extra"], "one word too many"),
        ([*FIT, "--reserve", "-5%"], "--reserve=VALUE"),
        ([*FIT, "--reserve", "8"], "20% or 8GiB"),
        ([*FIT, "--reserve", "500GiB"], "leaves nothing"),
        ([*FIT, "--cpu-offload", "4"], "4GiB"),
        ([*FIT, "--context", "9999999999999999999"], "more than can be counted"),
        ([*LINE, "--tp", "4"], "leave out --tp"),
        ([*LINE, "--engine", "sglang"], "leave out --engine"),
        (["fit", "srve", *LINE[2:]], "neither serve nor a job file"),
        ([*FIT, "--ep", "16"], "16 of 8 ranks"),
        ([*LLAMA, "--ep"], "no experts"),
        ([*LLAMA, "--mtp"], "no layers"),
        ([*LLAMA, "--dtype", "fp8"], "--quantization"),
    ],
)
def test_a_slip_is_one_sentence_that_says_what_would_be_right(capsys, words, meant):
    assert meant in refused(capsys, words)


def of(capsys, words):
    main([*words, "--json", "--no-advice"])
    found = json.loads(capsys.readouterr().out)
    found.pop("next_command")  # it repeats what was typed
    return found


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (["--tensor-parallel-size", "4", "--max-model-len", "32k"], ["--tp", "4", "--context", "32k"]),
        (["--cpu-offload-gb", "4"], ["--cpu-offload", "4GiB"]),
        (["--tp-size", "8", "--mem-fraction-static", "0.8"], ["--tp", "8", "--memory-fraction", "80%"]),
        (["-tp", "8", "--enable-expert-parallel"], ["--tp", "8", "--ep"]),
        (["--max-num-batched-tokens", "4096"], ["--max-batched-tokens", "4096"]),
    ],
)
def test_the_engines_own_names_of_options_are_taken_as_well(capsys, theirs, ours):
    assert of(capsys, [*FIT, *theirs]) == of(capsys, [*FIT, *ours])


def test_the_frameworks_own_names_of_options_are_taken_as_well(capsys):
    megatron = [*TRAIN, "--engine", "megatron"]
    theirs = ["--tensor-model-parallel-size", "4", "--sequence-parallel", "--micro-batch-size", "2"]
    ours = ["--tp", "4", "--sp", "--micro-batch", "2"]
    assert of(capsys, [*megatron, *theirs]) == of(capsys, [*megatron, *ours])


def test_a_job_file_has_its_own_layout(capsys, tmp_path):
    path = tmp_path / "job.json"
    path.write_text(
        json.dumps({"kind": "serve", "model": "deepseek-v3", "gpu": "H200", "num_gpus": 8, "engine": "vllm"})
    )
    assert "leave out --tp" in refused(capsys, ["fit", str(path), "--tp", "4"])
    assert "one word too many" in refused(capsys, ["fit", str(path), "deepseek-v3"])
