"""Many layouts at once are, to the byte, what each is alone: figures, refusals, terms."""

import os
import random

import pytest

pytest.importorskip("numpy")

from ullage.engines import megatron
from ullage.engines.megatron.schedule import Load, loads, passes
from ullage.errors import InputError, LayoutError
from ullage.plan.layouts import COLUMNS, SCHEDULES, Reason, grid, layouts
from ullage.plan.sweep import evaluate
from ullage.read.machine import parse_machine
from ullage.read.model_source import load_model
from ullage.spec.training import Lora, Precision, Recompute, TrainingJob

NUMBER = int(os.environ.get("ULLAGE_FUZZ_EXAMPLES", "60"))
MODELS = ("deepseek-v3", "mixtral-8x7b", "llama-3-70b", "qwen3-235b-a22b", "qwen3-0.6b")
RECOMPUTES = (
    Recompute(),
    Recompute(kind="full"),
    Recompute(kind="full", every=2),
    Recompute(kind="full", method="block", num_layers=1),
    Recompute(kind="selective"),
    Recompute(kind="modules", modules=("layernorm", "mla_up_proj", "moe_act")),
)
PRECISIONS = (
    Precision(grads="float32", master="float32"),
    Precision(grads="float32", master="float32", moments="bfloat16", fp8_recipe="blockwise"),
    Precision(compute="float16", params="float16", grads="float16", master="float32"),
)
FLAGS = (
    (),
    (("overlap-grad-reduce", "true"),),
    (("fine-grained-activation-offloading", "true"), ("offload-modules", "core_attn,moe_act")),
    (("num-distributed-optimizer-instances", "2"),),
    (("defer-embedding-wgrad-compute", "true"),),
    (("moe-expert-capacity-factor", "1.5"), ("moe-pad-expert-input-to-capacity", "true")),
    (("moe-token-dispatcher-type", "allgather"),),
    (("hidden-dropout", "0.1"), ("attention-dropout", "0.1")),
    (("microbatch-group-size-per-virtual-pipeline-stage", "5"),),
)
CHOICES = {
    "tensor_parallel_size": (1, 1, 2, 3, 4, 8),
    "pipeline_parallel_size": (1, 2, 4, 8, 16),
    "virtual_pipeline_parallel_size": (1, 1, 2, 3),
    "context_parallel_size": (1, 1, 2, 4),
    "expert_parallel_size": (1, 2, 3, 4, 8, 16, 64),
    "expert_tensor_parallel_size": (1, 1, 2),
    "sequence_parallel": (0, 1),
    "zero_stage": (0, 1, 1, 3),
    "micro_batch_size": (1, 2, 3),
    "seq_len": (1000, 4096),
    "grad_accum": (1, 3, 8, 32, 1000),
    "recompute": range(len(RECOMPUTES)),
    "schedule": range(len(SCHEDULES)),
}


def template(rng, name):
    world = rng.choice((64, 256, 2048))
    return TrainingJob(
        model=load_model(name),
        machine=parse_machine(f"{world // 8}x8x{rng.choice(('H800', 'A100-80GB'))}"),
        engine="megatron",
        precision=rng.choice(PRECISIONS),
        optimizer=rng.choice(("adamw", "adamw", "sgd", "muon", "dist_muon")),
        attention=rng.choice((None, "flash", "eager")),
        loss=rng.choice((None, "plain", "fused")),
        lora=Lora(rank=16, targets=("all-linear",)) if rng.random() < 0.2 else None,
        flags=rng.choice(FLAGS),
    )


def random_layouts(rng, world):
    rows = [{name: rng.choice(values) for name, values in CHOICES.items()} for _row in range(NUMBER)]
    for row in rows:
        others = row["tensor_parallel_size"] * row["pipeline_parallel_size"] * row["context_parallel_size"]
        row["data_parallel_size"] = max(1, world // others)
    return layouts({name: [row[name] for row in rows] for name in COLUMNS}, recomputes=RECOMPUTES)


def alone(job):
    try:
        step = megatron.step(job)
    except LayoutError:
        return None
    return max(step.ranks, key=lambda rank: rank.peak.device_used.bytes)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(2))
def test_every_figure_is_that_of_the_ledger(name, seed):
    rng = random.Random(f"{name} {seed}")
    job = template(rng, name)
    given = random_layouts(rng, job.machine.num_gpus)
    found = evaluate(job, given, terms=True)
    legal = 0
    for row in range(len(given)):
        one = given.job(job, row)
        parallel = one.parallel
        sizes = (parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.context_parallel_size)
        if parallel.data_parallel_size * sizes[0] * sizes[1] * sizes[2] != job.machine.num_gpus:
            assert found.reason[row] == Reason.WORLD
            continue
        rank = alone(one)
        assert (rank is None) == (found.reason[row] != Reason.LEGAL)
        if rank is None:
            assert found.device_used_bytes[row] == -1 and not found.fits[row]
            continue
        legal += 1
        ledger = rank.peak
        assert found.allocated_peak_bytes[row] == ledger.allocated.bytes
        assert found.reserved_peak_bytes[row] == ledger.reserved.bytes
        assert found.device_used_bytes[row] == ledger.device_used.bytes
        assert found.pp_rank[row] == rank.pp_rank
        for term in ("weights", "fp8_weights", "gradients", "master_weights", "optimizer_moments"):
            assert found.terms[term][row] == (ledger.find(term).bytes if ledger.find(term) else 0)
        assert sum(int(column[row]) for column in found.terms.values()) == ledger.allocated.bytes
    assert legal > NUMBER // 5


