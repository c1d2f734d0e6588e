"""What a report prints can be explained: every term by its name, and with the numbers of the fit it stands in."""

import json
import re
import shlex

import pytest

from ullage.cli import main
from ullage.cli.explain import known_names, matching

FITS = [
    "serve deepseek-v3 --on 8xH200 --mtp 1 --ep --redundant-experts 32",
    "serve deepseek-v3 --on 8xH200 --engine sglang --mtp 1 --dp-attention",
    "serve qwen3-30b-a3b --on RTX4090 --engine llamacpp --quantization Q4_K_M",
    "serve qwen2.5-vl-7b --on H100 --cpu-offload 4GiB",
    "train llama-3.1-8b --on 8xH100",
    "train llama-3.1-8b --on 8xH100 --engine deepspeed --zero 2",
    "train llama-3.1-8b --on H100 --lora r=16 --rlhf dpo",
    "train qwen2.5-7b --on 4xA100-40GB --engine hf_trainer --method qlora --lora r=8",
    "train llama-3.1-70b --on 64xH100 --engine megatron --tp 8 --pp 4 --vpp 2 --schedule interleaved",
    "train deepseek-v3 --on 256x8xH800 --engine megatron --pp 16 --ep 64 --zero 1",
]


def of(capsys, words):
    main([*words, "--json"])
    return json.loads(capsys.readouterr().out)


def names_of(terms):
    for term in terms:
        yield term["name"]
        yield from names_of(term["children"])


@pytest.mark.parametrize("line", FITS)
def test_every_term_that_a_ledger_prints_can_be_explained(capsys, line):
    values = of(capsys, ["fit", *shlex.split(line), "--no-advice"])
    unexplained = [name for name in sorted(set(names_of(values["terms"]))) if not matching(name)]
    assert not unexplained


@pytest.mark.parametrize("line", FITS)
def test_a_term_is_filled_in_with_the_numbers_of_the_fit(capsys, line):
    values = of(capsys, ["fit", *shlex.split(line), "--no-advice"])
    largest = max(values["terms"], key=lambda term: term["bytes"])
    told = of(capsys, ["explain", largest["name"], "fit", *shlex.split(line)])
    assert largest["bytes"] in [term["bytes"] for term in told["filled_in"]]


def test_the_nearest_names_of_a_slip_are_terms_too(capsys):
    assert main(["explain", "kv_cach"]) == 2
    assert "nearest are kv_cache" in capsys.readouterr().err
    assert {"kv_cache", "cuda_context", "optimizer_moments", "free"} <= set(known_names())


def test_the_formulas_of_the_name_come_first_and_numbers_before_them(capsys):
    assert matching("kv_cache")[0].name == "attention_row"
    assert matching("weights")[0].name == "weights_term"
    assert main(["explain", "free"]) == 0
    assert "total" in capsys.readouterr().out
    assert main(["explain", "weights", "deepseek-v3", "--on", "8xH200"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("deepseek-v3 on 8xH200: weights = ") and "source: " in out.split("\n\n")[0]


def test_a_wrong_fit_behind_a_term_is_one_sentence(capsys):
    for line, words in (("serve deepseek-v3 --on 8xH9", "H9"), ("train llama-3.1-8b --on H100 --sq 5", "--seq")):
        assert main(["explain", "weights", "fit", *shlex.split(line)]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("line", [line for line in FITS if line.startswith("train")])
def test_every_term_of_a_step_says_where_it_is_from(capsys, line):
    values = of(capsys, ["fit", *shlex.split(line), "--no-advice"])
    for term in values["terms"]:
        if term["bytes"]:
            assert term["source"] or any(child["source"] for child in term["children"]), term["name"]
            assert term["formula"] or term["children"] or term["certainty"] == "exact", term["name"]


@pytest.mark.parametrize(
    "line", ["llama-3.1-8b --on H100", "llama-3.2-1b --on H100 --packing", "llama-3.1-8b --on H100 --lora r=8"]
)
def test_the_formula_of_the_loss_gives_its_bytes(capsys, line):
    """A reader who multiplies finds the number: the worst point may be the backward of the loss."""
    values = of(capsys, ["fit", "train", *shlex.split(line), "--no-advice"])
    loss = next(term for term in values["terms"] if term["name"] == "loss")
    tokens, vocabulary, widths = re.fullmatch(r"([\d,]+) tokens x ([\d,]+) x \((.*)\)", loss["formula"]).groups()
    width = sum(int(part.rsplit(" ", 1)[1]) for part in widths.split(" + "))
    product = int(tokens.replace(",", "")) * int(vocabulary.replace(",", "")) * width
    assert loss["bytes"] == pytest.approx(product, rel=1e-3)
