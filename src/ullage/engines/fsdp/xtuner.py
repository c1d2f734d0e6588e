"""XTuner V1's own way with FSDP2: units, reduction, prefetch, checkpoints, optimizer and loss of its SFT command.

Source: InternLM/xtuner@8a85041b (2025-08-29): xtuner/v1/model/dense/dense.py:Dense.fully_shard,
    xtuner/v1/train/arguments/arguments.py:TrainingArguments.to_trainer_config,
    xtuner/v1/train/trainer.py:Trainer.from_config.
"""

from __future__ import annotations

from dataclasses import replace

from ullage.account.activations.blocks import Style
from ullage.account.fsdp import Group
from ullage.engines.fsdp.plan import Rules, plan_of
from ullage.engines.sharded.loss import LossPlan
from ullage.engines.sharded.walk import Block, StepPlan
from ullage.i18n import _
from ullage.spec.training import TrainingJob
from ullage.units import cdiv

#: Tokens of a chunk. Source: InternLM/xtuner@8a85041b:xtuner/v1/loss/ce_loss.py:CELossContext.chunk_size.
CHUNK_TOKENS = 1024
#: Gradients are sent in 16 bits and kept in the dtype of the parameters.
#: Source: InternLM/xtuner@8a85041b:xtuner/v1/config/fsdp.py:FSDPConfig.reduce_dtype.
REDUCED_BYTES = 2


def is_xtuner(job: TrainingJob) -> bool:
    """Whether the job names XTuner."""
    return "xtuner" in job.engine_version.lower()


def with_defaults(job: TrainingJob) -> tuple[TrainingJob, list[str]]:
    """Return the job with the loss and optimizer of the SFT command, and what was assumed.

    Source: InternLM/xtuner@b934f462:examples/v1/scripts/run_sft.sh (PYTORCH_CUDA_ALLOC_CONF); the rest as above.
    """
    assumed = []
    if job.loss is None:
        assumed.append(_("loss: that of XTuner's SFT command: Liger's where it is installed, else in chunks"))
        job = replace(job, loss="liger")
    if job.optimizer_impl is None:
        assumed.append(_("AdamW parameter by parameter, as in XTuner's SFT command"))
        job = replace(job, optimizer_impl="for_loop")
    if not job.alloc_conf:
        assumed.append(_("expandable segments, as XTuner's launch script sets them"))
        job = replace(job, alloc_conf="expandable_segments:True")
    return job, assumed


def xtuner_plan(job: TrainingJob, rules: Rules) -> StepPlan:
    """Return the plan: embedding and head apart, the last block neither checkpointed nor resharded, gathers ahead.

    AdamW parameter by parameter makes two tensors of the size of a shard: a root and what it is divided by.
    """
    style = Style(norm="fused", rope="halves", repeat_kv=False)
    plan = plan_of(job, rules, style=style, loss=_loss, split_root=True)
    last = plan.blocks[-1]
    kept = replace(last, checkpoint=None, group=replace(last.group, reshard_after_forward=False))
    front = plan.front.stored_bytes if plan.front else 0
    return replace(
        plan,
        blocks=tuple(_narrow(one) for one in (*plan.blocks[:-1], kept)),
        front=_sent_narrow(plan.front) if plan.front else None,
        back=_sent_narrow(plan.back) if plan.back else None,
        step_work=(front, front) if job.optimizer_impl == "for_loop" else plan.step_work,
        forward_prefetch=True,
    )


def _narrow(block: Block) -> Block:
    return replace(block, group=_sent_narrow(block.group), more=tuple(_sent_narrow(one) for one in block.more))


def _sent_narrow(group: Group) -> Group:
    """Return a unit whose gradients are sent in 16 bits and widened for its shard."""
    if not group.reduced_bytes:
        return group
    sent = min(group.reduced_bytes, group.trained_gathered_bytes // 2 * REDUCED_BYTES)
    return replace(group, reduced_bytes=sent, kept_grad_bytes=cdiv(group.reduced_bytes, group.num_ranks))


def _loss(plan: LossPlan) -> LossPlan:
    """Cross entropy on fp32 logits, which go before the backward pass; chunks of 1,024 tokens; Liger's.

    Source: InternLM/xtuner@8a85041b:xtuner/v1/loss/ce_loss.py:CrossEntropyLoss, ChunkCELoss;
        xtuner/v1/engine/train_engine.py:TrainEngine.train_step (``del output``).
    """
    return replace(
        plan, upcast=False, shift_copies=False, returned=False, num_chunks=cdiv(plan.num_tokens, CHUNK_TOKENS)
    )
