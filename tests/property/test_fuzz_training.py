"""Whatever is asked about training, the answer is a result or one sentence with a documented exit code.

A small number of examples with a fixed seed runs by default; ``ULLAGE_FUZZ_EXAMPLES=20000`` runs more, freshly drawn.
"""

from __future__ import annotations

import io
import json
import os
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from fuzzing import CONFIGS, SPOILT, WORDS, spoilt_argv, spoilt_configs, time_limit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ullage.engines.training import TRAINING_ENGINES
from ullage.errors import UllageError
from ullage.read.hf_config import read_config_object
from ullage.read.machine import parse_machine
from ullage.read.megatron_args import job_from_megatron_args, job_from_megatron_text
from ullage.report.train_json import training_json
from ullage.spec.model import Model
from ullage.spec.training import Evaluation, Lora, Precision, Recompute, TrainingJob, TrainingParallel
from ullage.training_fit import fit_training

ON_DEMAND = int(os.environ.get("ULLAGE_FUZZ_EXAMPLES", "0"))
SECONDS = 60.0  # a hang, not a slow machine
DOCUMENTED = {0, 2, 3, 4, 5}


def budget(examples: int) -> Any:
    return settings(
        max_examples=ON_DEMAND or examples,
        derandomize=not ON_DEMAND,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("ULLAGE_DEBUG", "1")  # an internal error is raised here, with its traceback, instead of told


def check_command(argv: list[str]) -> None:
    from ullage.cli import main

    out, err = io.StringIO(), io.StringIO()
    with time_limit(SECONDS), redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(argv)
        except SystemExit as exit_:  # argparse
            code = exit_.code if isinstance(exit_.code, int) else 1
    assert code in DOCUMENTED, (argv, err.getvalue())
    assert "Traceback" not in err.getvalue()
    if code in (2, 5):
        assert err.getvalue().strip(), argv
        assert len(err.getvalue()) < 20_000
    if "--json" in argv and not {"--help", "-h"} & set(argv) and code in (0, 3, 4) and out.getvalue().strip():
        json.loads(out.getvalue())


LINES = [
    line.split()
    for line in (
        "fit train deepseek-v2-lite --on 8xH100 --engine megatron --tp 2 --ep 4 --pp 2 --sp --zero 1 --json",
        "fit train qwen3-0.6b --on 2x8xA100-80GB --engine fsdp2 --micro-batch 2 --seq 2048 --grad-accum 4 --json",
        "fit train llama-3.2-1b --on 8xH100 --engine deepspeed --zero 3 --offload optimizer=cpu --json",
        "fit train llama-3.2-1b --on 24GiB --engine hf_trainer --lora r=16,targets=q_proj+v_proj --no-advice",
        "fit train llama-3.2-1b --on 1xH100 --lora r=8 --base-quantization nf4 --precision bf16 --loss liger --json",
        "fit train llama-3.2-1b --on 8xH100 --engine torchtitan --tp 2 --recompute selective --compile --reserve 10%",
        "fit train gpt2 --on 1xT4-16GB --engine single --attention eager --optimizer adamw_8bit --json",
        "fit train llama-3.2-1b --on 4xH100 --engine litgpt --fsdp shard_grad_op --loss chunked --metrics",
        "fit train llama-3.2-1b --on 4xH100 --engine torchtune --optimizer-impl fused --json",
        "fit train qwen3-0.6b --on 2xH100 --engine ddp --rlhf grpo,completion=128,vllm=0.4,sleep --seq 512 --json",
        "fit train deepseek-v2-lite --on 16xH100 --engine megatron --pp 8 --schedule dualpipe --vpp 2 --recompute mlp",
    )
]
TRAINING_WORDS = [
    *WORDS,
    *TRAINING_ENGINES,
    "every=4",
    "every=0",
    "mlp,layernorm,moe_act,core_attn",
    "selective",
    "r=0",
    "r=99999999",
    "r=4,targets=,dropout=2",
    "r=16,targets=all-linear",
    "params=nvme",
    "fp8-deepseek",
    "fp16-mixed",
    "dpo",
    "grpo,completion=64,vllm=0.5,sleep,offload",
    "ppo,server",
    "muon",
    "lion",
    "paged_adamw_8bit",
    "1xH100",
    "7xH100",
    "100000xH100",
    "dualpipe",
    "zero_bubble",
    "gpt2",
    "mamba2",
    "gemma-3-4b",
    "falcon-h1-0.5b",
    "megatron@9.9",
    "1000000",
]


@budget(120)
@given(argv=spoilt_argv(LINES, TRAINING_WORDS))
def test_command_lines(argv: list[str]) -> None:
    check_command(argv)


FLAGS = {
    "--tp": ["1", "2", "3", "8"],
    "--pp": ["1", "2", "3"],
    "--cp": ["1", "2"],
    "--ep": ["1", "2", "4"],
    "--etp": ["1", "2"],
    "--vpp": ["1", "2"],
    "--zero": ["0", "1", "2", "3"],
    "--fsdp": ["full_shard", "shard_grad_op", "hybrid"],
    "--schedule": ["gpipe", "1f1b", "interleaved", "zero_bubble", "dualpipe", "dualpipev"],
    "--micro-batch": ["1", "2", "16"],
    "--seq": ["1", "512", "1000", "4k"],
    "--grad-accum": ["1", "2", "64"],
    "--precision": ["bf16-mixed", "bf16-master", "amp", "bf16", "fp32", "fp8", "fp8-deepseek", "fp16-mixed"],
    "--optimizer": ["adamw", "adam", "sgd", "adafactor", "lion", "muon", "adamw_8bit", "paged_adamw_8bit"],
    "--optimizer-impl": ["fused", "foreach", "for_loop"],
    "--recompute": ["none", "full", "selective", "every=2", "mlp", "core_attn,moe_act"],
    "--attention": ["flash", "sdpa", "eager", "unfused"],
    "--loss": ["plain", "fused", "chunked", "liger"],
    "--lora": ["r=8", "r=16,targets=q_proj+v_proj", "r=64,dropout=0.1"],
    "--base-quantization": ["nf4", "int8", "gptq"],
    "--rlhf": ["dpo", "kto,reference=precomputed", "rm", "orpo", "grpo,vllm=0.3,sleep", "rloo,completion=8", "ppo"],
    "--routing": ["bias", "0.5", "nan"],
    "--evaluate": ["8", "2,seq=100,kept=5", "8,kept=", "0"],
    "--offload": ["optimizer=cpu", "params=cpu", "activations=cpu"],
    "--reserve": ["0%", "10%", "8GiB", "200GiB"],
}


@st.composite
def composed(draw: st.DrawFn) -> list[str]:
    """Draw a command line of flags that are right one by one."""
    model = draw(st.sampled_from(["llama-3.2-1b", "qwen3-0.6b", "deepseek-v2-lite", "gpt2", "gemma-3-1b-it"]))
    machine = draw(st.sampled_from(["1xH100", "8xH100", "2x8xA100-80GB", "3xT4-16GB"]))
    argv = ["fit", "train", model, "--on", machine, "--engine", draw(st.sampled_from(sorted(TRAINING_ENGINES)))]
    for flag in draw(st.lists(st.sampled_from(sorted(FLAGS)), max_size=5, unique=True)):
        argv += [flag, draw(st.sampled_from(FLAGS[flag]))]
    return [*argv, *draw(st.sampled_from([[], ["--sp"], ["--compile"], ["--metrics"]])), "--no-advice", "--json"]


@budget(60)
@given(argv=composed())
def test_composed_lines(argv: list[str]) -> None:
    check_command(argv)


@budget(60)
@given(config=spoilt_configs(CONFIGS), engine=st.sampled_from(sorted(TRAINING_ENGINES)), data=st.data())
def test_fit_of_spoilt_configs(
    tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any], engine: str, data: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "train-config.json"
    path.write_text(json.dumps(config), encoding="utf-8", errors="surrogatepass")
    machine = data.draw(st.sampled_from(["8xH200", "1xH100", "2x8xH20"]))
    check_command(
        ["fit", "train", str(path), "--on", machine, "--engine", engine, "--seq", "512", "--json", "--no-advice"]
    )


@lru_cache
def models() -> tuple[Model, ...]:
    found = []
    for config in CONFIGS:
        values = {key: value for key, value in config.items() if key != "quantization_config"}
        try:
            found.append(read_config_object(values, where="config.json", name="fuzzed"))
        except UllageError:
            continue
    return tuple(found)


SIZES = st.sampled_from([1, 1, 1, 1, 1, 1, 2, 3, 4, 8])
DTYPES = st.sampled_from(["bfloat16", "float16", "float32", "float8_e4m3", "int8"])


@st.composite
def jobs(draw: st.DrawFn) -> TrainingJob:
    tensor, pipeline, context, data = (draw(SIZES) for _size in range(4))
    parallel = TrainingParallel(
        data_parallel_size=data,
        tensor_parallel_size=tensor,
        sequence_parallel=draw(st.booleans()),
        context_parallel_size=context,
        pipeline_parallel_size=pipeline,
        virtual_pipeline_parallel_size=draw(st.sampled_from([1, 1, 2, 3])),
        schedule=draw(st.sampled_from([None, "gpipe", "1f1b", "interleaved", "zero_bubble", "dualpipe", "dualpipev"])),
        pipeline_layout=draw(st.sampled_from([None] * 9 + [(1,), (2, 2), (0, 4), (4, 0, 0)])),
        expert_parallel_size=draw(SIZES),
        expert_tensor_parallel_size=draw(st.sampled_from([None, 1, 2, 3])),
        zero_stage=draw(st.sampled_from([0, 0, 0, 1, 2, 3])),
        fsdp=draw(st.sampled_from([None, None, "full_shard", "shard_grad_op", "hybrid"])),
        shard_group_size=draw(st.sampled_from([None, None, 1, 2, 3])),
    )
    lora = draw(
        st.none()
        | st.none()
        | st.builds(
            Lora,
            rank=st.sampled_from([1, 8, 100000]),
            targets=st.sampled_from([("all-linear",), ("q_proj",), ("nonsense",), ()]),
            dropout=st.sampled_from([0.0, 0.1]),
            dora=st.booleans(),
        )
    )
    world = tensor * pipeline * context * data
    return TrainingJob(
        model=draw(st.sampled_from(models())),
        machine=parse_machine(f"{draw(st.sampled_from([world] * 5 + [1, 8]))}xH100"),
        engine=draw(st.sampled_from(sorted(TRAINING_ENGINES))),
        engine_version=draw(
            st.sampled_from(["", "", "0.1", "99", "nonsense", "2.4.1, transformers 4.45", "core_r0.14"])
        ),
        parallel=parallel,
        precision=Precision(
            compute=draw(DTYPES),
            params=draw(DTYPES),
            grads=draw(DTYPES),
            master=draw(st.none() | DTYPES),
            moments=draw(DTYPES),
            fp8_recipe=draw(st.sampled_from([None, None, "blockwise", "delayed", "tensorwise", "mxfp8", "nvfp4"])),
        ),
        optimizer=draw(
            st.sampled_from(
                ["adamw", "adam", "sgd", "adafactor", "lion", "muon", "adamw_8bit", "paged_adamw_8bit", "x"]
            )
        ),
        optimizer_impl=draw(st.sampled_from([None, "fused", "foreach", "for_loop"])),
        micro_batch_size=draw(st.sampled_from([1, 2, 7, 10**6])),
        seq_len=draw(st.sampled_from([1, 127, 512, 4096, 10**7])),
        grad_accum=draw(st.sampled_from([1, 4, 10**6])),
        packing=draw(st.booleans()),
        recompute=draw(
            st.builds(
                Recompute,
                kind=st.sampled_from(["none", "none", "full", "full", "selective", "modules"]),
                every=st.sampled_from([1, 1, 1, 2, 100]),
                num_layers=st.sampled_from([None] * 9 + [0, 1, 100]),
                method=st.sampled_from([None, "block", "uniform"]),
                modules=st.sampled_from([(), ("mlp",), ("core_attn", "moe_act"), ("nonsense",)]),
            )
        ),
        attention=draw(st.sampled_from([None, "flash", "sdpa", "eager", "unfused"])),
        compile=draw(st.booleans()),
        loss=draw(st.sampled_from([None, "plain", "fused", "chunked", "liger"])),
        method=draw(st.sampled_from(["full", "lora", "qlora", "dora", "nonsense"])),
        lora=lora,
        base_quantization=draw(st.sampled_from([None] * 6 + ["nf4", "int8", "gptq", "nonsense"])),
        evaluation=draw(
            st.none()
            | st.builds(Evaluation, batch_size=st.sampled_from([0, 1, 8]), kept_batches=st.sampled_from([0, 9]))
        ),
        offload=draw(
            st.sampled_from([(), (), (), (("optimizer", "cpu"),), (("params", "nvme"),), (("activations", "cpu"),)])
        ),
        alloc_conf=draw(st.sampled_from(["", "expandable_segments:True", "nonsense:1"])),
        native=draw(st.sampled_from(["", "", "{}", "{", '{"zero_optimization": {"stage": 7}}', "[1]"])),
    )


@budget(300)
@given(job=jobs())
def test_jobs_over_all_engines(job: TrainingJob) -> None:
    with time_limit(SECONDS):
        try:
            values = training_json(fit_training(job, advise=False))
        except UllageError as error:
            assert error.exit_code in DOCUMENTED
            assert str(error).strip()
            return
    assert values["worst"]["device_used_bytes"] > 0
    json.dumps(values, allow_nan=False)


MEGATRON = """#!/bin/bash
export CUDA_DEVICE_MAX_CONNECTIONS=1
LAYERS=${LAYERS:-4}
MODEL_ARGS=(--num-layers $LAYERS --hidden-size 256 --num-attention-heads 8 --seq-length 512 --swiglu
  --max-position-embeddings 512 --vocab-size 1000 --normalization RMSNorm --group-query-attention
  --num-query-groups 2 --ffn-hidden-size 512 --disable-bias-linear --untie-embeddings-and-output-weights)
MOE_ARGS="--num-experts 8 --moe-router-topk 2 --expert-model-parallel-size 2 --moe-ffn-hidden-size 64"
torchrun --nproc_per_node 8 pretrain_gpt.py ${MODEL_ARGS[@]} $MOE_ARGS --tensor-model-parallel-size 2 \\
  --pipeline-model-parallel-size 2 --sequence-parallel --micro-batch-size 2 --global-batch-size 32 --bf16 \\
  --use-distributed-optimizer --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
"""
LATENT = (
    "python pretrain_gpt.py --num-layers 4 --hidden-size 256 --num-attention-heads 8 --seq-length 512 "
    "--max-position-embeddings 512 --vocab-size 1000 --multi-latent-attention --q-lora-rank 96 --kv-lora-rank 64 "
    "--qk-head-dim 32 --qk-pos-emb-head-dim 16 --v-head-dim 32 --num-experts 8 --moe-router-topk 2 "
    "--moe-ffn-hidden-size 128 --moe-layer-freq ([0]*1+[1]*3) "
    "--moe-shared-expert-intermediate-size 128 --micro-batch-size 1 --fp8-format hybrid --fp8-recipe blockwise "
    "--mtp-num-layers 1 --num-layers-per-virtual-pipeline-stage 1 --pipeline-model-parallel-size 2 --bf16"
)
MEGATRON_WORDS = [
    *WORDS,
    "--fp16",
    "--recompute-activations",
    "--context-parallel-size",
    "--num-virtual-stages-per-pipeline-rank",
    "--hybrid-layer-pattern",
    "M*M-",
    "${UNSET}",
    "$((1+1))",
    "([0]*99999999)",
    "[0,1,0",
    "--use-megatron-fsdp",
    "--init-model-with-meta-device",
    "--cross-entropy-loss-fusion",
    "--moe-expert-capacity-factor",
    "--optimizer",
    "muon",
    "sgd",
    "A=$A$A$A$A",
    "\n",
    "\\\n",
    "#",
]


@budget(150)
@given(tokens=spoilt_argv([MEGATRON.split(" "), LATENT.split(" ")], MEGATRON_WORDS), data=st.data())
def test_megatron_scripts(tokens: list[str], data: Any) -> None:
    machine = parse_machine(data.draw(st.sampled_from(["8xH100", "1xH100", "6xH100", "64xH100"])))
    with time_limit(SECONDS):
        try:
            job = job_from_megatron_text(" ".join(tokens), machine=machine)
            values = training_json(fit_training(job, advise=False))
        except UllageError as error:
            assert error.exit_code in DOCUMENTED
            return
    json.dumps(values, allow_nan=False)


ARGUMENTS = {
    "num-layers": 4,
    "hidden-size": 256,
    "num-attention-heads": 8,
    "seq-length": 512,
    "max-position-embeddings": 512,
    "vocab-size": 1000,
    "micro-batch-size": 1,
    "tensor-model-parallel-size": 2,
    "pipeline-model-parallel-size": 2,
    "num-experts": 8,
    "moe-router-topk": 2,
    "expert-model-parallel-size": 2,
    "moe-layer-freq": "([0]*1+[1]*3)",
    "bf16": True,
    "use-distributed-optimizer": True,
    "recompute-granularity": "selective",
    "recompute-modules": ["core_attn", "mlp"],
    "kv-channels": 32,
}


@budget(100)
@given(arguments=spoilt_configs([ARGUMENTS]))
def test_megatron_mappings(arguments: dict[str, Any]) -> None:
    with time_limit(SECONDS):
        try:
            fit_training(job_from_megatron_args(arguments, machine=parse_machine("8xH100")), advise=False)
        except UllageError as error:
            assert error.exit_code in DOCUMENTED


DEEPSPEED = {
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "none"},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": 5e8,
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": 1e5,
        "sub_group_size": 1e9,
        "zero_hpz_partition_size": 8,
    },
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": "auto",
}
RECORD = {
    "job": {
        "kind": "train",
        "model": "meta-llama/Llama-3.2-1B",
        "gpu": "H100-80GB",
        "num_gpus": 8,
        "engine": "fsdp2",
        "engine_version": "2.6",
        "parallel": {"dp": 8, "tp": 1, "pp": 1, "cp": 1, "ep": 1, "fsdp": "full_shard", "zero": 0},
        "precision": {"compute": "bf16", "params": "fp32", "grads": "fp32", "master": None, "moments": "fp32"},
        "optimizer": "adamw",
        "micro_batch_size": 2,
        "seq_len": 1024,
        "grad_accum": 2,
        "recompute": {"every": 2},
        "method": "lora",
        "lora": {"rank": 8, "targets": ["q_proj"], "dropout": 0.1},
        "offload": {"optimizer": "cpu"},
        "native": {"megatron_args": {"num-layers": 2}, "env": {}},
        "unknown": ["something"],
    }
}


