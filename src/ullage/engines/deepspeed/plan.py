"""A DeepSpeed job as a plan of one rank's step."""

from __future__ import annotations

import math
from dataclasses import replace

from ullage.account import zero
from ullage.account.activations.blocks import Style, Training
from ullage.account.activations.decoder import Slice, decoder_graph
from ullage.account.activations.graph import Checkpoint
from ullage.account.fsdp import Group
from ullage.account.optimizer import shard_state_bytes
from ullage.account.parameters import Parameter
from ullage.account.zero import ZeroSettings
from ullage.engines.fsdp.plan import Rules, compute_width, hf_loss, lora_of
from ullage.engines.sharded.groups import frame_parameters, of_layer
from ullage.engines.sharded.loss import LossPlan
from ullage.engines.sharded.walk import Block, StepPlan
from ullage.read.deepspeed_json import parse_deepspeed
from ullage.read.jsonfile import parse_json_object
from ullage.spec.training import TrainingJob
from ullage.units import cdiv, dtype_bytes

#: Models whose written-out attention bounds the scores from below, before Transformers 4.36.
#: Source: transformers@4.28.1:models/opt/modeling_opt.py:OPTAttention.forward.
CLAMPED_SCORES = ("OPTForCausalLM",)


def settings_of(job: TrainingJob) -> ZeroSettings:
    """The settings of ZeRO: the job's own JSON where it has one, else its stage and what it offloads."""
    if job.native.lstrip().startswith("{"):
        return parse_deepspeed(parse_json_object(job.native, where="deepspeed"), where="deepspeed").zero
    offload = dict(job.offload)
    return ZeroSettings(
        stage=job.parallel.zero_stage,
        offload_optimizer=offload.get("optimizer"),
        offload_params=offload.get("params"),
    )


def plan_of(job: TrainingJob, settings: ZeroSettings, rules: Rules) -> StepPlan:
    """Return the plan of a rank."""
    model, lora = job.model, lora_of(job)
    training = Training(base=lora is None, lora=lora)
    element = int(dtype_bytes(job.precision.params))
    scores = job.attention in ("eager", "unfused") or (job.attention is None and not rules.has_sdpa)
    dropout = 0.1 if any("dropout" in flag for flag, _value in job.flags) else 0.0
    clamped = not rules.has_sdpa and model.architecture in CLAMPED_SCORES
    style = Style(
        repeat_kv=True,
        scores=scores,
        dropout=dropout,
        clamped_scores=clamped,
        element_bytes=compute_width(job),
        grad_bytes=compute_width(job),
    )
    slice_ = Slice(batch=job.micro_batch_size, seq_len=cdiv(job.seq_len, job.parallel.context_parallel_size))
    ranks = job.parallel.data_parallel_size * job.parallel.context_parallel_size
    blocks, trained, total = [], 0, 0
    for index, layer in enumerate(model.layers):
        graph = decoder_graph(layer, model.hidden_size, slice_, style, training)
        parameters = list(of_layer(model, index))
        group = _group(f"layer {index}", parameters, element, ranks, frozen=lora is not None)
        added = 0 if lora is None else sum(op.weight_grad_bytes for op in graph.ops) // style.grad_bytes
        group = replace(
            group,
            gathered_bytes=(*group.gathered_bytes, added * element),
            trained_gathered_bytes=group.trained_gathered_bytes + added * element,
        )
        trained += group.trained_gathered_bytes // element
        total += sum(group.gathered_bytes) // element
        full = job.recompute.kind == "full" and index % job.recompute.every == 0
        blocks.append(Block(graph=graph, group=group, checkpoint=Checkpoint() if full else None))
    frame = [one for _section, one in frame_parameters(model)]
    root = _group("root", frame, element, ranks, frozen=lora is not None)
    trained += root.trained_gathered_bytes // element
    total += sum(root.gathered_bytes) // element
    return StepPlan(
        blocks=tuple(blocks),
        front=root,
        back=root,
        hidden_bytes=slice_.num_tokens * model.hidden_size * style.element_bytes,
        embedding_grad_bytes=math.prod(frame[0].shape) * style.grad_bytes if lora is None else 0,
        loss=_loss(job, hf_loss(job, rules, style, training, slice_)),
        weights=_states(job, settings, total, trained, element, ranks),
        state_bytes=(),
        step_work=_step_work(job, settings, trained, ranks),
        num_micro_batches=job.grad_accum,
        grads_freed_before_forward=False,
    )


def _loss(job: TrainingJob, plan: LossPlan) -> LossPlan:
    """Return the loss; a script with a loop of its own holds the model's output until the next one.

    Source: DeepSpeedExamples@45b4b71:applications/DeepSpeed-Chat/training/step1_supervised_finetuning/main.py:main
        (``outputs = model(**batch)`` before ``model.backward`` and ``model.step``); the Trainer lets go of it
        (transformers@5.23.0:trainer.py:Trainer.training_step).
    """
    own_loop = "deepspeed-chat" in job.engine_version.lower()
    return replace(plan, logits_held=True) if own_loop else plan


def _group(name: str, parameters: list[Parameter], element: int, ranks: int, *, frozen: bool) -> Group:
    sizes = tuple(math.prod(one.shape) * one.copies * element for one in parameters)
    return Group(
        name=name,
        gathered_bytes=sizes,
        stored_bytes=0,
        trained_gathered_bytes=0 if frozen else sum(sizes),
        reduced_bytes=0 if frozen else sum(sizes),
        num_ranks=ranks,
    )


def _states(
    job: TrainingJob, settings: ZeroSettings, total: int, trained: int, element: int, ranks: int
) -> tuple[tuple[str, int], ...]:
    """Parameters, master copy, moments, and the flat partition of gradients that stage 3 keeps.

    DeepSpeed makes the moments before the first step (``initialize_optimizer_states``): an optimizer of the Trainer's
    sees one flat tensor, its rank's partition (deepspeed@0.17.0:runtime/zero/stage_1_and_2.py, ``param_group["params"]
    = [single_partition_of_fp32_groups]``).
    """
    master = int(dtype_bytes(job.precision.master)) if job.precision.master else 0
    partition = cdiv(trained, ranks if settings.stage else 1)
    moments = 0 if settings.offload_optimizer else shard_state_bytes(job.optimizer, partition, job.precision.moments)
    found = [
        ("weights", zero.parameter_bytes(total, element, ranks, settings)),
        ("master_weights", zero.master_bytes(trained, master, ranks, settings)),
        ("optimizer_states", moments),
    ]
    if settings.stage == 3:
        grads = int(dtype_bytes(job.precision.grads))
        found.append(("gradients", zero.gradient_bytes(trained, grads, ranks, settings)))
    return tuple(found)


def _step_work(job: TrainingJob, settings: ZeroSettings, trained: int, ranks: int) -> tuple[int, ...]:
    """Gradients of a partition (stage 3: of a sub-group) in the master's dtype, made for the step.

    Source: deepspeed@0.17.0:deepspeed/runtime/zero/stage_1_and_2.py:step (single_grad_partition), stage3.py:
        _prepare_fp32_grad_for_sub_group.
    """
    if settings.offload_optimizer or not job.precision.master:
        return ()
    partition = cdiv(trained, ranks if settings.stage else 1)
    if settings.stage == 3:
        partition = min(partition, settings.sub_group)
    return (partition * int(dtype_bytes(job.precision.master)),)
