"""A training job: a model, a machine, a framework at a version, and how a step is run.

``None`` means *not given*: the framework's own default for that version applies, and the room that resolves it says so
in ``assumed``. A value that is known to be off is written out (``"none"``, ``()``, ``False``).
"""

from __future__ import annotations

from typing import Literal

from ullage.frozen import Frozen
from ullage.spec.machine import Machine
from ullage.spec.model import Model
from ullage.spec.rlhf import Rlhf

FsdpSharding = Literal["full_shard", "shard_grad_op", "hybrid"]
Schedule = Literal["gpipe", "1f1b", "interleaved", "zero_bubble", "dualpipe", "dualpipev"]


class TrainingParallel(Frozen):
    """How a step is spread; the sizes multiply to the number of GPUs (expert sizes re-divide the same GPUs).

    Attributes:
        data_parallel_size: replicas of a model shard; ZeRO and FSDP shard over them (and over context parallelism).
        virtual_pipeline_parallel_size: model chunks per pipeline rank.
        pipeline_layout: layers of each stage as written out, or None for the framework's own division.
        expert_parallel_size, expert_tensor_parallel_size: how routed experts are spread.
        zero_stage: 0 to 3; 1 is also Megatron's distributed optimizer.
        fsdp: full_shard, shard_grad_op or hybrid, for the FSDP engines.
        shard_group_size: ranks of one hybrid shard group, None: all.
    """

    data_parallel_size: int = 1
    tensor_parallel_size: int = 1
    sequence_parallel: bool = False
    context_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    virtual_pipeline_parallel_size: int = 1
    schedule: Schedule | None = None
    pipeline_layout: tuple[int, ...] | None = None
    expert_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    zero_stage: int = 0
    fsdp: FsdpSharding | None = None
    shard_group_size: int | None = None


class Precision(Frozen):
    """Number formats of a recipe, canonical dtype names. ``master`` None: the parameters are the master copy."""

    compute: str = "bfloat16"
    params: str = "bfloat16"
    grads: str = "bfloat16"
    master: str | None = None
    moments: str = "float32"
    fp8_recipe: Literal["blockwise", "delayed", "tensorwise", "mxfp8", "nvfp4"] | None = None


class Recompute(Frozen):
    """Activation checkpointing. ``every`` k layers, the first ``num_layers`` of a stage, or named ``modules``.

    ``given`` False: nobody said so, and a framework's own default may differ.
    """

    kind: Literal["none", "full", "selective", "modules"] = "none"
    every: int = 1
    num_layers: int | None = None
    method: Literal["block", "uniform"] | None = None
    modules: tuple[str, ...] = ()
    given: bool = True


class Lora(Frozen):
    """Trained tensors on a frozen base. ``targets`` are module names, or ``("all-linear",)``; () are PEFT's own choice.

    Attributes:
        rank: of low-rank methods, 0 where a method has none.
        dropout, dora: of LoRA; ``dtype`` None: fp32, PEFT's choice for 16-bit bases.
        trained_modules: modules that get a full copy.
        kind: lora, or another method by PEFT's name (:mod:`ullage.account.adapters`).
        options: a method's settings by PEFT's names, where they are not the defaults.
        num_parameters: the trained ones, where they are stated; None: as the rule counts them.
    """

    rank: int
    targets: tuple[str, ...]
    dropout: float = 0.0
    dtype: str | None = None
    dora: bool = False
    trained_modules: tuple[str, ...] = ()
    kind: str = "lora"
    options: tuple[tuple[str, int | float | str], ...] = ()
    num_parameters: int | None = None


class Evaluation(Frozen):
    """Evaluation between steps: ``batch_size`` sequences per GPU, of ``seq_len`` tokens (None: as in training).

    ``kept_batches``: how many batches' logits are on the GPU at once, because a metric is computed on them; 0: none.
    ``spares_logits``: the loss makes no logits here either (Apple's cut cross entropy).
    """

    batch_size: int
    seq_len: int | None = None
    kept_batches: int = 0
    spares_logits: bool = False


class TrainingJob(Frozen):
    """What the user wants trained.

    Attributes:
        engine: megatron, fsdp1, fsdp2, torchtitan, deepspeed, ddp, hf_trainer, unsloth, litgpt, torchtune or single.
        optimizer: adamw, adam, sgd, adafactor, lion, muon, adamw_8bit, paged_adamw_8bit ...
        optimizer_impl: fused, foreach or for_loop.
        micro_batch_size: sequences per GPU and forward pass; grad_accum: passes per optimizer step.
        attention: flash, sdpa, eager or unfused.
        loss: plain, fused, chunked, liger, or tiled (TRL's: head and log-softmax in tiles).
        method: full, lora, qlora, dora ...; base_quantization: of the frozen base.
        rlhf: preference or reinforcement training; None: next-token prediction.
        evaluation: between steps; None: none.
        expert_load: rows that this rank's routed experts get, in units of what balanced routing gives.
        routing_sigma: width of the experts' popularity (:mod:`ullage.account.routing`).
        offload: what lives on the host: pairs such as ("optimizer", "cpu").
        flags, native, assumed: as in :class:`ullage.spec.serving.ServingJob`.
    """

    model: Model
    machine: Machine
    engine: str
    engine_version: str = ""
    parallel: TrainingParallel = TrainingParallel()
    precision: Precision = Precision()
    optimizer: str = "adamw"
    optimizer_impl: Literal["fused", "foreach", "for_loop"] | None = None
    micro_batch_size: int = 1
    seq_len: int = 4096
    grad_accum: int = 1
    packing: bool = False
    recompute: Recompute = Recompute()
    attention: Literal["flash", "sdpa", "eager", "unfused"] | None = None
    compile: bool = False
    loss: Literal["plain", "fused", "chunked", "liger", "tiled"] | None = None
    method: str = "full"
    lora: Lora | None = None
    rlhf: Rlhf | None = None
    evaluation: Evaluation | None = None
    expert_load: float = 1.0
    routing_sigma: float | None = None
    base_quantization: str | None = None
    offload: tuple[tuple[str, str], ...] = ()
    alloc_conf: str = ""
    flags: tuple[tuple[str, str], ...] = ()
    native: str = ""
    assumed: tuple[str, ...] = ()


def is_headless(job: TrainingJob) -> bool:
    """Return whether a scalar head stands in the place of the vocabulary's."""
    return job.rlhf is not None and job.rlhf.headless
