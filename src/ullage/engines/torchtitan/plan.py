"""A torchtitan job as a plan of one rank's step."""

from __future__ import annotations

from dataclasses import replace

from ullage.account.activations.blocks import Builder, Style, Training
from ullage.account.activations.decoder import Slice, decoder_graph, rearranged_bytes
from ullage.account.activations.graph import Checkpoint, Graph, Op, Policy
from ullage.account.fsdp import Group
from ullage.account.optimizer import shard_state_bytes
from ullage.engines.sharded.groups import Formats, Spread, frame_parameters, group_of, of_layer
from ullage.engines.sharded.loss import LossKind, LossPlan
from ullage.engines.sharded.walk import Block, StepPlan, Vocabulary
from ullage.engines.torchtitan.defaults import Rules
from ullage.spec import model as spec
from ullage.spec.training import TrainingJob
from ullage.units import cdiv, dtype_bytes

#: Receive buffers laid out one by one; beyond that they are one block: the same bytes in bounded time.
MAX_BUFFERS_APART = 1024


def every_second_matmul(op: Op, count: int) -> bool:
    """Op-wise selective checkpointing: every second matmul is made again, attention and reduce-scatters are kept.

    Source: torchtitan@9dec370:torchtitan/parallelisms/parallelize_llama.py:_get_custom_policy.
    """
    if op.kind == "mm":
        return count % 2 == 1
    return op.kind == "sdpa" or (op.kind == "comm" and op.name.startswith(("scattered", "moe")))


def without_attention(op: Op, count: int) -> bool:
    """The same where attention's kernel is not on the list (cuDNN before 2025-12)."""
    return op.kind != "sdpa" and every_second_matmul(op, count)


def every_matmul(op: Op, count: int) -> bool:
    """What a compiled block keeps by itself: results of matmuls and attention; pointwise results are made again.

    Source: torch@2.13.0:torch/_functorch/partitioners.py:min_cut_rematerialization_partition.
    """
    return op.kind in ("mm", "sdpa", "comm")


def style_of(job: TrainingJob, rules: Rules) -> Style:
    """The implementation of a block."""
    fp8 = job.precision.compute.startswith("float8") or job.precision.fp8_recipe is not None
    return Style(
        norm="fused" if rules.fused_norm or job.compile else "native",
        rope="fused" if job.compile else "complex",
        repeat_kv=rules.repeats_kv,
        fused_qkv=rules.fused_qkv,
        linear_weight_copy_bytes=1 if fp8 else 0,
    )


def checkpoint_of(job: TrainingJob, rules: Rules, index: int) -> Checkpoint | None:
    """How a block is checkpointed."""
    kind = job.recompute.kind
    if kind == "full" and (index % job.recompute.every == 0):
        return Checkpoint(fused=job.compile)
    if kind == "selective":
        return Checkpoint(policy=_kept(job, rules), fused=job.compile)
    return Checkpoint(policy=every_matmul, fused=True) if job.compile else None


def _kept(job: TrainingJob, rules: Rules) -> Policy:
    """Which results op-wise checkpointing keeps."""
    gpu = job.machine.gpu
    newest = (gpu.compute_capability or (0, 0)) >= (10, 0)
    cudnn = gpu.vendor != "amd" and job.attention != "flash" and (newest or rules.cudnn_first)
    return without_attention if cudnn and not rules.saves_cudnn else every_second_matmul


def loss_kind(job: TrainingJob, rules: Rules) -> LossKind:
    """Which loss runs."""
    if job.loss in ("chunked", "fused", "liger"):
        return "chunked"
    if job.loss is None and rules.chunked_loss:
        return "chunked"
    if job.compile and rules.loss_compiled:
        return "compiled"
    return "vocab_parallel" if job.parallel.tensor_parallel_size > 1 else "plain"