@budget(100)
@given(config=spoilt_configs([DEEPSPEED]))
def test_deepspeed_files(tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "ds.json"
    path.write_text(json.dumps(config), encoding="utf-8", errors="surrogatepass")
    check_command(
        [
            "fit",
            "train",
            "qwen3-0.6b",
            "--on",
            "8xH100",
            "--seq",
            "256",
            "--from",
            f"deepspeed:{path}",
            "--json",
            "--no-advice",
        ]
    )


@budget(150)
@given(job=spoilt_configs([RECORD]))
def test_job_files(tmp_path_factory: pytest.TempPathFactory, job: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8", errors="surrogatepass")
    check_command(["fit", str(path), "--json", "--no-advice"])


@budget(60)
@given(job=spoilt_configs([RECORD]))
def test_records_of_training(tmp_path_factory: pytest.TempPathFactory, job: dict[str, Any]) -> None:
    measured = [{"quantity": "max_allocated", "value": 10, "unit": "GiB", "gib": 10, "rank": "max"}]
    record = {"id": "one", "group": "g", "completeness": "full", "measured": measured, **job}
    path = tmp_path_factory.getbasetemp() / "training.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8", errors="surrogatepass")
    check_command(["validate", str(path), "--json"])


ACCELERATE = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "FSDP",
    "mixed_precision": "bf16",
    "num_processes": 8,
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_reshard_after_forward": True,
        "fsdp_offload_params": False,
        "fsdp_activation_checkpointing": True,
        "fsdp_sharding_strategy": "FULL_SHARD",
    },
    "deepspeed_config": {"zero_stage": 3, "offload_optimizer_device": "cpu", "gradient_accumulation_steps": 2},
}