def test_one_of_very_many_is_what_it_is_alone():
    """Parts that many layouts share are worked out once: a sample of a large grid is still each its own."""
    job = TrainingJob(
        model=load_model("deepseek-v3"), machine=parse_machine("256x8xH800"), engine="megatron", precision=PRECISIONS[0]
    )
    every = grid(
        2048,
        global_batch_size=15360,
        recomputes=RECOMPUTES[:2],
        tensor_parallel_size=(1, 2, 4, 8),
        pipeline_parallel_size=(4, 16),
        virtual_pipeline_parallel_size=(1, 2),
        expert_parallel_size=(8, 32, 64, 128),
        expert_tensor_parallel_size=(1, 2),
        sequence_parallel=(0, 1),
        zero_stage=(0, 1),
        micro_batch_size=(1, 2),
        recompute=(0, 1),
        schedule=tuple(SCHEDULES.index(name) for name in ("1f1b", "dualpipe")),
    )
    found = evaluate(job, every)
    rows = [row for row in random.Random(3).sample(range(len(every)), NUMBER) if found.legal[row]]
    for row in rows:
        assert alone(every.job(job, row)).peak.device_used.bytes == found.device_used_bytes[row]
    assert len(rows) > NUMBER // 3


def test_reasons_are_told_apart():
    job = TrainingJob(model=load_model("deepseek-v3"), machine=parse_machine("256x8xH800"), engine="megatron")
    columns = {
        "data_parallel_size": [2048, 1024, 2048, 512, 64, 1],
        "tensor_parallel_size": [1, 1, 1, 1, 32, 1],
        "pipeline_parallel_size": [1, 1, 1, 4, 1, 2048],
        "expert_parallel_size": [256, 8, 4096, 512, 1, 1],
        "expert_tensor_parallel_size": [1, 1, 1, 1, 1, 1],
        "virtual_pipeline_parallel_size": [1, 1, 1, 1, 1, 4],
    }
    reasons = [Reason.LEGAL, Reason.WORLD, Reason.EXPERT_GROUPS, Reason.EXPERTS, Reason.LEGAL, Reason.STAGES]
    assert list(evaluate(job, layouts(columns)).reason) == reasons
    odd = {"data_parallel_size": 128, "tensor_parallel_size": 3}
    small = TrainingJob(model=load_model("deepseek-v3"), machine=parse_machine("48x8xH800"), engine="megatron")
    assert list(evaluate(small, layouts(odd)).reason) == [Reason.TENSOR]


def test_columns_that_are_none_are_refused():
    for columns in ({"tp": [1]}, {"tensor_parallel_size": [0]}, {"zero_stage": [4]}, {"seq_len": [1.5]}):
        with pytest.raises(InputError):
            layouts(columns)
    with pytest.raises(InputError):
        layouts({"seq_len": [1, 2], "micro_batch_size": [1, 2, 3]})


def test_the_grid_uses_every_gpu_and_the_whole_batch():
    found = grid(
        64, global_batch_size=96, tensor_parallel_size=(1, 2, 3), pipeline_parallel_size=(1, 4), micro_batch_size=(1, 2)
    )
    world = found.data_parallel_size * found.tensor_parallel_size * found.pipeline_parallel_size
    assert len(found) and (world == 64).all()
    assert (found.data_parallel_size * found.micro_batch_size * found.grad_accum == 96).all()
    assert 3 not in found.tensor_parallel_size


def walked(**case):
    held = [0] * case["virtual"]
    seen = set()
    for one in passes(**case):
        if one.forward:
            held[one.virtual] += 1
        seen.add(Load(one.forward, one.virtual, tuple(held)))
        if not one.forward:
            held[one.virtual] -= 1
    return seen


@pytest.mark.parametrize("seed", range(4))
def test_loads_are_the_fullest_moments_of_the_walk(seed):
    rng = random.Random(seed)
    for _case in range(150):
        schedule = rng.choice(("1f1b", "interleaved", "gpipe", "zero_bubble", "dualpipe", "dualpipev"))
        pipeline = rng.randrange(1, 13)
        case = {
            "schedule": schedule,
            "pipeline": pipeline,
            "virtual": 2 if schedule.startswith("dual") else rng.choice((1, 2, 3, 4)),
            "rank": rng.randrange(pipeline),
            "num_micro_batches": rng.choice((1, 2, 3, 5, 8, 16, 31, 100, 500)),
            "group": rng.choice((pipeline, pipeline, 1, 3, pipeline + 5)),
            "ahead": rng.choice((0, 0, 1)),
        }
        every, short = walked(**case), loads(**case)
        assert set(short) <= every
        weights = [rng.choice((0, 1, 3, 7, 100)) for _chunk in range(case["virtual"])]
        most = {}
        for name, moments in (("every", every), ("short", short)):
            for load in moments:
                size = sum(live * weight for live, weight in zip(load.live, weights, strict=True))
                key = (name, load.forward, load.virtual)
                most[key] = max(most.get(key, 0), size)
        for forward, chunk in {(load.forward, load.virtual) for load in every}:
            assert most["every", forward, chunk] == most["short", forward, chunk], case
