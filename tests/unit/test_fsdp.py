"""Pools, timelines, recompute, and what FSDP gathers and reduces, by hand-counted cases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ullage.account.activations.blocks import Style, Training
from ullage.account.activations.decoder import Slice, decoder_graph
from ullage.account.activations.graph import Checkpoint, Graph, Op, backward, forward, saved_bytes
from ullage.account.fsdp import GATHER_STREAM, Fsdp1, Fsdp2, Group
from ullage.account.pools import Pools, Unpooled
from ullage.account.timeline import Timeline
from ullage.allocator.settings import AllocatorSettings
from ullage.catalog import models as catalog
from ullage.engines.training import step
from ullage.errors import InputError
from ullage.read.accelerate_yaml import parse_accelerate, read_accelerate
from ullage.read.machine import parse_machine
from ullage.spec.model import Attention, DenseFFN, Layer, Norm
from ullage.spec.training import Lora, Precision, Recompute, TrainingJob, TrainingParallel
from ullage.units import GiB, MiB


def timeline(*, expandable: bool = False, limit: int | None = None) -> Timeline:
    line = Timeline(Pools(AllocatorSettings(expandable_segments=expandable), capacity_bytes=limit))
    line.begin("all")
    return line


def model(name: str):
    found = catalog.find(name)
    assert found is not None
    return catalog.load_entry(found)


def test_small_and_large_requests_take_segments_of_their_class() -> None:
    line = timeline()
    line.take("a", 100)
    assert line.pools.reserved == 2 * MiB
    line.take("a", 5 * MiB)
    assert line.pools.reserved == 22 * MiB
    line.take("a", 33 * MiB)
    assert line.pools.reserved == 22 * MiB + 34 * MiB
    assert line.allocated == 512 + 38 * MiB


def test_a_freed_block_serves_its_own_stream_only() -> None:
    line = timeline()
    line.drop(line.take("a", 64 * MiB, "side"))
    line.take("a", 64 * MiB, "side")
    assert line.pools.reserved == 64 * MiB
    line.take("a", 64 * MiB)
    assert line.pools.reserved == 128 * MiB


def test_expandable_segments_join_what_plain_segments_cannot() -> None:
    for expandable, reserved in ((False, 240 * MiB), (True, 120 * MiB)):
        line = timeline(expandable=expandable)
        parts = [line.take("a", 60 * MiB), line.take("a", 60 * MiB)]
        for part in parts:
            line.drop(part)
        line.take("a", 120 * MiB)
        assert line.pools.reserved == reserved


def test_free_segments_go_back_before_the_card_is_full() -> None:
    line = timeline(limit=100 * MiB)
    line.drop(line.take("a", 60 * MiB))
    line.take("a", 80 * MiB)
    assert line.pools.peak_reserved == 80 * MiB


def test_without_pools_the_allocated_peak_is_the_same() -> None:
    peaks = []
    for pools in (Pools(), Unpooled()):
        line = Timeline(pools)
        line.begin("all")
        x = line.take("activations", CHAIN.input_bytes)
        out, kept = forward(CHAIN, line, x, Checkpoint())
        line.drop(x)
        line.drop(out)
        backward(CHAIN, line, kept, line.take("activation_gradients", CHAIN.input_bytes))
        peaks.append((line.moments[0].peak_bytes, line.moments[0].by_category, line.allocated))
        reserved = pools.peak_reserved
    assert peaks[0] == peaks[1] and reserved == 0


def test_a_shared_buffer_is_freed_by_its_last_holder() -> None:
    line = timeline()
    buffer = line.take("a", 1024)
    buffer.hold()
    line.drop(buffer)
    assert line.allocated == 1024
    line.drop(buffer)
    assert line.allocated == 0 and line.by_category["a"] == 0


CHAIN = Graph(
    input_bytes=1000 * 512,
    ops=(
        Op(name="a", num_bytes=1000 * 512, inputs=("x",), keeps=("x",), kind="mm", weight_grad_bytes=512),
        Op(name="b", num_bytes=2000 * 512, inputs=("a",), keeps=("a",)),
        Op(name="c", num_bytes=1000 * 512, inputs=("b",), keeps=("b",), kind="mm"),
    ),
)


@pytest.mark.parametrize(
    ("checkpoint", "kept"),
    [
        (None, 1000 + 1000 + 2000),
        (Checkpoint(), 1000),
        (Checkpoint(policy=lambda op, count: op.kind == "mm"), 1000 + 1000 + 1000),
        (Checkpoint(policy=lambda op, count: op.kind == "mm", fused=True), 1000 + 1000),
    ],
    ids=["none", "full", "selective", "compiled"],
)
def test_what_stays_between_forward_and_backward(checkpoint: Checkpoint | None, kept: int) -> None:
    line = timeline()
    x = line.take("activations", CHAIN.input_bytes)
    out, held = forward(CHAIN, line, x, checkpoint)
    line.drop(x)
    line.drop(out)
    assert line.allocated == kept * 512
    grad = backward(CHAIN, line, held, line.take("activation_gradients", 1000 * 512))
    line.drop(grad)
    assert line.allocated == 0


def test_saved_bytes_of_a_chain() -> None:
    assert saved_bytes(CHAIN) == 4000 * 512


def group(name: str, *, reshard: bool = True) -> Group:
    return Group(
        name=name,
        gathered_bytes=(8 * MiB, 24 * MiB),
        stored_bytes=16 * MiB,
        trained_gathered_bytes=32 * MiB,
        reduced_bytes=64 * MiB,
        num_ranks=4,
        reshard_after_forward=reshard,
    )


def test_fsdp2_keeps_one_gathered_output_until_the_next_copy() -> None:
    line = timeline()
    fsdp = Fsdp2(line)
    fsdp.unshard(group("a"), forward=True)
    assert line.by_category["unsharded_parameters"] == 32 * MiB
    assert line.by_category["all_gather_output"] == 32 * MiB
    fsdp.reshard(group("a"))
    fsdp.gather(group("b"))
    assert line.by_category["all_gather_output"] == 64 * MiB
    fsdp.unshard(group("b"), forward=True)
    assert line.by_category["all_gather_output"] == 32 * MiB
    fsdp.end_forward()
    assert line.by_category["all_gather_output"] == 0
    assert line.pools.reserved_on(GATHER_STREAM) >= 64 * MiB


def test_fsdp2_keeps_one_reduce_scatter_input_and_the_shards() -> None:
    line = timeline()
    fsdp = Fsdp2(line)
    for name in ("a", "b"):
        fsdp.reduce(group(name), [line.take("unsharded_gradients", 32 * MiB)])
    assert line.by_category["reduce_scatter_input"] == 64 * MiB
    assert line.by_category["gradients"] == 32 * MiB
    assert line.by_category["unsharded_gradients"] == 0
    fsdp.end_backward()
    fsdp.reduce(group("a"), [])
    assert line.by_category["gradients"] == 32 * MiB, "a second micro-batch is added to the first"
    fsdp.end_backward()
    fsdp.zero_grad()
    assert line.allocated == 0


def test_fsdp2_copies_its_shard_only_to_narrow_it_and_drops_what_nobody_needed() -> None:
    same = Group(name="g", gathered_bytes=(32 * MiB,), stored_bytes=4 * MiB, trained_gathered_bytes=0,
                 reduced_bytes=0, num_ranks=8)  # fmt: skip
    for one, copy in ((same, 0), (replace(same, stored_bytes=8 * MiB), 4 * MiB)):
        line = timeline()
        fsdp = Fsdp2(line)
        fsdp.gather(one)
        assert line.by_category.get("all_gather_input") == (0 if copy else None)
        assert line.moments[0].peak_bytes == 32 * MiB + copy
        fsdp.end_backward()
        assert line.allocated == 0


def test_the_last_block_is_gathered_before_the_loss_of_a_model_that_returns_it() -> None:
    def at_loss(**changes: object) -> int:
        ledgers = {ledger.moment: ledger for ledger in step(job(**changes)).ranks[0].moments}
        term = next(one for one in ledgers["backward"].allocated.children if one.name == "all_gather_output")
        return term.bytes

    block = 4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096
    assert at_loss(seq_len=16384) == pytest.approx(2 * block, rel=1e-3)


def test_fsdp1_gathers_in_place_and_two_are_there_at_most() -> None:
    line = timeline()
    fsdp = Fsdp1(line)
    for name in "abcd":
        fsdp.unshard(group(name), forward=True)
        fsdp.reshard(group(name))
    assert line.by_category["unsharded_parameters"] == 2 * 32 * MiB
    assert line.pools.reserved_on(GATHER_STREAM) == 2 * 32 * MiB


def job(**changes: object) -> TrainingJob:
    base = {
        "model": model("meta-llama/Llama-2-7b-hf"),
        "machine": parse_machine("8xH100"),
        "engine": "fsdp2",
        "parallel": TrainingParallel(data_parallel_size=8, fsdp="full_shard"),
        "precision": Precision(params="float32", grads="float32"),
        "seq_len": 2048,
        "recompute": Recompute(kind="full"),
        "optimizer_impl": "fused",
        "loss": "plain",
    }
    return TrainingJob(**(base | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ["fsdp1", "fsdp2"])
def test_states_between_steps_are_twelve_bytes_a_parameter_over_the_ranks(engine: str) -> None:
    rank = step(job(engine=engine)).ranks[0]
    assert rank.after_step.allocated.bytes == pytest.approx(6_738_415_616 * 12 / 8, rel=2e-2)


def test_sharding_less_costs_more_and_offload_less() -> None:
    def peak(**changes: object) -> int:
        return step(job(**changes)).ranks[0].peak.allocated.bytes

    whole = peak()
    grad_op = TrainingParallel(data_parallel_size=8, fsdp="shard_grad_op")
    assert peak(parallel=grad_op) > whole + 8 * GiB  # 6.5e9 gathered parameters of blocks stay
    assert peak(offload=(("params", "cpu"),)) < whole
    assert peak(recompute=Recompute()) > whole
    assert peak(loss="fused", micro_batch_size=8) < peak(micro_batch_size=8)


def test_adapters_leave_no_states_of_the_base() -> None:
    lora = Lora(rank=16, targets=("q_proj", "v_proj"))
    changes = {"method": "lora", "lora": lora, "precision": Precision()}
    rank = step(job(**changes)).ranks[0]
    states = rank.after_step.find("optimizer_states")
    trained = 2 * 16 * (4096 + 4096) * 32
    assert states is not None and states.bytes == pytest.approx(trained * 8 / 8, rel=0.05)


XTUNER = {
    "model": model("Qwen/Qwen3-8B"),
    "optimizer_impl": None,
    "loss": None,
    "seq_len": 4096,
    "engine_version": "XTuner",
}


def test_xtuner_runs_its_sft_command_where_nothing_else_is_said() -> None:
    answer = step(job(**XTUNER))
    assert len(answer.job.assumed) == 3 and answer.job.loss == "liger" and answer.job.optimizer_impl == "for_loop"
    said = step(
        job(**(XTUNER | {"loss": "plain", "optimizer_impl": "fused", "alloc_conf": "expandable_segments:False"}))
    )
    assert not said.job.assumed
    losses = [
        step(job(**(XTUNER | {"loss": loss}))).ranks[0].peak.allocated.bytes for loss in ("liger", "chunked", "plain")
    ]
    assert losses == sorted(losses)
    assert answer.ranks[0].peak.allocated.high_bytes >= losses[1], "Liger may not be installed"


def test_xtuner_steps_parameter_by_parameter_and_sends_gradients_in_16_bits() -> None:
    """Weights, gradients and states 16 bytes a parameter; two tensors as large as the embedding's shard."""
    ledgers = {ledger.moment: ledger for ledger in step(job(**XTUNER)).ranks[0].moments}
    embedding = 151_936 * 4096
    expected = (8_190_735_360 * 16 + 2 * 4 * embedding) / 8
    workspace = 32 * MiB
    assert ledgers["optimizer step"].allocated.bytes == pytest.approx(expected + workspace, rel=2e-3)
    sent = next(one for one in ledgers["backward"].allocated.children if one.name == "reduce_scatter_input")
    assert sent.bytes == pytest.approx(2 * 192_947_456, rel=1e-2)


