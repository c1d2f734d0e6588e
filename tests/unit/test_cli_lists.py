"""The lists: nothing of a figure is cut, every engine is named, and doctor knows every extra."""

import json
import re
from pathlib import Path

import pytest

from ullage.cli import main

ROOT = Path(__file__).parents[2]


def text_of(capsys, *words):
    assert main(list(words)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("width", ["60", "80", "120"])
@pytest.mark.parametrize("words", [("gpus",), ("gpus", "H200"), ("models",)])
def test_nothing_of_a_list_is_cut(capsys, monkeypatch, words, width):
    monkeypatch.setenv("COLUMNS", width)
    for line in text_of(capsys, *words).splitlines():
        assert "…" not in line


def test_engines_of_serving_and_of_training_are_listed(capsys):
    found = json.loads(text_of(capsys, "engines", "--json"))
    kinds = {engine["name"]: engine["kind"] for engine in found}
    assert kinds["vllm"] == "serve" and kinds["megatron"] == "train" and kinds["fsdp2"] == "train"
    assert [engine["name"] for engine in json.loads(text_of(capsys, "engines", "sglang", "--json"))] == ["sglang"]
    assert "megatron" in text_of(capsys, "engines")
    assert main(["engines", "vlm"]) == 2
    assert "known are vllm" in capsys.readouterr().err


def test_doctor_knows_every_extra(capsys):
    table = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("[")[0:]
    extras = set(re.findall(r"^(\w+) = ", "[".join(table).split("\n[")[0], re.MULTILINE))
    assert extras == set(json.loads(text_of(capsys, "doctor", "--json"))["extras"])
