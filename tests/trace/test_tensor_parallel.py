"""Tensor parallelism: every buffer of a rank against real ranks of gloo, and what cannot be split."""

import json
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import torch.distributed as dist
from parallel_net import KINDS, LLAMA_JOB, SIZE, TOKENS, WORLD, program
from small_models import LLAMA
from step_sizes import from_first, traced_sizes, without_scratch

from ullage.cli import main
from ullage.errors import InputError
from ullage.trace.api import trace

pytestmark = pytest.mark.reference
NET = Path(__file__).with_name("parallel_net.py")
SPLIT = LLAMA | {"num_hidden_layers": 2, "hidden_size": 256, "vocab_size": 1022, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(SPLIT))
    return str(path)


@pytest.fixture(scope="module")
def real(tmp_path_factory, llama):
    """Run the ranks; return what each of them took and freed."""
    folder = tmp_path_factory.mktemp("ranks")
    subprocess.run(
        [sys.executable, str(NET), str(folder / "store"), str(folder / "out"), llama], check=True, timeout=300
    )
    return [json.loads((folder / f"out.{rank}").read_text()) for rank in range(WORLD)]


def is_one_of(found, steps):
    """Say whether a traced step takes what a real one does, in order, and holds as much.

    Workers of gloo let go of what they sent a moment after the wait, and not seen: real steps may seem to hold more.
    """
    traced, real = (
        without_scratch(from_first(traced_sizes(found, step=1))),
        [without_scratch(from_first(step)) for step in steps],
    )
    taken = [size for size in traced if size > 0]
    least = min(max(accumulate(step)) for step in real)
    in_order = taken in [[size for size in step if size > 0] for step in real]
    return in_order and 0.85 * least <= max(accumulate(traced)) <= least


