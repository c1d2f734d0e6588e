"""The largest micro-batch and the longest sequence of a training job fit, and the next larger ones do not."""

import json
import shlex

import pytest

from ullage.cli import main
from ullage.plan.largest import largest_value

CASES = [
    "qwen2.5-0.5b --on H100",
    "llama-3.1-8b --on H100 --recompute full --lora r=16",
    "llama-3.1-8b --on 8xH100 --engine megatron --tp 8 --sp",
    "llama-3.1-8b --on H100",
]


def of(capsys, words):
    main([*words, "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("case", CASES)
def test_the_largest_fits_and_the_next_does_not(capsys, case):
    words = ["fit", "train", *shlex.split(case)]
    found = of(capsys, words)["largest"]
    sizes = {"--micro-batch": (found["micro_batch_size"], 1), "--seq": (found["seq_len"], 256)}
    for flag, (size, step) in sizes.items():
        if size:
            assert of(capsys, [*words, flag, str(size), "--no-advice"])["verdict"] == "fits"
        if found[{"--seq": "seq_len_surely"}.get(flag, "micro_batch_surely")]:
            beyond = main([*words, flag, str((size or 0) + step), "--no-advice", "--json"])
            assert beyond in (2, 3, 4), (flag, size)  # 2: longer than the model can be asked for
            capsys.readouterr()


@pytest.mark.parametrize("start", [1, 3, 40])
@pytest.mark.parametrize("most_that_fits", [0, 1, 7, 55, 4000])
def test_a_line_is_followed_in_few_runs(start, most_that_fits):
    asked = []

    def room(value):
        asked.append(value)
        return 10.0 * (most_that_fits - value) + 5 - 0.001 * value * value

    assert room(most_that_fits) > -16011
    expected = max(
        (value for value in range(1, 4097) if 10.0 * (most_that_fits - value) + 5 - 0.001 * value**2 >= 0), default=0
    )
    asked.clear()
    found, surely = largest_value(room, start, room(start), unit=1, most=4096, runs=7)
    assert found <= expected
    assert not surely or found == expected
    assert len(asked) <= 8
    assert surely or most_that_fits == 4000


def test_what_is_refused_counts_as_too_large():
    assert largest_value(lambda value: None if value > 4 else 1.0, 2, 1.0, unit=1, most=64, runs=9)[0] == 4


def test_the_next_command_of_a_training_fit_does_what_it_says(capsys):
    tight = of(capsys, ["fit", "train", "llama-3.1-8b", "--on", "H100", "--reserve", "15%"])
    assert tight["verdict"] != "fits"
    told = tight["next_command"]
    assert "--reserve 15%" in told
    after = of(capsys, shlex.split(told)[1:])
    assert after["verdict"] == tight["advice"][0]["verdict"]
    gain = tight["worst"]["device_used_bytes"] - after["worst"]["device_used_bytes"]
    assert gain == tight["advice"][0]["gain_bytes"]
    roomy = of(capsys, ["fit", "train", "qwen2.5-0.5b", "--on", "H100"])
    assert of(capsys, shlex.split(roomy["next_command"])[1:])["verdict"] == "fits"


def test_what_was_not_given_is_said_and_typing_it_changes_nothing(capsys):
    words = ["fit", "train", "llama-3.1-8b", "--on", "8xH100", "--no-advice"]
    short = of(capsys, words)
    said = " ".join(short["job"]["assumed"])
    for word in ("micro-batch 1", "4,096 tokens", "adamw", "no recompute", "data parallel over 8", "full_shard"):
        assert word in said
    typed = ["--engine", "fsdp2", "--dp", "8", "--fsdp", "full_shard", "--micro-batch", "1", "--seq", "4096"]
    long = of(capsys, [*words, *typed, "--optimizer", "adamw", "--recompute", "none", "--precision", "amp"])
    assert (long["worst"], long["terms"]) == (short["worst"], short["terms"])


def test_an_optimizer_that_nobody_knows_is_not_blamed_on_the_framework(capsys):
    assert main(["fit", "train", "llama-3.1-8b", "--on", "8xH100", "--optimizer", "adamw8bits"]) == 2
    assert "did you mean adamw_8bit?" in capsys.readouterr().err


def test_where_few_runs_may_be_spent_the_strongest_changes_are_tried_first(capsys):
    """80 layers whose every tensor is placed: without recompute nothing else would help."""
    found = of(capsys, ["fit", "train", "llama-3.1-70b", "--on", "8xH100", "--engine", "fsdp2"])
    assert found["verdict"] == "does_not_fit"
    assert found["advice"][0]["verdict"] == "fits"
    assert any("recompute" in item["change"] for item in found["advice"])


def test_padding_is_said_and_can_be_taken_away(capsys):
    """A mask makes SDPA repeat keys and values for every head; a trace of packed sequences has none."""
    words = ["fit", "train", "llama-3.2-1b", "--on", "H100", "--seq", "2048", "--engine", "hf_trainer", "--no-advice"]
    padded, packed = of(capsys, words), of(capsys, [*words, "--packing"])
    assert "attention mask" in " ".join(padded["job"]["assumed"])
    assert "attention mask" not in " ".join(packed["job"]["assumed"])
    assert packed["worst"]["allocated_peak_bytes"] < padded["worst"]["allocated_peak_bytes"]
    assert main(["fit", "train", "llama-3.2-1b", "--on", "8xH100", "--engine", "fsdp2", "--packing"]) == 2
    assert "--packing" in capsys.readouterr().err
