"""A step under DeepSpeed: defaults filled in, one rank walked."""

from __future__ import annotations

from dataclasses import replace

from ullage.account import zero
from ullage.account.fsdp import Group
from ullage.account.zero import Zero3, Zero12
from ullage.engines.deepspeed.plan import plan_of, settings_of
from ullage.engines.fsdp.plan import rules_of
from ullage.engines.sharded.known import check_recompute
from ullage.engines.sharded.memory import notes_of, timeline_of
from ullage.engines.sharded.report import Doubt, rank_of, workspace_of
from ullage.engines.sharded.walk import StepPlan, Walk
from ullage.engines.training import TrainingStep
from ullage.i18n import _
from ullage.spec.training import TrainingJob
from ullage.units import dtype_bytes

VERSIONS = ("0.9", "0.17.0")


def step(job: TrainingJob) -> TrainingStep:
    """Walk one step of a DeepSpeed job."""
    check_recompute(job, "none", "full")
    settings = settings_of(job)
    assumed = notes_of(job)
    if not job.native:
        assumed.append(_("ZeRO's buckets are not given: the defaults of 5e8 elements"))
    if job.precision.compute != "float32" and job.precision.master is None and job.precision.params != "float32":
        job = replace(job, precision=replace(job.precision, master="float32"))
        assumed.append(_("a master copy in fp32, as DeepSpeed's mixed precision keeps"))
    plan = plan_of(job, settings, rules_of(job.engine_version))
    timeline = timeline_of(job)
    ranks = job.parallel.data_parallel_size * job.parallel.context_parallel_size
    element = int(dtype_bytes(job.precision.params))
    sharder = Zero3(timeline, settings, element) if settings.stage == 3 else Zero12(timeline, settings, ranks, element)
    walk = Walk(plan, timeline, sharder)
    walk.step()
    walk.step()
    trained = sum(group.trained_gathered_bytes for group in _groups(plan)) // element
    total = sum(sum(group.gathered_bytes) for group in _groups(plan)) // element
    rank = rank_of(
        timeline,
        Doubt(modelled=0.25, reserved=0.15, held_bytes=_held(plan)),
        rank=0,
        num_ranks=job.machine.num_gpus,
        pp_rank=0,
        num_gpus=job.machine.num_gpus,
        source="deepspeed@0.17.0:deepspeed/runtime/zero",
        workspace_bytes=workspace_of(job.machine.gpu),
        host_bytes=zero.host_bytes(total, trained, ranks, settings),
    )
    return TrainingStep(job=replace(job, assumed=(*job.assumed, *assumed)), ranks=(rank,))


def _groups(plan: StepPlan) -> list[Group]:
    return [block.group for block in plan.blocks] + ([plan.front] if plan.front else [])


def _held(plan: StepPlan) -> int:
    """Logits (in fp32 at most) and gradients of a partition that a loop may hold between steps."""
    logits = 4 * plan.loss.num_tokens * plan.loss.vocab if plan.loss else 0
    return logits + sum(plan.step_work) // 2
