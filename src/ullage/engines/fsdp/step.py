"""A step under FSDP1 or FSDP2: defaults filled in, one rank walked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ullage.account.fsdp import Fsdp1, Fsdp2, Replicated, Sharder
from ullage.account.pools import Allocator, Unpooled
from ullage.account.timeline import Timeline
from ullage.engines.fsdp.plan import num_ranks, plan_of, rules_of
from ullage.engines.sharded.known import check_recompute
from ullage.engines.sharded.loss import LossPlan
from ullage.engines.sharded.report import Doubt, rank_of, workspace_of
from ullage.engines.sharded.walk import Walk
from ullage.engines.training import TrainingStep
from ullage.i18n import _
from ullage.spec.training import TrainingJob
from ullage.units import MiB

VERSIONS = ("torch 2.2", "torch 2.13")
#: Buckets in which FSDP1 broadcasts a unit's parameters when it wraps it.
#: Source: torch@2.2.0:torch/distributed/utils.py:_sync_params_and_buffers (250 MiB).
BROADCAST_BUCKET = 250 * MiB
#: What a context leaves of the card to the allocator is judged with this much taken.
CONTEXT_BYTES = 600 * MiB


def step(job: TrainingJob) -> TrainingStep:
    """Walk one step of a job under FSDP."""
    check_recompute(job, "none", "full")
    assumed: list[str] = []
    parallel = job.parallel
    if parallel.fsdp is None and parallel.zero_stage == 0 and parallel.data_parallel_size > 1:
        job = replace(job, parallel=replace(parallel, fsdp="full_shard"))
        assumed.append(_("how FSDP shards is not given: parameters, gradients and states (full_shard)"))
    rules = rules_of(job.engine_version)
    if _by_default_foundry(job):
        assumed.append(_("loss: the fused cross entropy that LLM Foundry takes by itself"))
    xtuner = "xtuner" in job.engine_version.lower()
    if xtuner and job.loss is None:
        assumed.append(_("loss: XTuner's default, cross entropy in the compute dtype"))
    plan = plan_of(job, rules, loss=_loss_by_default(job), split_root=xtuner)
    limit = job.machine.gpu.total_bytes - CONTEXT_BYTES
    timeline = Timeline(Allocator(expandable="expandable_segments:true" in job.alloc_conf.lower(), limit_bytes=limit))
    walk = Walk(plan, timeline, _sharder(job, timeline))
    for _number in range(3):
        walk.step()
    offloaded = ("params", "cpu") in job.offload
    rank = rank_of(
        timeline,
        Doubt(setup_bytes=sum(plan.setup) + BROADCAST_BUCKET, shift_low_bytes=_settings_unknown(job, timeline)),
        rank=0,
        num_ranks=job.machine.num_gpus,
        pp_rank=0,
        num_gpus=job.machine.num_gpus,
        source="torch@2.13.0:torch/distributed/fsdp",
        workspace_bytes=workspace_of(job.machine.gpu),
        host_bytes=sum(block.group.stored_bytes for block in plan.blocks) if offloaded else 0,
    )
    return TrainingStep(job=replace(job, assumed=(*job.assumed, *assumed)), ranks=(rank,))


def _loss_by_default(job: TrainingJob) -> Callable[[LossPlan], LossPlan] | None:
    """What a framework's own default makes of the loss, where the job does not say which one runs."""
    if _by_default_foundry(job):
        return _foundry_loss
    return _xtuner_loss if job.loss is None and "xtuner" in job.engine_version.lower() else None


def _xtuner_loss(plan: LossPlan) -> LossPlan:
    """Logits and loss in the compute dtype; embedding and head are units of their own.

    Source: InternLM/xtuner@02d761b:xtuner/v1/loss/ce_loss.py:CrossEntropyLoss (mode "eager" by default),
        xtuner/v1/model/dense/dense.py:Dense.fully_shard.
    """
    return replace(plan, kind="native", upcast=False, shift_copies=False, returned=False)


def _by_default_foundry(job: TrainingJob) -> bool:
    """Whether LLM Foundry's own default decides about the loss."""
    return job.loss is None and "foundry" in job.engine_version.lower()


def _foundry_loss(plan: LossPlan) -> LossPlan:
    """FlashAttention's cross entropy: 16-bit logits stay, their gradient is as wide, nothing is stored in fp32.

    Source: mosaicml/llm-foundry@0085285:llmfoundry/models/mpt/modeling_mpt.py:ComposerMPTCausalLM.__init__
        (loss_fn: fused_crossentropy by default, labels rolled instead of logits shifted).
    """
    return replace(plan, kind="compiled", upcast=False, shift_copies=False)


def _settings_unknown(job: TrainingJob, timeline: Timeline) -> int:
    """What a fused loss and optimizer step, and units for embedding and head, would save where nothing rules them out.

    Which modules are wrapped, and which loss runs, is the training script's choice; fsdp_qlora's is known.
    """
    if "fsdp_qlora" in job.engine_version:
        return 0
    other = replace(job, loss=job.loss or "fused", optimizer_impl=job.optimizer_impl or "fused")
    walked = Timeline(Unpooled())
    plan = plan_of(other, rules_of(job.engine_version), split_root=job.engine == "fsdp2")
    walk = Walk(plan, walked, _sharder(job, walked))
    walk.step()
    walk.step()
    peak = max(one.peak_bytes for one in walked.moments)
    return max(0, max(moment.peak_bytes for moment in timeline.moments) - peak)


def _sharder(job: TrainingJob, timeline: Timeline) -> Sharder:
    if num_ranks(job) == 1:
        return Replicated(timeline)
    offload = ("params", "cpu") in job.offload
    return Fsdp1(timeline, offload=offload) if job.engine == "fsdp1" else Fsdp2(timeline, offload=offload)
