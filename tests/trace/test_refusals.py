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


def given():
    return nn.Linear(4, 4), torch.zeros(2, 4)


def own():
    module, x = nn.Linear(4, 4), torch.zeros(2, 4)
    return module, lambda: module(x).sum().backward()
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


@pytest.mark.parametrize(
    ("name", "options", "refused"),
    [
        ("given", {"recompute": "full", "dtype": "float32"}, "--dtype, --recompute"),
        ("given", {"base": "nf4"}, "--base"),
        ("own", {"optimizer": "sgd", "grad_accum": 2}, "--grad-accum, --optimizer"),
        ("own", {"autocast": "bfloat16"}, "--autocast"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(name: str, options: dict[str, object], refused: str) -> None:
    with pytest.raises(InputError, match=f"^{refused} would change nothing"):
        trace(f"crooked_steps:{name}", **options)


def test_options_that_count_are_followed() -> None:
    plain, twice = (trace("crooked_steps:given", optimizer=name) for name in ("sgd", "adamw"))
    assert twice.peak_allocated_bytes > plain.peak_allocated_bytes
    assert trace("crooked_steps:own", steps=3).trace.events