@pytest.mark.parametrize("rank", [0, WORLD - 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_takes_and_frees_what_a_real_one_does(real, kind, rank):
    """Every gather, scatter, reduction, activation and gradient, in order; rank 3 has the short shards."""
    assert is_one_of(trace(program(kind), world=WORLD, rank=rank), real[rank][kind])


@pytest.mark.parametrize("name", ["plan", "sequence plan"])
def test_models_of_transformers_take_and_free_what_real_ranks_do(real, llama, name):
    options = {"engine": "plain", "optimizer": "sgd", "clip": False, "unroll": False}
    found = trace(llama, tp=WORLD, sp=name != "plan", rank=1, **options, **LLAMA_JOB)
    assert is_one_of(found, real[1][name])


def test_collectives_are_charged_to_their_modules():
    """The sequence is gathered before a block's products and scattered behind them, and the other way round after."""
    found = trace(program("sequence"), world=WORLD).trace
    whole = 4 * 2 * TOKENS * SIZE
    seen = {}
    for one in found.allocations:
        place = found.places[one.place]
        if one.op.startswith("_c10d_functional::") and place.module.startswith("blocks.1") and place.step == 0:
            seen.setdefault((place.phase, place.module), []).append((one.op.partition("::")[2], one.size_bytes))
    gather, scatter = ("all_gather_into_tensor", whole), ("reduce_scatter_tensor", whole // WORLD)
    assert seen == {
        ("forward", "blocks.1.attention"): [gather],
        ("forward", "blocks.1.attention.o"): [scatter],
        ("forward", "blocks.1.up"): [gather],
        ("forward", "blocks.1.down"): [scatter],
        ("backward", "blocks.1.down"): [gather],
        ("backward", "blocks.1.up"): [scatter],
        ("backward", "blocks.1.attention.o"): [gather],
        ("backward", "blocks.1.attention"): [scatter],
    }


def test_what_a_checkpoint_repeats_is_charged_to_its_modules(config):
    """Backward repeats a layer's collectives but the last, whose result nothing needs."""
    path = config("llama", num_hidden_layers=3)
    job = {"engine": "plain", "optimizer": "none", "steps": 1, "unroll": False}
    found = trace(path, tp=2, sp=True, recompute="full", seq_len=32, **job).trace
    seen = {}
    for one in found.allocations:
        place = found.places[one.place]
        if one.op.startswith("_c10d_functional::") and place.module.startswith("model.layers.1."):
            seen.setdefault(place.phase, []).append((place.module[len("model.layers.1.") :], one.op.partition("::")[2]))
    assert seen["forward"][-1] == ("mlp.down_proj", "reduce_scatter_tensor")
    assert seen["recompute"] == seen["forward"][:-1]
    assert {module for module, _op in seen["backward"]} == {module for module, _op in seen["forward"]}


def test_other_collectives_have_their_sizes():
    """DTensor swaps the dimension that is split; a program calls functional and plain collectives by itself."""
    from torch.distributed import _functional_collectives as functional
    from torch.distributed.tensor import DTensor, Shard

    class Net(torch.nn.Linear):
        def forward(self, x):
            mesh = dist.device_mesh.init_device_mesh("cuda", (4,))
            split = DTensor.from_local(super().forward(x), mesh, [Shard(0)], run_check=False)
            swapped = split.redistribute(placements=[Shard(1)]).to_local()
            sent = functional.all_to_all_single(swapped, None, None, mesh)
            whole = torch.empty(4 * sent.shape[0], sent.shape[1], device=sent.device)
            dist.all_gather_into_tensor(whole, sent.detach())
            dist.all_reduce(whole)
            return (sent * sent).sum() + whole.sum()

    def made():
        return Net(64, 64, bias=False), torch.ones(32, 64, device="cpu")

    found = trace(made, world=4, steps=1, engine="plain", optimizer="none").trace
    part, whole = 4 * 32 * 64, 4 * 4 * 32 * 64
    sizes = {phase: [one.size_bytes for one in found.allocations if found.places[one.place].phase == phase
                     and one.size_bytes in (part, whole)] for phase in ("forward", "backward")}  # fmt: skip
    # the batch and the product; sent and received; exchanged; gathered; squared
    assert sizes["forward"] == [part, part, part, part, part, whole, part]
    assert whole not in sizes["backward"]


def test_a_rank_holds_its_part(config):
    path = config("llama", num_hidden_layers=2, vocab_size=515)
    job = {"dtype": "float32", "seq_len": 32, "steps": 1, "unroll": False, "clip": False, "optimizer": "none"}
    shapes = {one.owner: one.shape for one in trace(path, **job).trace.allocations if one.category == "parameter"}
    for rank in (0, 1):
        result = trace(path, tp=2, fsdp=4, rank=rank, **job)
        found = {one.owner: one.shape for one in result.trace.allocations if one.category == "parameter"}
        down, rows = "model.layers.0.mlp.down_proj.weight", (258, 257)[rank]
        assert shapes[down] == (64, 176) and found[down] == (16, 88)
        assert found["model.embed_tokens.weight"] == (-(-rows // 4), 64)
        assert found["model.norm.weight"] == (16,)
        assert result.num_parameters == sum(torch.Size(each).numel() for each in shapes.values())


def test_unrolled_layers_are_those_that_run(config):
    job = {"tp": 2, "sp": True, "fsdp": 4, "recompute": "full", "seq_len": 32}
    job |= {"steps": 1, "clip": False, "optimizer": "none"}
    few, every = (trace(config("llama", num_hidden_layers=10), unroll=unroll, **job) for unroll in (True, False))
    assert 0 < few.num_layers_traced < few.num_layers
    assert few.trace.events == every.trace.events
    assert [(one.size_bytes, one.op, one.category, one.owner, one.stream) for one in few.trace.allocations] == [
        (one.size_bytes, one.op, one.category, one.owner, one.stream) for one in every.trace.allocations
    ]


def test_the_sequence_split_keeps_less(config):
    """Without it every rank keeps the whole hidden states between the products."""
    job = {"tp": 4, "seq_len": 256, "steps": 1, "unroll": False, "optimizer": "none", "clip": False}
    path = config("llama", num_key_value_heads=4, num_hidden_layers=4)
    whole, part = (trace(path, sp=sp, **job) for sp in (False, True))
    assert whole.categories()["parameter"] == part.categories()["parameter"]
    assert part.peak_allocated_bytes < whole.peak_allocated_bytes
    logits = {one.shape for one in part.trace.allocations if one.op == "mm" and one.shape[-1] == 128}
    assert (256, 128) in logits  # a quarter of 512 words


def test_shared_weights_stay_shared(config):
    path = config("llama", num_hidden_layers=2, tie_word_embeddings=True)
    for options in ({}, {"sp": True, "fsdp": 2}):
        result = trace(path, tp=2, seq_len=32, steps=1, unroll=False, clip=False, optimizer="none", **options)
        embedded = [one for one in result.trace.allocations if one.category == "parameter" and one.shape[0] > 100]
        assert [one.owner for one in embedded] == ["model.embed_tokens.weight"], options


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--tp", "3"], "4 attention heads cannot be split over 3 ranks"),
        (["--tp", "4"], "2 key-value heads cannot be split over 4 ranks"),
        (["--tp", "1"], "outside 2"),
        (["--sp"], "--tp, which is missing"),
        (["--tp", "2", "--sp", "--seq", "33"], "33 tokens cannot be split over 2 ranks"),
        (["--tp", "2", "--sp", "--attention", "eager"], "makes its mask from hidden states"),
        (["--tp", "2", "--ddp", "2"], "cannot be combined"),
        (["--tp", "2", "--rank", "2"], "no rank 2 of 2"),
        (["--rank", "1"], "no rank 1 of 1"),
        (["--tp", "65536", "--fsdp", "2"], "outside 2"),
        (["--tp", "2", "--lora", "r=4"], "adapters of a model that is split"),
    ],
)
def test_what_cannot_be_split_is_one_sentence(config, capsys, words, says):
    assert main(["trace", config("llama"), "--seq", "32", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and says in captured.err


def test_models_without_a_plan_are_refused(config, tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 512}))
    assert main(["trace", str(path), "--seq", "32", "--tp", "2"]) == 2
    assert "declares no tensor-parallel plan for GPT2LMHeadModel" in capsys.readouterr().err
    with pytest.raises(InputError, match="not built like Llama"):
        trace(config("deepseek_v3"), tp=2, sp=True, seq_len=32)
    with pytest.raises(InputError, match="yours to say"):
        trace(lambda: (torch.nn.Linear(4, 4), torch.ones(2, 4)), tp=2)


def test_the_command_says_what_was_split(config, capsys):
    words = "--tp 2 --sp --fsdp 4 --rank 7 --seq 32 --steps 1 --no-clip --optimizer none"
    assert main(["trace", config("llama", num_hidden_layers=2), *words.split()]) == 0
    captured = capsys.readouterr()
    assert "rank 7 of 8" in captured.out and captured.err == ""
    assert not dist.is_initialized()
