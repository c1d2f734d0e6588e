"""torchtune's step: defaults filled in, one rank walked."""

from __future__ import annotations

from dataclasses import replace

from ullage.account.activations.blocks import Style
from ullage.account.fsdp import Fsdp2, Replicated
from ullage.account.pools import Allocator
from ullage.account.timeline import Timeline
from ullage.engines.fsdp.plan import num_ranks, plan_of, rules_of
from ullage.engines.sharded.known import check_recompute
from ullage.engines.sharded.loss import LossPlan
from ullage.engines.sharded.report import Doubt, rank_of, workspace_of
from ullage.engines.sharded.walk import Walk
from ullage.engines.training import TrainingStep
from ullage.i18n import _
from ullage.spec.training import Recompute, TrainingJob

VERSIONS = ("0.1", "0.3", "0.6")
#: Chunks of the output. Source: torchtune@0.3.0:torchtune/modules/loss/ce_chunked_output_loss.py (num_output_chunks).
NUM_CHUNKS = 8


def step(job: TrainingJob) -> TrainingStep:
    """Walk one step of a torchtune job."""
    check_recompute(job, "none", "full")
    assumed: list[str] = []
    parallel = job.parallel
    if parallel.fsdp is None and parallel.data_parallel_size > 1:
        job = replace(job, parallel=replace(parallel, fsdp="full_shard"))
    if job.recompute.kind == "none" and job.method != "full":
        job = replace(job, recompute=Recompute(kind="full"))
        assumed.append(_("activation checkpointing is on, as in torchtune's recipes for adapters"))
    if job.loss is None:
        assumed.append(_("the loss is taken in {count} chunks, as torchtune does since 0.3").format(count=NUM_CHUNKS))
    rules = replace(rules_of(job.engine_version), upcast_logits=False, keeps_frozen_inputs=False, whole_scales=False)
    plan = plan_of(job, rules, style=style_of(job), loss=lambda last: _loss(job, last))
    timeline = Timeline(Allocator(expandable="expandable_segments:true" in job.alloc_conf.lower()))
    walk = Walk(plan, timeline, Fsdp2(timeline) if num_ranks(job) > 1 else Replicated(timeline))
    walk.step()
    walk.step()
    rank = rank_of(
        timeline,
        Doubt(modelled=0.3),
        rank=0,
        num_ranks=job.machine.num_gpus,
        pp_rank=0,
        num_gpus=job.machine.num_gpus,
        source="torchtune@0.6.1:recipes/lora_finetune_distributed.py",
        workspace_bytes=workspace_of(job.machine.gpu),
    )
    return TrainingStep(job=replace(job, assumed=(*job.assumed, *assumed)), ranks=(rank,))


def style_of(job: TrainingJob) -> Style:
    """Blocks as torchtune writes them: norm and rotation in fp32, keys and values expanded, 4-bit weights unpacked.

    Source: torchtune@0.6.1:torchtune/modules/rms_norm.py:RMSNorm, position_embeddings.py:RotaryPositionalEmbeddings,
        attention.py:MultiHeadAttention; torchao@0.7:dtypes/nf4tensor.py:LinearNF4 (keeps no input).
    """
    return Style(
        norm="fused" if job.compile else "native",
        rope="fused" if job.compile else "complex",
        repeat_kv=True,
        linear_weight_copy_bytes=2 if job.base_quantization else 0,
    )


def _loss(job: TrainingJob, last: LossPlan) -> LossPlan:
    """Logits in chunks that are all made before the loss; each chunk's loss in fp32; freed before backward."""
    if job.loss == "plain":
        return replace(last, returned=False)
    if job.compile:
        return replace(last, kind="compiled_chunks", num_chunks=NUM_CHUNKS, returned=False)
    return replace(last, kind="listed_chunks", element_bytes=4, num_chunks=NUM_CHUNKS, returned=False)
