"""torchtitan's step: defaults filled in, stages walked, ledgers written."""

from __future__ import annotations

from dataclasses import replace

from ullage.account.fsdp import Fsdp2
from ullage.account.timeline import Timeline
from ullage.engines.sharded.known import check_formats, check_recompute
from ullage.engines.sharded.memory import notes_of, timeline_of
from ullage.engines.sharded.report import Doubt, rank_of, workspace_of
from ullage.engines.sharded.walk import StepPlan, Walk
from ullage.engines.torchtitan.defaults import NEWEST_RELEASE, RELEASES, VERSIONS, Rules, date_of, rules_at
from ullage.engines.torchtitan.plan import plan_of
from ullage.engines.training import TrainingRank, TrainingStep
from ullage.errors import InputError
from ullage.i18n import _
from ullage.spec.training import TrainingJob
from ullage.units import cdiv

SOURCE = "torchtitan@{date}; torch@2.13.0:torch/distributed/fsdp/_fully_shard"

#: Passes in flight that are walked one by one: every one is a whole forward pass of allocations.
MAX_IN_FLIGHT = 256


def step(job: TrainingJob) -> TrainingStep:
    """Walk one step of a torchtitan job; a version that is not given widens the range to all that are known."""
    check_recompute(job, "none", "full", "selective")
    check_formats(job, mixed=True)
    assumed = notes_of(job)
    date = date_of(job.engine_version)
    known = date is not None
    if date is None:
        date = RELEASES[NEWEST_RELEASE]
        assumed.append(_("torchtitan's version is not given: taken to be {release}").format(release=NEWEST_RELEASE))
    rules = rules_at(date)
    walks = [_walked(job, plan_of(job, rules, one, _in_flight(job, index))) for index, one in enumerate(stages(job))]
    low, high = (0, 0) if known else _spread_over_versions(job, rules, walks[0])
    ranks = tuple(_ranks(job, rules, walks, Doubt(shift_low_bytes=low, shift_high_bytes=high)))
    ranks = tuple(sorted(ranks, key=lambda one: -one.peak.device_used.bytes))
    return TrainingStep(job=replace(job, assumed=(*job.assumed, *assumed)), ranks=ranks)


def _spread_over_versions(job: TrainingJob, rules: Rules, walked: Timeline) -> tuple[int, int]:
    """How much less and more the first stage would reserve under the other known versions."""
    first = stages(job)[0]
    plans: list[StepPlan] = []
    for date in VERSIONS:
        plan = plan_of(job, rules_at(date), first, 1)
        if plan not in plans:  # most versions differ in nothing that the job has
            plans.append(plan)
    own_plan = plan_of(job, rules, first, 1)
    peaks = [_walked(job, plan).pools.peak_reserved for plan in plans if plan != own_plan]
    alone = job.parallel.pipeline_parallel_size == 1  # then the first stage was walked with one pass, as here
    own = (walked if alone else _walked(job, own_plan)).pools.peak_reserved
    return max(0, own - min((*peaks, own))), max(0, max((*peaks, own)) - own)


def _walked(job: TrainingJob, plan: StepPlan) -> Timeline:
    """Walk two steps of a stage."""
    timeline = timeline_of(job, _launched_with(job))
    walk = Walk(plan, timeline, Fsdp2(timeline, offload=("params", "cpu") in job.offload))
    walk.step()
    walk.step()
    return timeline


def stages(job: TrainingJob) -> list[tuple[int, int, bool, bool]]:
    """Layers of each stage: (first, last, embeds, has the head); an even division, the rest to the first stages."""
    num_layers, pipeline = len(job.model.layers), job.parallel.pipeline_parallel_size
    layout = job.parallel.pipeline_layout
    counts = layout or tuple(num_layers // pipeline + (index < num_layers % pipeline) for index in range(pipeline))
    found, first = [], 0
    for index, count in enumerate(counts):
        found.append((first, first + count, index == 0, index == len(counts) - 1))
        first += count
    return found


def _launched_with(job: TrainingJob) -> str:
    """Return what torchtitan's launchers set: run_train.sh (one node), not multinode_trainer.slurm.

    Source: torchtitan@9dec370:run_llama_train.sh, multinode_trainer.slurm; torchtitan@e7c0cae:run_train.sh.
    """
    return "expandable_segments:True" if job.machine.num_nodes == 1 else ""


def _in_flight(job: TrainingJob, index: int) -> int:
    """Forward passes that a stage has run before its first backward pass.

    Formula: 1F1B: p - r; zero bubble (ZB-H1) p, those whose weight gradients wait included; interleaved:
        ((v - 1) p + 2 (p - 1 - r) + 1) / v passes over the rank's v chunks; GPipe: all.
    Source: torch@2.13.0:torch/distributed/pipelining/schedules.py:Schedule1F1B, ScheduleInterleaved1F1B; Qi et al.
        2024, arXiv:2401.10241, sec. 2 (ZB-H1).
    Known error: part passes of an interleaved schedule are rounded up to whole ones; zero bubble with several chunks is
        walked as interleaved.
    """
    parallel, pipeline = job.parallel, job.parallel.pipeline_parallel_size
    if pipeline == 1:
        return 1
    chunked = parallel.schedule == "zero_bubble" and parallel.virtual_pipeline_parallel_size > 1
    passes = pipeline if parallel.schedule == "zero_bubble" else pipeline - index
    if parallel.schedule == "interleaved" or chunked:
        chunks = max(2, parallel.virtual_pipeline_parallel_size)
        passes = cdiv((chunks - 1) * pipeline + 2 * (pipeline - 1 - index) + 1, chunks)
    elif parallel.schedule == "gpipe":
        passes = job.grad_accum
        if passes > MAX_IN_FLIGHT:
            raise InputError(
                _("GPipe holds all {count:,} passes of a step, more than are walked").format(count=passes),
                remedy=_("write at most {limit:,}").format(limit=MAX_IN_FLIGHT),
            )
    return max(1, min(passes, job.grad_accum))


def _ranks(job: TrainingJob, rules: Rules, walks: list[Timeline], doubt: Doubt) -> list[TrainingRank]:
    pipeline = job.parallel.pipeline_parallel_size
    per_stage = job.machine.num_gpus // pipeline
    found = []
    for index, timeline in enumerate(walks):
        found.append(
            rank_of(
                timeline,
                doubt,
                rank=index * per_stage,
                num_ranks=per_stage,
                pp_rank=index,
                num_gpus=job.machine.num_gpus,
                source=SOURCE.format(date=rules.date),
                workspace_bytes=workspace_of(job.machine.gpu),
            )
        )
    return found
