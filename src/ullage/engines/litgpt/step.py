"""litgpt's step: defaults filled in, one rank walked."""

from __future__ import annotations

from dataclasses import replace

from ullage.account.fsdp import Fsdp2, Replicated
from ullage.engines.litgpt.plan import plan_of, rules_of
from ullage.engines.sharded.known import check_formats, check_recompute
from ullage.engines.sharded.memory import notes_of, timeline_of
from ullage.engines.sharded.report import Doubt, rank_of, workspace_of
from ullage.engines.sharded.walk import Walk
from ullage.engines.training import TrainingStep
from ullage.i18n import _
from ullage.spec.training import Recompute, TrainingJob

VERSIONS = ("2023-10", "2024-02")
SOURCE = "litgpt@26857050:litgpt/finetune/{script}.py"


def step(job: TrainingJob) -> TrainingStep:
    """Walk one step of a litgpt job."""
    check_recompute(job, "none", "full", every=False)
    check_formats(job, mixed=False)
    assumed = notes_of(job)
    rules = rules_of(job.engine_version)
    ranks = job.parallel.data_parallel_size
    sharded = ranks > 1
    if sharded and job.recompute.kind == "none":
        job = replace(job, recompute=Recompute(kind="full"))
        assumed.append(_("several devices: blocks are sharded and made again in backward, as litgpt does"))
    plan = plan_of(job, rules, ranks if sharded else 1)
    timeline = timeline_of(job)
    walk = Walk(plan, timeline, Fsdp2(timeline) if sharded else Replicated(timeline))
    walk.step()
    if not rules.longest_first:
        walk.step()
    rank = rank_of(
        timeline,
        Doubt(modelled=0.08),
        rank=0,
        num_ranks=job.machine.num_gpus,
        pp_rank=0,
        num_gpus=job.machine.num_gpus,
        source=SOURCE.format(script="full" if job.method == "full" else "lora"),
        workspace_bytes=workspace_of(job.machine.gpu),
    )
    return TrainingStep(job=replace(job, assumed=(*job.assumed, *assumed)), ranks=(rank,))
