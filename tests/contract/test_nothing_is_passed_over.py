"""Whatever a training job states changes the answer, is refused, or is listed here with why it costs nothing."""

from dataclasses import replace

import pytest

from ullage.engines.training import TRAINING_ENGINES, step
from ullage.errors import InputError, LayoutError
from ullage.read.machine import parse_machine
from ullage.read.model_source import load_model
from ullage.read.training_words import parse_lora, parse_precision, parse_recompute
from ullage.spec.training import Evaluation, Recompute, TrainingJob, TrainingParallel

DENSE, EXPERTS = load_model("qwen3-0.6b"), load_model("qwen3-30b-a3b")
NODES = parse_machine("2x8xH100")
LORA = {"lora": parse_lora("r=16"), "method": "lora"}


def base(engine):
    alone = engine in ("single", "unsloth")
    sharded = engine in ("fsdp1", "fsdp2", "torchtitan", "torchtune")
    return TrainingJob(
        model=DENSE,
        machine=parse_machine("1xH100") if alone else NODES,
        engine=engine,
        parallel=TrainingParallel(data_parallel_size=1 if alone else 16, fsdp="full_shard" if sharded else None),
        precision=parse_precision(None, engine)[0],
        seq_len=2048,
        **(LORA if engine == "unsloth" else {}),
    )


