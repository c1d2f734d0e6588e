"""torchtune's step: defaults filled in, one rank walked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ullage.account.activations.blocks import Style
from ullage.account.activations.graph import Graph
from ullage.account.fsdp import Fsdp2, Group, Replicated
from ullage.account.parameters import count
from ullage.account.pools import Unpooled
from ullage.account.timeline import Buffer, Timeline
from ullage.engines.fsdp import plan as fsdp
from ullage.engines.sharded.known import check_formats, check_recompute
from ullage.engines.sharded.loss import LossPlan
from ullage.engines.sharded.memory import notes_of, timeline_of
from ullage.engines.sharded.report import Doubt, rank_of, workspace_of
from ullage.engines.sharded.walk import StepPlan, Walk
from ullage.engines.torchtune.defaults import VERSIONS, Rules, recomputes, rules_of, steps_in_backward
from ullage.engines.training import TrainingStep
from ullage.errors import InputError
from ullage.i18n import _
from ullage.spec.model import Attention
from ullage.spec.training import Recompute, TrainingJob

__all__ = ["VERSIONS", "step", "style_of"]
#: Chunks of the output. Source: torchtune@0.3.0:torchtune/modules/loss/ce_chunked_output_loss.py (num_output_chunks).
NUM_CHUNKS = 8
#: Blocks' inputs that are still on the device when the next is copied to the host.
#: Source: torchtune@0.6.1:torchtune/training/_activation_offloading.py:OffloadActivations (max_fwd_stash_size).
STASH = 5


class InBackward(Replicated):
    """Each gradient goes as soon as its parameter has stepped."""

    def reduce(self, group: Group, grads: Sequence[Buffer]) -> None:
        """Let the gradients go."""
        for grad in grads:
            self.timeline.drop(grad)


def step(job: TrainingJob) -> TrainingStep:
    """Walk one step of a torchtune job; recompute that is not given widens the range to both."""
    check_recompute(job, "none", "full")
    check_formats(job, mixed=False)
    rules = rules_of(job.engine_version)
    if job.parallel.fsdp is None and job.parallel.data_parallel_size > 1:
        job = replace(job, parallel=replace(job.parallel, fsdp="full_shard"))
    job, other, assumed = _recomputed(job)
    assumed += notes_of(job)
    if job.loss is None and rules.chunked_loss:
        assumed.append(_("the loss is taken in {count} chunks, as torchtune does since 0.3").format(count=NUM_CHUNKS))
    if steps_in_backward(job):
        assumed.append(_("the optimizer steps in the backward pass, as in the recipes with a paged one"))
    timeline = walked(job, rules, timeline_of(job))
    peak = max(moment.peak_bytes for moment in timeline.moments)
    elsewhere = peak
    if other is not None:
        elsewhere = max(moment.peak_bytes for moment in walked(other, rules, Timeline(Unpooled())).moments)
    rank = rank_of(
        timeline,
        Doubt(modelled=0.3, shift_low_bytes=max(0, peak - elsewhere), shift_high_bytes=max(0, elsewhere - peak)),
        rank=0,
        num_ranks=job.machine.num_gpus,
        pp_rank=0,
        num_gpus=job.machine.num_gpus,
        source="torchtune@0.6.1:recipes/lora_finetune_distributed.py",
        workspace_bytes=workspace_of(job.machine.gpu),
        host_bytes=_sent_bytes(job),
    )
    return TrainingStep(job=replace(job, assumed=(*job.assumed, *assumed)), ranks=(rank,))


def _recomputed(job: TrainingJob) -> tuple[TrainingJob, TrainingJob | None, list[str]]:
    """Return the job as the recipes recompute, where it does not say; the other way; and what was assumed."""
    offloads = ("activations", "cpu") in job.offload
    if offloads and job.recompute.given and job.recompute.kind == "none":
        raise InputError(
            _("torchtune offloads activations only with activation checkpointing"), remedy=_("write recompute: full")
        )
    if job.recompute.given:
        return job, None, []
    full, none = replace(job, recompute=Recompute(kind="full")), replace(job, recompute=Recompute())
    if offloads:
        return full, None, []
    if recomputes(job, count(job.model).total):
        return full, none, [_("activation checkpointing is on, as in the recipes for a model of this size")]
    return none, full, [_("activation checkpointing is off, as in the recipes for a model of this size")]


def walked(job: TrainingJob, rules: Rules, timeline: Timeline) -> Timeline:
    """Walk two steps."""
    sharder: Fsdp2 | Replicated = Fsdp2(timeline) if fsdp.num_ranks(job) > 1 else Replicated(timeline)
    if steps_in_backward(job):
        sharder = InBackward(timeline)
    walk = Walk(plan_of(job, rules), timeline, sharder)
    walk.step()
    walk.step()
    return timeline


def plan_of(job: TrainingJob, rules: Rules) -> StepPlan:
    """Return the plan: FSDP's around torchtune's blocks, with its table of rotations; a paged optimizer has no states.

    Source: torchtune@0.6.1:torchtune/modules/position_embeddings.py:RotaryPositionalEmbeddings.build_rope_cache (fp32,
        one for the longest context); bitsandbytes@0.43.0:bitsandbytes/optim/optimizer.py:get_state_buffer (managed).
    """
    if job.optimizer_impl is None and rules.fused_adamw:
        job = replace(job, optimizer_impl="fused")
    frame = fsdp.Rules(upcast_logits=False, keeps_frozen_inputs=False, whole_scales=False)
    plan = fsdp.plan_of(job, frame, style=style_of(job), loss=lambda last: _loss(job, rules, last))
    graphs = {id(one.graph): one.graph for one in plan.blocks} if job.compile else {}
    compiled = {key: as_compiled(graph) for key, graph in graphs.items()}
    paged = job.optimizer.startswith("paged")
    return replace(
        plan,
        blocks=tuple(replace(one, graph=compiled.get(id(one.graph), one.graph)) for one in plan.blocks),
        weights=(("buffers", _rotations(job)), *plan.weights),
        state_bytes=() if paged else plan.state_bytes,
        stash=STASH if ("activations", "cpu") in job.offload else 0,
        step_work=() if paged else plan.step_work,
        loss_inside=False,
    )


def as_compiled(graph: Graph) -> Graph:
    """Return a block as its compiled backward pass reads it: all that autograd keeps but the activation of the gate.

    Results that a product reads are kept and not made again, whatever makes them; of those that only pointwise
    operations read, the gate's is made again from the gate. Checked against torch 2.13's partitioner: 18.5 hidden
    states of a Llama 3 block with or without adapters, where autograd keeps 22.

    Source: torch@2.13.0:torch/_functorch/partitioners.py:solve_min_cut (ban_recompute_materialized_backward).
    """
    ops = (replace(op, keeps=tuple(name for name in op.keeps if not name.endswith("active"))) for op in graph.ops)
    return replace(graph, ops=tuple(ops))


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


def _sent_bytes(job: TrainingJob) -> int:
    """Bytes of blocks' inputs on the host."""
    if ("activations", "cpu") not in job.offload:
        return 0
    hidden = job.micro_batch_size * job.seq_len * job.model.hidden_size * 2
    return max(0, len(job.model.layers) - STASH) * hidden


def _rotations(job: TrainingJob) -> int:
    """Bytes of cosines and sines for every position of the context: d * 4 each."""
    mixers = [part for part in job.model.layers[0].mixers if isinstance(part, Attention)]
    return job.model.max_position_embeddings * mixers[0].head_dim * 4 if mixers else 0


def _loss(job: TrainingJob, rules: Rules, last: LossPlan) -> LossPlan:
    """Logits in chunks that are all made before the loss; each chunk's loss in fp32; freed before backward.

    A trained head's gradient comes from every chunk, the next of which is made while their sum is held.
    """
    if job.loss == "plain" or (job.loss is None and not rules.chunked_loss):
        return replace(last, returned=not rules.chunked_loss, upcast=True, shift_copies=not rules.chunked_loss)
    ops = tuple(replace(op, grad_work_bytes=op.grad_work_bytes + op.weight_grad_bytes) for op in last.head.ops)
    last = replace(last, head=replace(last.head, ops=ops), num_chunks=NUM_CHUNKS, returned=False)
    return (
        replace(last, kind="compiled_chunks") if job.compile else replace(last, kind="listed_chunks", element_bytes=4)
    )
