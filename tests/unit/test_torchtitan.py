"""torchtitan's rules by date, its op-wise checkpointing, stages, and what published runs reserved."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import need_shared

from ullage.account.activations.blocks import Style, Training
from ullage.account.activations.decoder import Slice, decoder_graph
from ullage.account.activations.graph import Checkpoint, forward
from ullage.account.pools import Pools
from ullage.account.timeline import Timeline
from ullage.catalog import models as catalog
from ullage.engines.torchtitan.defaults import date_of, rules_at
from ullage.engines.torchtitan.plan import every_second_matmul
from ullage.engines.torchtitan.step import stages
from ullage.engines.training import step
from ullage.errors import InputError
from ullage.read.machine import parse_machine
from ullage.read.torchtitan import parse_torchtitan, read_torchtitan
from ullage.spec.training import Precision, Recompute, TrainingJob, TrainingParallel
from ullage.units import GiB


def llama():
    found = catalog.find("meta-llama/Llama-3.1-8B")
    assert found is not None
    return catalog.load_entry(found)


def job(**changes: object) -> TrainingJob:
    base = {
        "model": llama(),
        "machine": parse_machine("128xH100"),
        "engine": "torchtitan",
        "engine_version": "2024-12-26",
        "parallel": TrainingParallel(data_parallel_size=128, fsdp="full_shard"),
        "precision": Precision(params="float32", grads="float32"),
        "micro_batch_size": 2,
        "seq_len": 8192,
        "recompute": Recompute(kind="selective"),
        "compile": True,
    }
    return TrainingJob(**(base | changes))  # type: ignore[arg-type]


def reserved(one: TrainingJob) -> int:
    return max(ledger.reserved.bytes for ledger in step(one).ranks[0].moments)


@pytest.mark.parametrize(
    ("version", "date"),
    [("9dec370, torch nightly", "2024-12-26"), ("2025-06", "2025-06-15"), ("v0.2.0", "2025-10-10"), ("main", None)],
)
def test_the_date_of_a_version(version: str, date: str | None) -> None:
    assert date_of(version) == date


def test_rules_change_on_their_dates() -> None:
    assert not rules_at("2025-04-01").loss_compiled and rules_at("2025-04-02").loss_compiled
    assert not rules_at("2025-07-27").split_root and rules_at("2025-07-28").split_root
    assert not rules_at("2025-10-08").cudnn_first and rules_at("2025-10-09").cudnn_first
    assert rules_at("2026-01-26").repeats_kv and not rules_at("2026-01-27").repeats_kv
    assert not rules_at("2026-06-23").fused_qkv and rules_at("2026-06-24").fused_qkv


def test_cudnn_s_attention_is_made_again_until_its_result_is_on_the_list() -> None:
    def kept(date: str, **changes: object) -> int:
        ledgers = {ledger.moment: ledger for ledger in step(job(engine_version=date, **changes)).ranks[0].moments}
        return next(one.bytes for one in ledgers["forward"].allocated.children if one.name == "activations")

    one = job()
    result = 32 * one.micro_batch_size * one.seq_len * 4096 * 2
    assert kept("2025-10-08") - kept("2025-10-09") == pytest.approx(result, rel=0.03)
    assert kept("2025-12-01") == kept("2025-10-08") == kept("2025-11-01", attention="flash")
    amd = {"machine": parse_machine("8xMI300X"), "parallel": TrainingParallel(data_parallel_size=8, fsdp="full_shard")}
    assert kept("2025-11-01", **amd) == kept("2025-10-08", **amd)


def test_a_compiled_loss_of_a_chunk_stores_nothing_in_fp32() -> None:
    def at_loss(compiled: bool) -> int:
        ledgers = {one.moment: one for one in step(job(engine_version="2026-06-01", compile=compiled)).ranks[0].moments}
        terms = {one.name: one.bytes for one in ledgers["backward"].allocated.children}
        return terms.get("logits", 0) + terms.get("logits_gradient", 0)

    chunk = 1024 * 128_256
    assert at_loss(True) <= 2 * 2 * chunk + 1024 < at_loss(False)


@pytest.mark.parametrize(
    ("fused", "values"),
    [(False, 4096 + 4096 + 1024 + 4096 + 14336 + 4096), (True, 4096 + 4096 + 1024 + 4096 + 14336)],
    ids=["eager", "compiled"],
)
def test_op_wise_checkpointing_keeps_every_second_matmul_and_attention(fused: bool, values: int) -> None:
    """Input, q, v, attention, gate and, in eager mode, down; a log-sum-exp in fp32 per head."""
    model, tokens = llama(), 8192
    graph = decoder_graph(
        model.layers[0], 4096, Slice(batch=1, seq_len=tokens), Style(rope="complex", repeat_kv=True), Training()
    )
    line = Timeline(Pools())
    line.begin("forward")
    x = line.take("activations", graph.input_bytes)
    out, _kept = forward(graph, line, x, Checkpoint(policy=every_second_matmul, fused=fused))
    line.drop(x)
    line.drop(out)
    assert line.allocated == tokens * (2 * values + 4 * 32)


def test_stages_divide_layers_and_only_the_ends_have_the_frame() -> None:
    found = stages(job(parallel=TrainingParallel(pipeline_parallel_size=5)))
    assert [last - first for first, last, _embeds, _head in found] == [7, 7, 6, 6, 6]
    assert [embeds for _first, _last, embeds, _head in found] == [True, False, False, False, False]


def test_earlier_stages_hold_more_micro_batches() -> None:
    parallel = TrainingParallel(data_parallel_size=32, pipeline_parallel_size=4, fsdp="full_shard")
    one = job(parallel=parallel, grad_accum=8, recompute=Recompute(kind="full"))
    ranks = sorted(step(one).ranks, key=lambda rank: rank.pp_rank)
    kept = [
        max(ledger.find("activations").bytes for ledger in rank.moments if ledger.find("activations")) for rank in ranks
    ]
    assert kept[0] > kept[1] > kept[2]
    assert {rank.num_ranks for rank in ranks} == {32}


def test_a_pipeline_adds_up_whole_gradients_in_fp32_and_reduces_once() -> None:
    parallel = TrainingParallel(data_parallel_size=32, pipeline_parallel_size=4, fsdp="full_shard")
    last = max(step(job(parallel=parallel, grad_accum=8)).ranks, key=lambda rank: rank.pp_rank)
    summed = max(
        ledger.find("accumulated_gradients").bytes for ledger in last.moments if ledger.find("accumulated_gradients")
    )
    layers = 8 * 218_112_000 + 128256 * 4096 + 4096
    assert summed == pytest.approx(4 * layers, rel=1e-3)
    assert last.after_step.find("accumulated_gradients") is None


def test_an_interleaved_schedule_has_more_passes_in_flight() -> None:
    def kept(schedule: str) -> int:
        parallel = TrainingParallel(
            data_parallel_size=32,
            pipeline_parallel_size=4,
            fsdp="full_shard",
            schedule=schedule,  # type: ignore[arg-type]
        )
        one = job(parallel=parallel, grad_accum=16, recompute=Recompute(kind="full"))
        return max(rank.peak.allocated.bytes for rank in step(one).ranks)

    assert kept("interleaved") > kept("1f1b")


def test_each_rule_saves_what_it_is_there_for() -> None:
    plain = reserved(job())
    compiled_loss = reserved(job(engine_version="2025-06-01"))
    chunked = reserved(job(engine_version="2026-06-01"))
    assert plain - compiled_loss > 10 * GiB
    assert chunked < compiled_loss
    assert reserved(job(recompute=Recompute(kind="none"))) > plain > reserved(job(recompute=Recompute(kind="full")))


def test_without_a_version_the_range_holds_the_known_ones() -> None:
    one = job(engine_version="", machine=parse_machine("8xH100"), parallel=TrainingParallel(data_parallel_size=8))
    answer = step(one)
    high = max(ledger.reserved.high_bytes for ledger in answer.ranks[0].moments)
    assert high >= reserved(replace(one, engine_version="2024-12-26"))
    assert any("version" in sentence for sentence in answer.job.assumed)


def test_experts_and_latent_attention_are_walked() -> None:
    found = catalog.find("deepseek-ai/DeepSeek-V2-Lite")
    assert found is not None
    parallel = TrainingParallel(data_parallel_size=8, expert_parallel_size=8, fsdp="full_shard")
    one = job(model=catalog.load_entry(found), machine=parse_machine("8xH100"), parallel=parallel, micro_batch_size=4)
    rank = step(replace(one, seq_len=4096, engine_version="2025-10-01")).ranks[0]
    assert rank.after_step.allocated.bytes == pytest.approx(15.7e9 * 16 / 8, rel=0.02)
    assert rank.peak.allocated.bytes > rank.after_step.allocated.bytes


@pytest.mark.parametrize("name", ["titan-202412-8b-128gpu-0", "titan-202412-8b-128gpu-1", "titan-202412-8b-8gpu-cp8"])
def test_published_runs(name: str) -> None:
    """Eager, compiled, and context-parallel runs of 2024-12, within 2 % of what they reserved."""
    path = need_shared("truth", "training.jsonl")
    record = next(one for one in map(json.loads, path.read_text().splitlines()) if one["id"] == name)
    context = record["job"]["parallel"]["cp"]
    one = job(
        machine=parse_machine(f"{record['job']['num_gpus']}x{record['job']['gpu']}"),
        parallel=TrainingParallel(
            data_parallel_size=record["job"]["parallel"]["dp"], context_parallel_size=context, fsdp="full_shard"
        ),
        micro_batch_size=record["job"]["micro_batch_size"],
        seq_len=record["job"]["seq_len"],
        compile=record["job"]["compile"],
        recompute=Recompute(kind=record["job"]["recompute"]),
    )
    assert reserved(one) == pytest.approx(record["measured"][0]["gib"] * GiB, rel=0.02)


def test_a_toml_of_2025() -> None:
    config = {
        "model": {"flavor": "8B", "converters": ["float8"]},
        "training": {"local_batch_size": 1, "seq_len": 8192, "compile": True},
        "parallelism": {"tensor_parallel_degree": 2, "data_parallel_shard_degree": -1},
        "activation_checkpoint": {"mode": "selective", "selective_ac_option": "op"},
        "strange": {},
    }
    found = parse_torchtitan(config, where="f")
    assert (found.flavor, found.micro_batch_size, found.seq_len) == ("8B", 1, 8192)
    assert found.compile and found.float8 and found.recompute.kind == "selective"
    assert found.parallel.tensor_parallel_size == 2 and found.unknown == ("strange",)


@pytest.mark.parametrize(
    "text", ["a = ", "training = 3", "[training]\nseq_len = 'long'", "[activation_checkpoint]\nmode = 'x'"]
)
def test_a_bad_toml_is_one_sentence(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(text)
    with pytest.raises(InputError):
        read_torchtitan(path)


def toml(**sections: dict[str, object]) -> dict[str, object]:
    return {"model": {"flavor": "8B"}, "training": {"local_batch_size": 8, "seq_len": 4096}, **sections}


def test_a_toml_says_how_the_pipeline_and_the_optimizer_run() -> None:
    layout = {"pipeline_parallel_degree": 4, "pipeline_parallel_schedule": "Interleaved1F1B"}
    found = parse_torchtitan(toml(parallelism=layout, optimizer={"implementation": "foreach"}), where="f")
    assert (found.schedule, found.pipeline_micro_batch) == ("interleaved", 1)
    assert (found.optimizer, found.optimizer_impl) == ("adamw", "foreach")
    plain = parse_torchtitan(toml(), where="f")
    assert (plain.schedule, plain.pipeline_micro_batch, plain.optimizer_impl) == (None, None, "fused")
    old = parse_torchtitan(
        toml(experimental={"pipeline_parallel_degree": 2, "pipeline_parallel_microbatches": 4}), where="f"
    )
    assert old.pipeline_micro_batch == 2


def test_a_toml_says_what_stays_gathered_and_what_lives_on_the_host() -> None:
    training = {"local_batch_size": 2, "seq_len": 4096, "enable_cpu_offload": True, "global_batch_size": 64}
    found = parse_torchtitan(
        {**toml(parallelism={"fsdp_reshard_after_forward": "never"}), "training": training}, where="f"
    )
    assert found.parallel.fsdp == "shard_grad_op" and found.global_batch_size == 64
    assert found.offload == (("params", "cpu"), ("optimizer", "cpu"))


def test_settings_of_a_toml_are_followed_or_named() -> None:
    found = parse_torchtitan(
        toml(
            parallelism={"enable_async_tensor_parallel": True, "expert_tensor_parallel_degree": 1, "frobnicate": 1},
            compile={"enable": True, "components": ["model"]},
        ),
        where="f",
    )
    assert found.doubtful == ("compile.components", "parallelism.enable_async_tensor_parallel")
    assert found.unknown == ("parallelism.frobnicate",)
    mixed = parse_torchtitan(
        toml(model={"converters": ["quantize.linear.float8", "quantize.grouped_mm.mx"]}), where="f"
    )
    assert mixed.float8 and mixed.doubtful == ("model.converters: quantize.grouped_mm.mx",)


@pytest.mark.parametrize(
    ("section", "values", "match"),
    [
        ("model", {"name": "flux"}, "no language model"),
        ("optimizer", {"name": "Muon"}, "optimizer Muon"),
        (
            "parallelism",
            {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "DualPipeV"},
            "schedule DualPipeV",
        ),
    ],
)
def test_settings_of_a_toml_that_are_not_followed_are_refused(
    section: str, values: dict[str, object], match: str
) -> None:
    with pytest.raises(InputError, match=match):
        parse_torchtitan(toml(**{section: values}), where="f")
