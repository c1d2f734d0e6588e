"""The command: the user's own functions, JSON, snapshot, page, and what cannot be traced."""

import json
import pickle

import pytest

pytest.importorskip("torch")
pytest.importorskip("jsonschema")

import jsonschema

from ullage.cli import main
from ullage.trace.api import trace

pytestmark = pytest.mark.reference
MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 1)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))

def simple():
    return Net(), torch.ones(4, 32)

def step():
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    data = torch.ones(4, 32, device="cuda")
    def run():
        optimizer.zero_grad()
        net(data).sum().backward()
        optimizer.step()
        torch.cuda.synchronize()
    return net, run

class Chooses(Net):
    def forward(self, x):
        if (self.first(x) > 0).any():
            return self.first(x).sum()
        return x.sum()

def chooses():
    return Chooses(), torch.ones(4, 32)

class Routes(Net):
    def forward(self, x):
        index = torch.arange(8, device=x.device)
        return self.first(x[:, None].expand(4, 8, 32)[:, (index % 2 == 0).nonzero().flatten()]).sum()

def routes():
    return Routes(), torch.ones(4, 32)

def wrong():
    return 3

class Numpy(Net):
    def forward(self, x):
        return torch.linalg.eig(x[:4, :4]).eigenvalues.numpy().sum()

def numpy():
    return Numpy(), torch.ones(4, 32)
"""


@pytest.fixture
def module(tmp_path):
    path = tmp_path / "mine_to_trace.py"
    path.write_text(MODULE)
    return str(path)


def answer(capsys, *words):
    code = main(["trace", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("name", ["simple", "step", "routes"])
def test_a_function_of_mine(module, capsys, name):
    code, out, _err = answer(capsys, f"{module}:{name}", "--json")
    assert code == 0
    found = json.loads(out)
    from importlib.resources import files

    jsonschema.validate(found, json.loads(files("ullage").joinpath("schema/trace.json").read_text()))
    assert found["num_parameters"] == 32 * 64 + 64 + 64 + 1
    assert found["peak"]["tensors"] and found["peak_allocated_bytes"] >= 2 * 4 * found["num_parameters"]
    assert {phase["phase"] for phase in found["phases"]} >= {"forward", "backward", "optimizer"}


def test_modules_are_named(module):
    result = trace(f"{module}:simple", steps=1, stacks=True)
    gradients = {one.owner for one in result.trace.allocations if one.category == "gradient"}
    assert gradients == {"first.weight", "first.bias", "second.weight", "second.bias"}
    backward = {place.module for place in result.trace.places if place.phase == "backward"}
    assert {"first", "second"} <= backward
    assert any(
        "mine_to_trace.py" in line and line.endswith(":forward") for stack in result.trace.stacks for line in stack
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("chooses", ["values", "leave it out"]),
        ("wrong", ["must return (module, inputs)"]),
        ("nothing", ["no function 'nothing'"]),
        ("numpy", ["numpy"]),
    ],
)
def test_what_cannot_be_traced_is_one_sentence(module, capsys, name, words):
    code, out, err = answer(capsys, f"{module}:{name}")
    assert code == 2 and out == ""
    assert err.count("\n") == 1 and "Traceback" not in err
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    "words",
    [
        ["no-such-model-at-all"],
        ["no_such_module:function"],
        ["llama-3.1-8b", "--seq", "0"],
        ["llama-3.1-8b", "--lora", "rank"],
        ["llama-3.1-8b", "--optimizer", "none-such"],
        ["."],
    ],
)
def test_bad_input(capsys, words):
    code, out, err = answer(capsys, *words)
    assert code == 2 and out == "" and err.startswith("ullage: ") and err.count("\n") == 1


def test_snapshot_opens_and_replays_alike(module, tmp_path, capsys):
    from torch.cuda import _memory_viz

    path = tmp_path / "snapshot.pickle"
    code, out, _err = answer(capsys, f"{module}:simple", "--snapshot", str(path), "--json")
    assert code == 0
    found = json.loads(out)
    snapshot = pickle.loads(path.read_bytes())
    for draw in (_memory_viz.trace, _memory_viz.trace_plot, _memory_viz.segment_plot):
        assert draw(snapshot)
    assert main(["replay", str(path), "--json"]) == 0
    replayed = json.loads(capsys.readouterr().out)
    assert replayed["placement"]["checked"] == replayed["placement"]["equal"] > 0
    assert replayed["placement"]["final_equal"] == replayed["placement"]["final_segments"]
    for key in ("peak_allocated_bytes", "peak_reserved_bytes"):
        assert replayed[key] == found[key]


def test_page(module, tmp_path, capsys):
    pytest.importorskip("plotly")
    pytest.importorskip("jinja2")
    path = tmp_path / "trace.html"
    assert answer(capsys, f"{module}:simple", "--html", str(path))[0] == 0
    text = path.read_text()
    assert "stackgroup" in text and "first.weight" in text


def test_text_names_the_moment(module, capsys):
    code, out, _err = answer(capsys, f"{module}:simple", "--on", "h100")
    assert code == 0
    assert out.startswith("peak ") and " of step " in out.splitlines()[0]