@budget(60)
@given(config=spoilt_configs([ACCELERATE, {**ACCELERATE, "distributed_type": "DEEPSPEED"}]))
def test_accelerate_files(tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any]) -> None:
    pytest.importorskip("yaml")
    path = tmp_path_factory.getbasetemp() / "accelerate.yaml"
    path.write_text(json.dumps(config), encoding="utf-8", errors="surrogatepass")  # JSON is YAML
    check_command(
        [
            "fit",
            "train",
            "qwen3-0.6b",
            "--on",
            "8xH100",
            "--seq",
            "256",
            "--from",
            f"accelerate:{path}",
            "--json",
            "--no-advice",
        ]
    )


TITAN = """[model]
name = "llama3"
flavor = "8B"
[training]
local_batch_size = 2
seq_len = 512
[parallelism]
data_parallel_replicate_degree = 1
data_parallel_shard_degree = -1
tensor_parallel_degree = 2
pipeline_parallel_degree = 1
context_parallel_degree = 1
[activation_checkpoint]
mode = "selective"
selective_ac_option = "2"
[compile]
enable = true
"""


@budget(60)
@given(data=st.data())
def test_torchtitan_files(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    pytest.importorskip("tomllib")
    lines = TITAN.splitlines()
    for _step in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(lines) - 1))
        key, equals, _value = lines[place].partition(" = ")
        spoilt = json.dumps(data.draw(st.sampled_from(SPOILT)), default=str)
        lines[place] = f"{key} = {spoilt}" if equals else data.draw(st.sampled_from(["", "[x]", "[[x]]", "[", "= 1"]))
    path = tmp_path_factory.getbasetemp() / "train.toml"
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    check_command(
        ["fit", "train", "qwen3-0.6b", "--on", "8xH100", "--from", f"torchtitan:{path}", "--json", "--no-advice"]
    )


