"""A PyTorch that lacks a private name is told by one sentence that names it."""

import importlib

import pytest

pytest.importorskip("torch")

import torch

from ullage.cli import main
from ullage.errors import InputError
from ullage.trace import internals
from ullage.trace.api import trace

pytestmark = pytest.mark.reference
NAMES = [
    (ranks, module, name)
    for ranks, wanted in ((0, internals.ALWAYS), (2, internals.RANKS))
    for module, names in wanted
    for name in names
]


def linear():
    return torch.nn.Linear(8, 8), torch.ones(2, 8, device="cpu")


@pytest.mark.parametrize(("ranks", "module", "name"), NAMES)
def test_every_name_is_looked_for(monkeypatch, ranks, module, name):
    """The name goes only for the check: what else needs it is not reached."""
    seen = internals._is_there
    monkeypatch.setattr(internals, "_is_there", lambda *asked: asked != (module, name) and seen(*asked))
    with pytest.raises(InputError) as raised:
        trace(linear, world=ranks, engine="plain", steps=1)
    assert f"{module}.{name}" in str(raised.value) and "2.13" in str(raised.value)


def test_a_name_that_is_gone_is_missed(monkeypatch):
    group = importlib.import_module("torch.distributed.fsdp._fully_shard._fsdp_param_group")
    monkeypatch.delattr(group, "foreach_reduce")
    with pytest.raises(InputError, match="foreach_reduce"):
        internals.check_names(internals.RANKS)
    with pytest.raises(InputError, match=r"no_such_module\.anything"):
        internals.check_names((("torch.no_such_module", ("anything",)),))
    internals.check_names(internals.ALWAYS)


def test_the_command_says_so_in_one_sentence(monkeypatch, config, capsys):
    group = importlib.import_module("torch.distributed.fsdp._fully_shard._fsdp_param_group")
    monkeypatch.delattr(group, "foreach_reduce")
    assert main(["trace", config("llama"), "--fsdp", "2", "--seq", "32"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "foreach_reduce" in captured.err
