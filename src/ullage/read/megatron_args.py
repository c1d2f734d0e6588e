"""Megatron-LM arguments → a training job: from a mapping, a shell script, a line or YAML.

Every flag that moves memory is kept on the job (``job.flags``) for the engine room; a flag that is not known is named
in ``job.assumed``, so that the ledger says ``assumed``.

Source: Megatron-LM@adc69db:megatron/training/arguments.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from ullage.errors import InputError, LayoutError
from ullage.i18n import _
from ullage.read.megatron_doubts import doubts, refuse_other_jobs, unknown
from ullage.read.megatron_flags import READ
from ullage.read.megatron_model import model_of
from ullage.read.megatron_precision import precision_of
from ullage.read.megatron_resolve import resolved
from ullage.read.megatron_words import Arguments, from_mapping, parse_text
from ullage.spec.machine import Machine
from ullage.spec.model import Model
from ullage.spec.training import Recompute, TrainingJob, TrainingParallel

#: Modules that selective recompute and fine-grained offload can name; the first is the default.
#: Source: Megatron-LM@d98e8a6:megatron/core/transformer/transformer_config.py:TransformerConfig.__post_init__.
RECOMPUTE_MODULES = (
    "core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts", "gdn_norm_out",
)  # fmt: skip
OFFLOAD_MODULES = ("core_attn", "attn_proj", "expert_fc1", "moe_act", "attn_norm", "mlp_norm", "qkv_linear")
#: Environment variables that move memory.
ENVIRONMENT = (
    "CUBLAS_WORKSPACE_CONFIG",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO",
    "NVTE_FUSED_ATTN",
    "NVTE_FLASH_ATTN",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
)


def job_from_megatron_args(
    args: Mapping[str, object],
    env: Mapping[str, object] | None = None,
    *,
    machine: Machine,
    engine_version: str = "",
    model: Model | None = None,
) -> TrainingJob:
    """Return the job that ``pretrain_*.py`` would run with these flags.

    Args:
        args: flag → value; dashes and underscores are the same, switches are True.
        env: environment variables of the run.
        machine: the GPUs; their number is the world size.
        model: take this model instead of the one the flags describe.

    Raises:
        InputError: a flag whose value cannot be used. LayoutError: sizes that do not divide the world.
    """
    return _job(from_mapping(args, env), machine, engine_version, model, native="")


def job_from_megatron_text(
    text: str, *, machine: Machine, engine_version: str = "", model: Model | None = None
) -> TrainingJob:
    """Return the job of a shell script, a command line or a YAML file of flags."""
    return _job(parse_text(text), machine, engine_version, model, native=text)


def smallest_world(args: Mapping[str, object]) -> int:
    """Return the fewest GPUs on which the sizes go together: for command lines without a number of GPUs."""
    known = from_mapping(args)
    pipeline = known.size("pipeline-model-parallel-size", 1)
    tensor = known.size("tensor-model-parallel-size", 1)
    stage = tensor * known.size("context-parallel-size", 1)
    if "num-experts" in known:
        expert = known.size("expert-model-parallel-size", 1) * known.size("expert-tensor-parallel-size", tensor)
        stage = math.lcm(stage, max(1, expert))
    return max(1, stage * pipeline)


def _job(args: Arguments, machine: Machine, version: str, model: Model | None, *, native: str) -> TrainingJob:
    refuse_other_jobs(args)
    args = resolved(args)
    if args.on("fine-grained-activation-offloading"):
        _known_words("offload-modules", args, OFFLOAD_MODULES)
    assumed: tuple[str, ...] = ()
    if model is None:
        model, assumed = model_of(args)
    assumed += doubts(args)
    strange = unknown(args)
    if strange:
        assumed += (_("flags not known, taken as without memory: {flags}").format(flags=", ".join(strange)),)
    parallel = _parallel(args, machine)
    micro = args.size("micro-batch-size", 1)
    batch = args.count("global-batch-size", micro * parallel.data_parallel_size)
    return TrainingJob(
        model=model,
        machine=machine,
        engine="megatron",
        engine_version=version,
        parallel=parallel,
        precision=precision_of(args),
        optimizer=args.get("optimizer") or "adam",
        micro_batch_size=micro,
        seq_len=args.size("encoder-seq-length" if "encoder-seq-length" in args else "seq-length"),
        grad_accum=max(1, batch // max(1, micro * parallel.data_parallel_size)),
        recompute=_recompute(args),
        attention=_attention(args),
        loss="fused" if args.on("cross-entropy-loss-fusion") else "plain",
        alloc_conf=args.environment.get("PYTORCH_CUDA_ALLOC_CONF", args.environment.get("PYTORCH_ALLOC_CONF", "")),
        flags=_flags(args),
        native=native,
        assumed=assumed,
    )


def _flags(args: Arguments) -> tuple[tuple[str, str], ...]:
    """Keep the flags that move memory, and the environment under ``env.``; ``native`` marks a full command line."""
    kept = [(name, args.get(name)) for name in sorted(args) if name in READ and args.get(name) not in ("", "false")]
    kept += [(f"env.{name}", value) for name, value in sorted(args.environment.items()) if name in ENVIRONMENT]
    return (("native", "true"), *kept)


def _parallel(args: Arguments, machine: Machine) -> TrainingParallel:
    tensor = args.size("tensor-model-parallel-size", 1)
    pipeline = args.size("pipeline-model-parallel-size", 1)
    context = args.size("context-parallel-size", 1)
    group = tensor * pipeline * context
    if not group or machine.num_gpus % group:
        raise LayoutError(
            _("{gpus} GPUs cannot be divided by TP {tp} x PP {pp} x CP {cp}").format(
                gpus=machine.num_gpus, tp=tensor, pp=pipeline, cp=context
            )
        )
    expert_tensor = args.size("expert-tensor-parallel-size", tensor)
    stage = _zero_stage(args)
    virtual = args.count("num-virtual-stages-per-pipeline-rank", 0)
    per_stage = args.count("num-layers-per-virtual-pipeline-stage", 0)
    if not virtual and per_stage:
        ends = ("account-for-embedding-in-pipeline-split", "account-for-loss-in-pipeline-split")
        layers = args.count("num-layers", 0) + sum(args.on(name) for name in ends)
        virtual = max(1, layers // pipeline // per_stage)
    return TrainingParallel(
        data_parallel_size=machine.num_gpus // group,
        tensor_parallel_size=tensor,
        sequence_parallel=args.on("sequence-parallel") and tensor > 1,
        context_parallel_size=context,
        pipeline_parallel_size=pipeline,
        virtual_pipeline_parallel_size=virtual or 1,
        schedule=None if pipeline == 1 else "interleaved" if virtual > 1 else "1f1b",
        expert_parallel_size=args.size("expert-model-parallel-size", 1),
        expert_tensor_parallel_size=expert_tensor,
        zero_stage=stage,
        fsdp="full_shard" if stage == 3 else None,
    )


def _zero_stage(args: Arguments) -> int:
    """Return what data-parallel ranks share, as a ZeRO stage: of Megatron-FSDP what its strategy says.

    Source: Megatron-LM@2026-08:megatron/core/distributed/distributed_data_parallel_config.py
        (data_parallel_sharding_strategy, "no_shard" by default); docs of Megatron-FSDP (optim 1, optim_grads 2).
    """
    if args.on("use-torch-fsdp2"):
        return 3
    if not args.on("use-megatron-fsdp"):
        return 1 if args.on("use-distributed-optimizer") else 0
    strategy = args.get("data-parallel-sharding-strategy") or "no_shard"
    stages = {"no_shard": 0, "optim": 1, "optim_grads": 2, "optim_grads_params": 3}
    if strategy not in stages:
        raise InputError(
            _("{text!r} is not a sharding strategy").format(text=strategy[:40]),
            where="--data-parallel-sharding-strategy",
            remedy=_("write {known}").format(known=", ".join(stages)),
        )
    return stages[strategy]


def _recompute(args: Arguments) -> Recompute:
    granularity = args.get("recompute-granularity") or ("selective" if args.on("recompute-activations") else "")
    if granularity == "full":
        method = args.get("recompute-method") or "uniform"
        number = args.count("recompute-num-layers", 1)
        return Recompute(
            kind="full",
            every=number if method == "uniform" else 1,
            num_layers=number if method == "block" else None,
            method="block" if method == "block" else "uniform",
        )
    if granularity == "selective":
        return Recompute(kind="modules", modules=_known_words("recompute-modules", args, RECOMPUTE_MODULES))
    modules = ("moe",) if args.on("moe-layer-recompute") else ()
    return Recompute(kind="modules" if modules else "none", modules=modules)


def _known_words(name: str, args: Arguments, known: tuple[str, ...]) -> tuple[str, ...]:
    """Return the words of a list of modules, the first of ``known`` where it is not given.

    Raises:
        InputError: a word that is not known.
    """
    words = args.words(name) or known[:1]
    strange = next((word for word in words if word not in known), None)
    if strange is not None:
        raise InputError(
            _("the module {name!r} is not followed").format(name=strange[:40]),
            where=f"--{name}",
            remedy=_("known are {known}").format(known=", ".join(known)),
        )
    return words


def _attention(args: Arguments) -> Literal["flash", "sdpa", "unfused"] | None:
    backend = args.get("attention-backend")
    if args.get("transformer-impl") == "local" or args.get("spec") == "local" or backend in ("unfused", "local"):
        return "unfused"
    if backend == "flash":
        return "flash"
    return "sdpa" if backend == "fused" else None