def test_layers_with_shared_and_sandwich_norms_have_graphs() -> None:
    part, ffn = Attention(num_heads=4, num_kv_heads=4, head_dim=16), DenseFFN(intermediate_size=128, gated=False)
    for count in (1, 2, 4):
        norms = tuple(Norm(name=f"n{index}", size=64, kind="layer", bias=True) for index in range(count))
        layer = Layer(mixers=(part,), ffns=(ffn,), norms=norms)
        graph = decoder_graph(layer, 64, Slice(batch=1, seq_len=8), Style(), Training())
        assert sum(op.kind == "norm" for op in graph.ops) == count


def test_an_accelerate_configuration() -> None:
    config = {
        "distributed_type": "FSDP",
        "num_processes": 8,
        "mixed_precision": "bf16",
        "fsdp_config": {"fsdp_version": 2, "fsdp_reshard_after_forward": False, "fsdp_offload_params": "true", "x": 1},
        "odd": 3,
    }
    found = parse_accelerate(config, where="f")
    assert (found.engine, found.num_gpus, found.compute) == ("fsdp2", 8, "bfloat16")
    assert (found.fsdp, found.offload_params, found.recompute) == ("shard_grad_op", True, False)
    assert found.unknown == ("odd", "fsdp_config.x")


@pytest.mark.parametrize("text", ["- a", "num_processes: many", "mixed_precision: bf17", "a: [", "a: &x 1\nb: *x"])
def test_a_bad_accelerate_file_is_one_sentence(text: str, tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(InputError):
        read_accelerate(path)
