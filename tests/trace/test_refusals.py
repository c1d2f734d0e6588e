"""Steps that cannot run on meta tensors: the operator, the user's own line, and what would be right."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from ullage.errors import InputError
from ullage.trace.api import trace

pytestmark = pytest.mark.reference
STEPS = """
import torch
from torch import nn


def picked():
    out = nn.Linear(4, 4)(torch.randn(2, 4))
    out[out > 0].sum().backward()


def distinct():
    torch.unique(torch.randint(0, 9, (10,)))


def listed():
    return nn.Linear(4, 4)(torch.randn(2, 4)).tolist()


def branched():
    out = nn.Linear(4, 4)(torch.randn(2, 4)).sum()
    if out > 0:
        out.backward()


def crooked():
    nn.Linear(4, 4)(torch.randn(2, 5))
"""


@pytest.fixture(autouse=True)
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "crooked_steps.py").write_text(STEPS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("crooked_steps", None)


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("picked", 8, "nonzero makes as many elements as its values say"),
        ("distinct", 12, "unique2 makes as many elements as its values say"),
        ("listed", 16, "asks for the value of a tensor"),
        ("branched", 21, "asks for the value of a tensor"),
        ("crooked", 26, "failed on meta tensors: RuntimeError"),
    ],
)
def test_the_sentence_names_what_where_and_what_would_be_right(name: str, line: int, words: str) -> None:
    with pytest.raises(InputError) as caught:
        trace(f"crooked_steps:{name}")
    sentence = str(caught.value)
    assert words in sentence and f"crooked_steps.py:{line}" in sentence
    assert "; " in sentence and len(sentence) < 400