def split(job, **sizes):
    """Spread the same GPUs otherwise; what is left is data parallel."""
    known = {"tensor_parallel_size": 1, "context_parallel_size": 1, "pipeline_parallel_size": 1, **sizes}
    rest = known["tensor_parallel_size"] * known["context_parallel_size"] * known["pipeline_parallel_size"]
    data = max(1, job.machine.num_gpus // rest)
    return replace(job, parallel=replace(job.parallel, data_parallel_size=data, **sizes))


OPTIONS = {
    "tensor": lambda job: split(job, tensor_parallel_size=2),
    "context": lambda job: split(job, context_parallel_size=2),
    "pipeline": lambda job: split(job, pipeline_parallel_size=2, schedule="1f1b"),
    "virtual": lambda job: split(
        job, pipeline_parallel_size=2, virtual_pipeline_parallel_size=2, schedule="interleaved"
    ),
    "expert": lambda job: split(replace(job, model=EXPERTS), expert_parallel_size=2),
    "expert of a dense model": lambda job: split(job, expert_parallel_size=2),
    "zero 1": lambda job: split(job, zero_stage=1),
    "zero 3": lambda job: split(job, zero_stage=3),
    "full_shard": lambda job: split(job, fsdp="full_shard"),
    "shard_grad_op": lambda job: split(job, fsdp="shard_grad_op"),
    "hybrid": lambda job: split(job, fsdp="hybrid", shard_group_size=8),
    "micro batch": lambda job: replace(job, micro_batch_size=2),
    "sequence": lambda job: replace(job, seq_len=1024),
    "sgd": lambda job: replace(job, optimizer="sgd"),
    "muon": lambda job: replace(job, optimizer="muon"),
    "adamw_8bit": lambda job: replace(job, optimizer="adamw_8bit"),
    "galore_adamw": lambda job: replace(job, optimizer="galore_adamw"),
    "apollo_adamw": lambda job: replace(job, optimizer="apollo_adamw"),
    "a rank of adamw": lambda job: replace(job, flags=(("optim_rank", "8"),)),
    "for_loop": lambda job: replace(job, optimizer_impl="for_loop"),
    "full recompute": lambda job: replace(job, recompute=parse_recompute("full")),
    "every second layer": lambda job: replace(job, recompute=parse_recompute("every=2")),
    "eager": lambda job: replace(job, attention="eager"),
    "chunked": lambda job: replace(job, loss="chunked"),
    "liger": lambda job: replace(job, loss="liger"),
    "lora": lambda job: replace(job, **LORA),
    "qlora": lambda job: replace(job, base_quantization="nf4", **{**LORA, "method": "qlora"}),
    "a quantised base alone": lambda job: replace(job, base_quantization="nf4"),
    "optimizer offload": lambda job: replace(job, offload=(("optimizer", "cpu"),)),
    "parameter offload": lambda job: replace(job, offload=(("params", "cpu"),)),
    "activation offload": lambda job: replace(job, offload=(("activations", "cpu"),)),
    "compile": lambda job: replace(job, compile=True),
    "fp8": lambda job: replace(job, precision=replace(job.precision, fp8_recipe="blockwise")),
    "fp8 by tensor": lambda job: replace(job, precision=replace(job.precision, fp8_recipe="tensorwise")),
    "mxfp8": lambda job: replace(job, precision=replace(job.precision, fp8_recipe="mxfp8")),
    "nvfp4": lambda job: replace(job, precision=replace(job.precision, fp8_recipe="nvfp4")),
    "evaluation": lambda job: replace(job, evaluation=Evaluation(batch_size=8)),
}
#: What a setting is the same as, by (engine or "", option).
COSTS_NOTHING = {
    ("fsdp1", "full_shard"): "the base case",
    ("fsdp2", "full_shard"): "the base case",
    ("torchtitan", "full_shard"): "the base case",
    ("torchtune", "full_shard"): "the base case",
    ("fsdp1", "zero 3"): "full_shard by another name",
    ("fsdp2", "zero 3"): "full_shard by another name",
    ("torchtitan", "zero 3"): "full_shard by another name",
    ("torchtune", "zero 3"): "full_shard by another name",
    ("litgpt", "full_shard"): "how litgpt uses several devices",
    ("litgpt", "zero 3"): "full_shard by another name",
    ("litgpt", "full recompute"): "what litgpt does on several devices",
    ("litgpt", "chunked"): "litgpt's own loss",
    ("torchtune", "chunked"): "torchtune's own loss",
    ("torchtune", "for_loop"): "makes no copies, and neither does the fused step that the recipes ask for",
    ("single", "zero 1"): "one GPU shares with none",
    ("single", "zero 3"): "one GPU shares with none",
    ("single", "shard_grad_op"): "one GPU shares with none",
    ("single", "hybrid"): "one GPU shares with none",
    ("unsloth", "zero 1"): "one GPU shares with none",
    ("unsloth", "zero 3"): "one GPU shares with none",
    ("unsloth", "full_shard"): "one GPU shares with none",
    ("unsloth", "shard_grad_op"): "one GPU shares with none",
    ("unsloth", "hybrid"): "one GPU shares with none",
    ("unsloth", "lora"): "the base case",
}


def figures(job):
    """Every figure of the answer that a user sees."""
    answer = step(job)
    return [
        (
            rank.host_bytes,
            *((m.moment, m.allocated.bytes, m.device_used.bytes) for m in (*rank.moments, rank.after_step)),
        )
        for rank in answer.ranks
    ]


@pytest.mark.parametrize("engine", sorted(TRAINING_ENGINES))
def test_every_setting_counts_or_is_refused(engine):
    job = base(engine)
    plain, passed_over = {DENSE.name: figures(job)}, []
    for name, change in OPTIONS.items():
        changed = change(job)
        try:
            found = figures(changed)
        except InputError:
            continue
        if changed.model.name not in plain:
            plain[changed.model.name] = figures(replace(job, model=changed.model))
        if (found == plain[changed.model.name]) != ((engine, name) in COSTS_NOTHING):
            passed_over.append(name)
    assert not passed_over


@pytest.mark.parametrize("name", sorted(name for name in vars(TrainingParallel()) if name.endswith("_size")))
@pytest.mark.parametrize("engine", sorted(TRAINING_ENGINES))
def test_a_size_below_one_is_refused(engine, name):
    job = base(engine)
    with pytest.raises(LayoutError, match=name):
        step(replace(job, parallel=replace(job.parallel, **{name: -1})))


@pytest.mark.parametrize("engine", sorted(TRAINING_ENGINES))
def test_a_count_below_one_is_refused(engine):
    for nothing in ({"micro_batch_size": 0}, {"seq_len": 0}, {"grad_accum": 0}, {"recompute": Recompute(every=0)}):
        with pytest.raises(InputError, match="is 0; write 1 or more"):
            step(replace(base(engine), **nothing))


def test_an_evaluation_of_nothing_is_refused():
    for nothing in ({"batch_size": 0}, {"batch_size": 1, "seq_len": 0}, {"batch_size": 1, "kept_batches": -1}):
        with pytest.raises(InputError, match="is 0; write 1 or more"):
            step(replace(base("single"), evaluation=Evaluation(**nothing)))
