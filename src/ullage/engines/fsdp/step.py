"""A step under FSDP1 or FSDP2: defaults filled in, one rank walked."""

from __future__ import annotations

from dataclasses import replace

from ullage.account.fsdp import Fsdp1, Fsdp2, Replicated, Sharder
from ullage.account.pools import Unpooled
from ullage.account.timeline import Timeline
from ullage.engines.fsdp.plan import Rules, num_ranks, plan_of, rules_of
from ullage.engines.fsdp.xtuner import is_xtuner, with_defaults, xtuner_plan
from ullage.engines.sharded.known import check_recompute
from ullage.engines.sharded.loss import LossPlan
from ullage.engines.sharded.memory import notes_of, timeline_of
from ullage.engines.sharded.report import Doubt, rank_of, workspace_of
from ullage.engines.sharded.walk import StepPlan, Walk
from ullage.engines.training import TrainingStep
from ullage.i18n import _
from ullage.spec.training import TrainingJob
from ullage.units import MiB

VERSIONS = ("torch 2.2", "torch 2.13")
#: Buckets in which FSDP1 broadcasts a unit's parameters when it wraps it.
#: Source: torch@2.2.0:torch/distributed/utils.py:_sync_params_and_buffers (250 MiB).
BROADCAST_BUCKET = 250 * MiB


def step(job: TrainingJob) -> TrainingStep:
    """Walk one step of a job under FSDP."""
    check_recompute(job, "none", "full")
    assumed = notes_of(job)
    parallel = job.parallel
    if parallel.fsdp is None and parallel.zero_stage == 0 and parallel.data_parallel_size > 1:
        job = replace(job, parallel=replace(parallel, fsdp="full_shard"))
        assumed.append(_("how FSDP shards is not given: parameters, gradients and states (full_shard)"))
    rules = rules_of(job.engine_version)
    if _by_default_foundry(job):
        assumed.append(_("loss: the fused cross entropy that LLM Foundry takes by itself"))
    stated = job
    if is_xtuner(job):
        job, said = with_defaults(job)
        assumed += said
    plan = _plan(job, rules)
    timeline = timeline_of(job)
    walk = Walk(plan, timeline, _sharder(job, timeline))
    for _number in range(3):
        walk.step()
    offloaded = ("params", "cpu") in job.offload
    low, high = _settings_unknown(stated, timeline)
    rank = rank_of(
        timeline,
        Doubt(setup_bytes=sum(plan.setup) + BROADCAST_BUCKET, shift_low_bytes=low, shift_high_bytes=high),
        rank=0,
        num_ranks=job.machine.num_gpus,
        pp_rank=0,
        num_gpus=job.machine.num_gpus,
        source="torch@2.13.0:torch/distributed/fsdp",
        workspace_bytes=workspace_of(job.machine.gpu),
        host_bytes=sum(block.group.stored_bytes for block in plan.blocks) if offloaded else 0,
    )
    return TrainingStep(job=replace(job, assumed=(*job.assumed, *assumed)), ranks=(rank,))


def _plan(job: TrainingJob, rules: Rules) -> StepPlan:
    """The step of the framework that the job names."""
    if is_xtuner(job):
        return xtuner_plan(job, rules)
    if _by_default_foundry(job):
        return replace(plan_of(job, rules, loss=_foundry_loss), loss_inside=False)
    return plan_of(job, rules)


def _by_default_foundry(job: TrainingJob) -> bool:
    """Whether LLM Foundry's own default decides about the loss."""
    return job.loss is None and "foundry" in job.engine_version.lower()


def _foundry_loss(plan: LossPlan) -> LossPlan:
    """FlashAttention's cross entropy: 16-bit logits stay, their gradient is as wide, nothing is stored in fp32.

    Source: mosaicml/llm-foundry@0085285:llmfoundry/models/mpt/modeling_mpt.py:ComposerMPTCausalLM.__init__
        (loss_fn: fused_crossentropy by default, labels rolled instead of logits shifted).
    """
    return replace(plan, kind="compiled", upcast=False, shift_copies=False)


def _settings_unknown(job: TrainingJob, timeline: Timeline) -> tuple[int, int]:
    """What settings that the job does not give may take away and add.

    Less: a fused loss and optimizer step, and units for embedding and head, where nothing rules them out: which modules
    are wrapped, and which loss runs, is the training script's choice; fsdp_qlora's is known. More: XTuner's loss in
    chunks, where Liger is not installed.
    """
    if "fsdp_qlora" in job.engine_version or (is_xtuner(job) and job.loss is not None):
        return 0, 0
    rules, other = rules_of(job.engine_version), replace(job, loss=job.loss or "fused")
    if is_xtuner(job):
        plan = xtuner_plan(with_defaults(replace(job, loss="chunked"))[0], rules)
    else:
        other = replace(other, optimizer_impl=job.optimizer_impl or "fused")
        plan = plan_of(other, rules, split_root=job.engine == "fsdp2")
    walked = Timeline(Unpooled())
    walk = Walk(plan, walked, _sharder(job, walked))
    walk.step()
    walk.step()
    difference = max(one.peak_bytes for one in timeline.moments) - max(one.peak_bytes for one in walked.moments)
    return max(0, difference), max(0, -difference) if is_xtuner(job) else 0


def _sharder(job: TrainingJob, timeline: Timeline) -> Sharder:
    if num_ranks(job) == 1:
        return Replicated(timeline)
    offload = ("params", "cpu") in job.offload
    return Fsdp1(timeline, offload=offload) if job.engine == "fsdp1" else Fsdp2(timeline, offload=offload)
