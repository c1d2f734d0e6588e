"""The allocator under a walk: the simulator itself, streams by name, the job's settings, a card that is full."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from ullage.account.pools import Pools, Unpooled
from ullage.allocator.events import WorkloadBuilder
from ullage.allocator.run import run_workload
from ullage.allocator.settings import parse_settings
from ullage.catalog import models as catalog
from ullage.engines.sharded.memory import notes_of, settings_of, torch_version
from ullage.engines.training import step
from ullage.errors import InputError
from ullage.read.machine import parse_machine
from ullage.spec.training import Precision, Recompute, TrainingJob, TrainingParallel
from ullage.units import GiB, MiB, TiB

ENGINES = ("torchtitan", "fsdp2", "deepspeed", "torchtune", "litgpt")


@pytest.mark.parametrize(
    "conf", ["", "expandable_segments:True", "max_split_size_mb:64", "roundup_power2_divisions:[32:1,64:4,>:8]"]
)
def test_pools_are_the_simulator(conf: str) -> None:
    draw, settings = random.Random(7), parse_settings(conf)
    pools, builder = Pools(settings, capacity_bytes=3 * GiB), WorkloadBuilder()
    live = []
    for _ in range(1500):
        if live and draw.random() < 0.48:
            block, owner = live.pop(draw.randrange(len(live)))
            pools.give(block)
            builder.free(owner)
        else:
            size, stream = (
                draw.choice([700, 90_000, 3 * MiB, 11 * MiB, 33 * MiB]) * draw.randrange(1, 4),
                draw.choice("ab"),
            )
            live.append((pools.take(size, stream), builder.allocate(size, stream=ord(stream))))
    outcome = run_workload(builder.work, settings, capacity_bytes=3 * GiB)
    assert outcome.death is None
    assert (pools.peak_reserved, pools.reserved) == (outcome.peak_reserved_bytes, outcome.final_reserved_bytes)


def test_of_equal_free_blocks_the_lowest_is_used() -> None:
    pools = Pools()
    first, second, _end = (pools.take(4 * MiB, "main") for _ in range(3))
    pools.give(second)
    fourth = pools.take(12 * MiB, "main")
    pools.give(first)
    assert pools.take(4 * MiB, "main").address == first.address < fourth.address


def test_streams_keep_their_own_segments() -> None:
    pools = Pools()
    pools.take(64 * MiB, "main")
    pools.give(pools.take(32 * MiB, "side"))
    assert (pools.reserved_on("main"), pools.reserved_on("side"), pools.reserved_on("none")) == (64 * MiB, 32 * MiB, 0)


@pytest.mark.parametrize("conf", ["", "expandable_segments:True"])
def test_a_walk_goes_on_when_the_card_is_full(conf: str) -> None:
    pools = Pools(parse_settings(conf), capacity_bytes=100 * MiB)
    pools.give(pools.take(60 * MiB, "side"))
    kept = [pools.take(60 * MiB, "main")]
    assert pools.peak_reserved == 60 * MiB, "what was free has gone back"
    kept.append(pools.take(60 * MiB, "main"))
    assert pools.peak_reserved == 120 * MiB
    for block in kept:
        pools.give(block)
    pools.take(40 * MiB, "side")
    assert pools.peak_reserved == 120 * MiB, "the card is taken to have what was needed, and no more"


def test_a_hopeless_job_is_walked_without_a_card() -> None:
    pools = Pools(capacity_bytes=100 * MiB)
    for size in (60, 60, 100):
        pools.take(size * MiB, "main")
    pools.give(pools.take(40 * MiB, "side"))
    pools.take(42 * MiB, "side")
    assert pools.peak_reserved == (60 + 60 + 100 + 40 + 42) * MiB, "nothing goes back any more"


def test_no_request_is_too_large_for_a_walk() -> None:
    pools = Pools(parse_settings("expandable_segments:True"), capacity_bytes=80 * GiB)
    pools.take(5 * TiB, "main")
    assert pools.peak_reserved >= 5 * TiB


@pytest.mark.parametrize("conf", ["", "expandable_segments:True", "max_split_size_mb:64"])
def test_absurd_sizes_are_laid_out_or_refused(conf: str) -> None:
    draw, pools, live = random.Random(3), Pools(parse_settings(conf), capacity_bytes=80 * GiB), []
    for _ in range(300):
        if live and draw.random() < 0.5:
            pools.give(live.pop(draw.randrange(len(live))))
        else:
            live.append(pools.take(draw.choice([1, MiB, 2**40, 2**66, 2**70 + 12345, 10**30]), draw.choice("ab")))
    assert pools.peak_reserved >= 10**30
    with pytest.raises(InputError, match="address"):
        pools.take(2**130, "a")


def test_a_fraction_of_the_card_bounds_what_is_kept() -> None:
    conf = parse_settings("per_process_memory_fraction:0.5,garbage_collection_threshold:0.6")
    pools = Pools(conf, capacity_bytes=200 * MiB, total_bytes=200 * MiB)
    for size in range(12, 40, 2):
        pools.give(pools.take(size * MiB, "main"))
    assert pools.peak_reserved <= 100 * MiB


def test_without_pools_nothing_is_reserved() -> None:
    pools = Unpooled()
    pools.give(pools.take(GiB, "main"))
    assert pools.peak_reserved == 0


def job(engine: str, **changes: object) -> TrainingJob:
    found = catalog.find("meta-llama/Llama-2-7b-hf")
    assert found is not None
    base = {
        "model": catalog.load_entry(found),
        "machine": parse_machine("8xH100"),
        "engine": engine,
        "parallel": TrainingParallel(data_parallel_size=8, zero_stage=3 if engine == "deepspeed" else 0),
        "precision": Precision(params="bfloat16", grads="bfloat16"),
        "micro_batch_size": 1,
        "seq_len": 3000,
        "recompute": Recompute(kind="full"),
        "alloc_conf": "expandable_segments:False",
    }
    return TrainingJob(**(base | changes))  # type: ignore[arg-type]


def reserved(one: TrainingJob) -> int:
    return max(ledger.reserved.bytes for ledger in step(one).ranks[0].moments)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_walk_follows_the_settings(engine: str) -> None:
    plain = reserved(job(engine))
    assert reserved(job(engine, alloc_conf="roundup_power2_divisions:1")) == plain
    assert reserved(job(engine, alloc_conf="roundup_power2_divisions:2")) > plain
    assert reserved(job(engine, alloc_conf="expandable_segments:True")) < plain


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("conf", "said"),
    [
        ("expandable_segments:true", "expandable_segments:True"),
        ("backend:cudaMallocAsync", "native"),
        ("nonsense:1", "nonsense"),
    ],
)
def test_what_pytorch_refuses_is_refused(engine: str, conf: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        step(job(engine, alloc_conf=conf))
    assert said in f"{caught.value} {caught.value.remedy}"


def test_settings_are_those_of_the_stated_version() -> None:
    large = job("fsdp2", alloc_conf="large_segment_size_mb:64")
    assert settings_of(large).large_segment_size_bytes == 64 * MiB
    old = replace(large, engine_version="abc (2023-10, torch 2.1.0+cu121)")
    assert torch_version(old) == (2, 1)
    with pytest.raises(InputError, match=r"2\.1"):
        settings_of(old)
    assert torch_version(job("torchtitan", engine_version="9dec370, torch nightly 2024-12-23")) is None


def test_expandable_segments_need_a_new_torch_on_amd() -> None:
    amd = job("torchtitan", machine=parse_machine("8xMI300X"), alloc_conf="expandable_segments:True")
    assert not settings_of(amd).expandable_segments
    assert any("AMD" in sentence for sentence in step(amd).job.assumed)
    new = replace(amd, engine_version="torch 2.12")
    assert settings_of(new).expandable_segments and notes_of(new) == []
    assert notes_of(job("torchtitan", alloc_conf="expandable_segments:True")) == []