@pytest.mark.parametrize(
    "rest", ["/nonexistent", "/", "", "\x00", "a" * 5000, "/dev/null", "--", "é\u202e", "'", "$(id)", "{}"]
)
@pytest.mark.parametrize("engine", ["megatron", "deepspeed", "torchtitan", "accelerate", "nonsense"])
def test_launch_files_that_are_none(engine: str, rest: str) -> None:
    check_command(["fit", "train", "gpt2", "--on", "8xH100", "--from", f"{engine}:{rest}", "--json"])


def test_what_is_spoilt_was_right(tmp_path: Path) -> None:
    """The spoilt lines, scripts and files start from ones that are answered: they are refused for their faults."""
    from ullage.cli import main

    for line in LINES:
        out = io.StringIO()
        with redirect_stdout(out):
            assert main(line) in (0, 2, 3, 4), line
    answered = [job_from_megatron_text(text, machine=parse_machine("8xH100")) for text in (MEGATRON, LATENT)]
    answered.append(job_from_megatron_args(ARGUMENTS, machine=parse_machine("8xH100")))
    for job in answered:
        assert fit_training(job, advise=False).ledger.device_used.bytes > 0
    job = replace(answered[0], engine="nonsense")
    with pytest.raises(UllageError):
        fit_training(job)