def spread_of(job: TrainingJob) -> Spread:
    """Who shares the parameters: FSDP ranks are data- and context-parallel ranks."""
    parallel = job.parallel
    ranks = parallel.shard_group_size or parallel.data_parallel_size * parallel.context_parallel_size
    expert = max(1, parallel.expert_parallel_size)
    return Spread(
        tensor_parallel_size=parallel.tensor_parallel_size,
        expert_parallel_size=expert,
        num_ranks=ranks,
        num_expert_ranks=max(1, ranks * parallel.tensor_parallel_size // expert),
    )


def formats_of(job: TrainingJob) -> Formats:
    """Bytes of parameters at rest, gathered and reduced: fp32, bf16, fp32 by default."""
    stored = int(dtype_bytes(job.precision.params))
    return Formats(stored=stored, gathered=2, reduced=int(dtype_bytes(job.precision.grads)))


def slice_of(job: TrainingJob, rules: Rules) -> Slice:
    """What a rank works on."""
    parallel = job.parallel
    return Slice(
        batch=job.micro_batch_size,
        seq_len=cdiv(job.seq_len, parallel.context_parallel_size),
        tensor_parallel_size=parallel.tensor_parallel_size,
        sequence_parallel=parallel.tensor_parallel_size > 1,
        rearranges=parallel.tensor_parallel_size > 1,
        gathered_copies=job.micro_batch_size > 1 or not rules.gathers_in_place,
        holds_inputs=parallel.tensor_parallel_size > 1 and not job.compile,
        expert_parallel_size=parallel.expert_parallel_size,
        expert_load=job.expert_load,
    )


def plan_of(job: TrainingJob, rules: Rules, stage: tuple[int, int, bool, bool], in_flight: int) -> StepPlan:
    """Return the plan of a pipeline stage: layers ``[first, last)``, whether it embeds, whether it has the head."""
    _first, _last, embeds, has_head = stage
    model, spread, formats = job.model, spread_of(job), formats_of(job)
    style, slice_ = style_of(job, rules), slice_of(job, rules)
    blocks = _blocks(job, rules, stage)
    groups = [group for block in blocks for group in (block.group, *block.more)]
    front, back = _frame_groups(job, rules, spread, formats, embeds, has_head)
    groups += [front] if front is back and front else [one for one in (front, back) if one]
    weights = tuple(("weights", group.stored_bytes) for group in groups)
    hidden = slice_.num_split_tokens * model.hidden_size * style.element_bytes
    states = tuple(
        shard_state_bytes(job.optimizer, group.stored_bytes // formats.stored, job.precision.moments)
        for group in groups
    )
    rows = cdiv(model.vocab_size, spread.tensor_parallel_size)
    return StepPlan(
        blocks=blocks,
        front=front,
        back=back,
        hidden_bytes=hidden,
        embedding_grad_bytes=rows * model.hidden_size * 2 if embeds else 0,
        vocabulary=_vocabulary(job, slice_, style) if embeds else None,
        loss=_loss(job, rules, style, slice_) if has_head else None,
        weights=(*weights, *_received(job, embeds, has_head, hidden), ("buffers", _rope_bytes(model, job.seq_len))),
        state_bytes=states,
        step_work=() if job.optimizer_impl in (None, "fused") else tuple(group.stored_bytes for group in groups),
        clip_work=(),
        num_micro_batches=max(job.grad_accum, in_flight),
        in_flight=in_flight,
        reduces_once=job.parallel.pipeline_parallel_size > 1,
    )


def _blocks(job: TrainingJob, rules: Rules, stage: tuple[int, int, bool, bool]) -> tuple[Block, ...]:
    """The stage's blocks with their units; a pipeline keeps units gathered, and so did the last block's of old."""
    first, last = stage[:2]
    model, spread, formats = job.model, spread_of(job), formats_of(job)
    style, slice_ = style_of(job, rules), slice_of(job, rules)
    kept = job.parallel.pipeline_parallel_size > 1 or job.parallel.fsdp == "shard_grad_op"
    blocks = []
    for index in range(first, last):
        reshard = not kept and (rules.split_root or index < last - 1)
        group = group_of(
            f"layer {index}", of_layer(model, index), spread, formats, experts=False, reshard_after_forward=reshard
        )
        blocks.append(
            Block(
                graph=decoder_graph(model.layers[index], model.hidden_size, slice_, style, Training()),
                group=group,
                more=_expert_group(job, index, spread, formats, reshard),
                checkpoint=checkpoint_of(job, rules, index),
            )
        )
    return tuple(blocks)


def _received(job: TrainingJob, embeds: bool, has_head: bool, hidden_bytes: int) -> list[tuple[str, int]]:
    """A stage's buffers for what it receives: activations and gradients of every micro-batch.

    Source: torch@2.13.0:torch/distributed/pipelining/stage.py:_create_act_recv_info, _create_grad_recv_info.
    """
    if job.parallel.pipeline_parallel_size == 1:
        return []
    number = job.grad_accum * (int(not embeds) + int(not has_head))
    apart = min(number, MAX_BUFFERS_APART)
    rest = [("pipeline_buffers", (number - apart) * hidden_bytes)] if number > apart else []
    return [("pipeline_buffers", hidden_bytes)] * apart + rest


def _expert_group(job: TrainingJob, index: int, spread: Spread, formats: Formats, reshard: bool) -> tuple[Group, ...]:
    """Routed experts are a unit of their own, over fewer ranks with expert parallelism."""
    if not any(isinstance(part, spec.MoEFFN) for part in job.model.layers[index].ffns):
        return ()
    parameters = of_layer(job.model, index)
    return (group_of(f"experts {index}", parameters, spread, formats, experts=True, reshard_after_forward=reshard),)


def _frame_groups(
    job: TrainingJob, rules: Rules, spread: Spread, formats: Formats, embeds: bool, has_head: bool
) -> tuple[Group | None, Group | None]:
    """Groups of the embedding and of norm and head: one and the same before the root was split."""
    frame = frame_parameters(job.model)
    pipelined = job.parallel.pipeline_parallel_size > 1
    first = [one for section, one in frame if section == "embedding"]
    rest = [one for section, one in frame if section != "embedding"]
    if not rules.split_root:
        chosen = (first if embeds else []) + (rest if has_head else [])
        root = group_of("root", chosen, spread, formats, reshard_after_forward=False) if chosen else None
        return (root, root)
    front = group_of("embedding", first, spread, formats, reshard_after_forward=not pipelined) if embeds else None
    back = group_of("norm and head", rest, spread, formats, reshard_after_forward=False) if has_head else None
    return (front, back)


def _loss(job: TrainingJob, rules: Rules, style: Style, slice_: Slice) -> LossPlan:
    """Final norm, head and loss of a micro-batch."""
    model, tensor = job.model, slice_.tensor_parallel_size
    vocab = cdiv(model.vocab_size, tensor)
    norm = Builder(style=style, training=Training(), num_tokens=slice_.num_split_tokens)
    norm.norm("normed", "x", model.hidden_size)
    hidden = slice_.num_split_tokens * model.hidden_size * style.element_bytes
    head_style = replace(style, linear_weight_copy_bytes=0)
    head = Builder(style=head_style, training=Training(), num_tokens=slice_.num_tokens)
    source = "x"
    if tensor > 1:
        whole = slice_.num_tokens * model.hidden_size * style.element_bytes
        gathers, scatters = rearranged_bytes(slice_, whole)
        source = head.op("gathered", whole, ("x",), kind="comm", work_bytes=gathers, grad_work_bytes=scatters)
    head.linear("logits", source, model.hidden_size, vocab)
    return LossPlan(
        kind=loss_kind(job, rules),
        norm=Graph(ops=tuple(norm.ops), input_bytes=hidden),
        head=Graph(ops=tuple(head.ops), input_bytes=hidden),
        num_tokens=slice_.num_tokens,
        vocab=vocab,
        element_bytes=style.element_bytes,
        num_chunks=8,
        compiled=job.compile and rules.loss_compiled,
    )


def _vocabulary(job: TrainingJob, slice_: Slice, style: Style) -> Vocabulary | None:
    """What an embedding split by rows takes: each rank looks all tokens up, and makes the gradient of all rows."""
    if slice_.tensor_parallel_size == 1:
        return None
    hidden = job.model.hidden_size * style.element_bytes
    gathers, scatters = rearranged_bytes(slice_, slice_.num_tokens * hidden)
    return Vocabulary(
        looked_up_bytes=slice_.num_tokens * hidden,
        scatter_bytes=scatters,
        gather_bytes=gathers,
        gradient_bytes=job.model.vocab_size * hidden,
    )


def _rope_bytes(model: spec.Model, seq_len: int) -> int:
    """The table of complex rotations: s * d/2 * 8 bytes."""
    for part in model.layers[0].mixers:
        if isinstance(part, spec.Attention):
            return seq_len * part.head_dim * 4
        if isinstance(part, spec.LatentAttention):
            return seq_len * part.qk_rope_head_dim * 4
    return 0
