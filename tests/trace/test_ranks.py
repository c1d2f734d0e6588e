"""One rank of many: shares, buffers of collectives and their order."""

import json
import math

import pytest

pytest.importorskip("torch")

import torch
import torch.distributed as dist
from sharded_net import SIZE, inputs, program, sharded
from step_sizes import from_first, real_sizes, traced_sizes, without_scratch

from ullage.errors import InputError
from ullage.trace.api import trace
from ullage.trace.ranks.spread import units_of

pytestmark = pytest.mark.reference
MiB = 1 << 20
CLOSED = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 8192,
    "num_hidden_layers": 4,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
}


@pytest.fixture
def ranks():
    """Be one of four ranks, with real memory of the CPU."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield dist.device_mesh.init_device_mesh("cpu", (4,))
    dist.destroy_process_group()


def test_fsdp2_takes_and_frees_its_buffers_as_a_real_rank_does(ranks):
    """Every gather, copy-out, reduce-scatter and gradient, in order, against real memory."""
    net, x = sharded(ranks), inputs()
    net(x).backward()
    net.zero_grad(set_to_none=True)
    real = real_sizes(lambda: net(x).backward())
    dist.destroy_process_group()
    result = trace(program, world=4, engine="plain", optimizer="sgd", clip=False)
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=4)  # for the fixture to end
    assert without_scratch(from_first(traced_sizes(result, step=1))) == without_scratch(real)


def test_buffers_lie_on_the_streams_that_fsdp2_takes_them_on():
    result = trace(program, world=4, engine="plain", optimizer="sgd", steps=1, clip=False)
    block = 2 * 4 * SIZE * SIZE
    by_stream = {}
    for one in result.trace.allocations:
        by_stream.setdefault(one.stream, []).append(one)
    assert sorted(by_stream) == [0, 1, 3]  # compute, copy-in of the gather, reduce-scatter
    gathers = [one.size_bytes for one in by_stream[1]]
    assert gathers.count(2 * block) == 8  # once in forward, once in backward, for four blocks
    assert gathers.count(2 * block // 4) == 8  # their own shard, cast
    assert [one.size_bytes for one in by_stream[3]].count(4 * block // 4) == 4
    assert {one.category for one in by_stream[1]} == {"communication"}
    assert {one.category for one in by_stream[3]} == {"gradient"}


def test_a_rank_holds_its_exact_share(config):
    path = config("llama", vocab_size=515, num_hidden_layers=2)
    result = trace(path, fsdp=4, dtype="float32", seq_len=32, steps=1, unroll=False)
    whole = trace(path, dtype="float32", seq_len=32, steps=1, unroll=False)
    shapes = {one.owner: one.shape for one in whole.trace.allocations if one.category == "parameter"}
    shares = {owner: 4 * math.ceil(shape[0] / 4) * math.prod(shape[1:]) for owner, shape in shapes.items()}
    found = {one.owner: one.size_bytes for one in result.trace.allocations if one.category == "parameter"}
    assert found == shares
    states = [one for one in result.trace.allocations if one.category == "optimizer_state" and one.size_bytes > 4]
    assert sum(one.size_bytes for one in states) == 2 * sum(
        4 * math.prod((min(math.ceil(shape[0] / 4), shape[0]), *shape[1:])) for shape in shapes.values()
    )
    sharded_gradients = [one for one in result.trace.allocations if one.category == "gradient" and one.stream]
    assert sum(one.size_bytes for one in sharded_gradients) == sum(shares.values())
    assert result.num_parameters == whole.num_parameters


def test_layers_under_fsdp2_are_unrolled_to_what_running_them_all_gives(config):
    path, job = (
        config("llama", num_hidden_layers=10),
        {"fsdp": 8, "seq_len": 16, "recompute": "full", "optimizer": "sgd"},
    )
    few, every = trace(path, **job), trace(path, unroll=False, **job)
    assert few.num_layers_traced == 5
    assert few.trace.events == every.trace.events
    sizes = [(one.size_bytes, one.category, one.owner, one.stream) for one in few.trace.allocations]
    assert sizes == [(one.size_bytes, one.category, one.owner, one.stream) for one in every.trace.allocations]


def test_gathered_parameters_stay_when_they_are_not_resharded(config):
    path = config("llama", num_hidden_layers=4, tie_word_embeddings=True)
    less, more = (
        trace(path, fsdp=4, seq_len=32, steps=1, reshard_after_forward=reshard, unroll=False)
        for reshard in (True, False)
    )
    gathers = [[one.size_bytes for one in each.trace.allocations if one.stream == 1] for each in (less, more)]
    assert len(gathers[0]) - len(gathers[1]) == 4  # no second gather of four layers
    assert more.peak_allocated_bytes > less.peak_allocated_bytes


def test_ddp_keeps_buckets_beside_the_gradients(config):
    path = config("llama", num_hidden_layers=3)
    one, many = (trace(path, ddp=ddp, dtype="float32", seq_len=32) for ddp in (0, 4))
    buckets = many.categories()["communication"]
    assert buckets == one.categories()["parameter"] == many.categories()["parameter"]
    assert many.peak_allocated_bytes - one.peak_allocated_bytes == pytest.approx(buckets, abs=16 * 512)


def test_peak_is_that_of_fsdp_mem_tracker(ranks):
    """PyTorch's own tracker, which has no streams and no order of its own, on the same step."""
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

    net = sharded(ranks)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, foreach=True)
    x = inputs()
    tracker = FSDPMemTracker(net, optimizer)
    tracker.track_inputs((x,))
    with tracker:
        net(x).backward()
    by_kind = {kind.name: size for kind, size in next(iter(tracker.get_tracker_snapshot("peak").values())).items()
               if hasattr(kind, "name")}  # fmt: skip
    del tracker, optimizer, net
    dist.destroy_process_group()
    result = trace(program, world=4, engine="plain", optimizer="sgd", steps=1, clip=False)
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=4)
    found = result.categories()
    assert found["parameter"] == by_kind["SHARDED_PARAM"]
    assert sum(found.values()) - found["workspace"] == sum(by_kind.values())


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_peak_agrees_with_the_closed_form(tmp_path, recompute):
    """The closed form also counts the logits that a caller holds, and has one workspace of two."""
    from ullage.engines.fsdp.step import step
    from ullage.read.machine import parse_machine
    from ullage.read.model_source import load_model
    from ullage.spec.training import Precision, Recompute, TrainingJob, TrainingParallel

    path, seq_len = tmp_path / "config.json", 1024
    path.write_text(json.dumps(CLOSED))
    job = TrainingJob(
        model=load_model(str(path)),
        machine=parse_machine("8xH100"),
        engine="fsdp2",
        parallel=TrainingParallel(data_parallel_size=8, fsdp="full_shard"),
        precision=Precision(params="float32", grads="float32"),
        seq_len=seq_len,
        optimizer_impl="foreach",
        loss="plain",
        recompute=Recompute(kind=recompute),
    )
    closed = step(job).ranks[0].peak.allocated
    options = {"engine": "plain", "optimizer_impl": "foreach", "clip": False, "dtype": "float32"}
    result = trace(str(path), fsdp=8, seq_len=seq_len, recompute=recompute, **options)
    logits = 2 * seq_len * CLOSED["vocab_size"]
    assert result.peak_allocated_bytes - 32 * MiB == pytest.approx(closed.bytes - logits, rel=0.007)
    gathered = sum(term.bytes for term in closed.children if term.name in ("all_gather_output", "unsharded_parameters"))
    assert result.categories()["communication"] == pytest.approx(gathered, rel=1e-3)  # the last block's is under way


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"fsdp": 4, "ddp": 2}, "cannot be combined"),
        ({"fsdp": 1}, "outside 2"),
        ({"world": 1 << 20}, "outside 2"),
    ],
)
def test_impossible_ranks_are_refused(config, options, says):
    with pytest.raises(InputError, match=says):
        trace(config("llama"), seq_len=32, **options)


def test_only_ddp_is_put_around_a_program_of_ones_own():
    def plain():
        return torch.nn.Linear(64, 64), torch.ones(4, 64, device="cpu")

    found = trace(plain, ddp=2, engine="plain", steps=1).categories()
    assert found["communication"] == found["parameter"] == 4 * (64 * 64 + 64)
    with pytest.raises(InputError, match="sharded is yours"):
        trace(plain, fsdp=2)
    with pytest.raises(InputError, match="when your function makes it"):
        trace(lambda: (torch.nn.parallel.DistributedDataParallel(plain()[0], init_sync=False), plain()[1]), world=2)


def test_no_group_is_left_behind(config):
    trace(program, world=4, engine="plain", optimizer="none", steps=1)
    assert not dist.is_initialized()
    assert not hasattr(torch, "meta")
    with pytest.raises(InputError, match="layers"):
        units_of(torch.nn.Linear(2, 2))
