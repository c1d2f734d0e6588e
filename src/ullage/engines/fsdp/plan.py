"""A Transformers model under FSDP as a plan of one rank's step."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ullage.account.activations.blocks import Builder, Style, Training
from ullage.account.activations.decoder import Slice, decoder_graph
from ullage.account.activations.graph import Checkpoint, Graph
from ullage.account.activations.log_probs import is_widened, scored_tokens
from ullage.account.fsdp import Group
from ullage.account.optimizer import rule_of, shard_state_bytes
from ullage.account.parameters import Parameter, Role
from ullage.engines.sharded.groups import frame_parameters, of_layer
from ullage.engines.sharded.loss import LossKind, LossPlan
from ullage.engines.sharded.walk import Block, StepPlan
from ullage.spec.training import Lora, TrainingJob, is_headless
from ullage.units import cdiv, dtype_bytes

#: Models that never made fp32 logits: the loss runs in the head's dtype, on a shifted copy.
#: Source: transformers@4.28.1:models/{opt,gpt2,bloom,gpt_neox}/modeling_*.py (no cast before CrossEntropyLoss).
NEVER_UPCAST = ("OPTForCausalLM", "GPT2LMHeadModel", "BloomForCausalLM", "GPTNeoXForCausalLM")
_DATE = re.compile(r"20\d\d-\d\d")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What differs by the date of the libraries.

    Attributes:
        upcast_logits: the model returns fp32 logits and the loss makes a shifted copy (Transformers before 4.45,
            2024-09); since, the loss upcasts and shifts the labels. Source: transformers@4.38.2 and @4.46.0:
            models/llama/modeling_llama.py:LlamaForCausalLM.forward, loss/loss_utils.py:ForCausalLMLoss.
        keeps_frozen_inputs: bitsandbytes' 4-bit product keeps its input (until 0.44, 2024-09).
        has_sdpa: models take PyTorch's attention function by themselves (Transformers 4.36, 2023-12); before, attention
            was written out. Source: transformers@4.36.0:modeling_utils.py:_autoset_attn_implementation.
        whole_scales: the scales of a 4-bit weight are on every rank whole (bitsandbytes); else sharded with the values.
            Source: torchao@0.7.0:torchao/dtypes/nf4tensor.py:fsdp_pre_all_gather.
        repeats_kv: keys and values are copied for every query head before SDPA (until Transformers 4.54, 2025-07-25).
            Source: transformers@4.54.0:src/transformers/integrations/sdpa_attention.py:use_gqa_in_sdpa.
    """

    upcast_logits: bool
    keeps_frozen_inputs: bool
    has_sdpa: bool = True
    whole_scales: bool = True
    repeats_kv: bool = False


def rules_of(version: str) -> Rules:
    """Return the rules of a version that names a date; the newest without one."""
    found = _DATE.search(version)
    date = found.group() if found is not None else "newest"  # after every date
    old = date < "2024-09"
    return Rules(upcast_logits=old, keeps_frozen_inputs=old, has_sdpa=date >= "2023-12", repeats_kv=date < "2025-08")


def lora_of(job: TrainingJob) -> Lora | None:
    """The adapters, if the job has any."""
    return job.lora if job.method in ("lora", "qlora", "dora") else None


def compute_width(job: TrainingJob) -> int:
    """Return the bytes of an activation and of a gathered parameter: 2 where products run in 16 or 8 bits."""
    return max(2, int(dtype_bytes(job.precision.compute)))


def style_of(job: TrainingJob, rules: Rules) -> Style:
    """The implementation of a block as Transformers writes it."""
    return Style(
        norm="fused" if job.compile else "native",
        rope="fused" if job.compile else "halves",
        repeat_kv=rules.repeats_kv and job.attention != "flash",
        scores=job.attention in ("eager", "unfused"),
        element_bytes=compute_width(job),
        grad_bytes=compute_width(job),
        linear_weight_copy_bytes=compute_width(job) if job.base_quantization else 0,
        keeps_frozen_inputs=bool(job.base_quantization) and rules.keeps_frozen_inputs,
    )


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of parameters as stored in a shard, gathered, and reduced."""

    stored: int
    gathered: int
    reduced: int


def sizes_of(job: TrainingJob) -> Sizes:
    """Parameters are gathered in the compute dtype; gradients are reduced in theirs."""
    width = compute_width(job)
    stored = width if job.base_quantization else int(dtype_bytes(job.precision.params))
    return Sizes(stored=stored, gathered=width, reduced=int(dtype_bytes(job.precision.grads)))


def packed_bytes(num_elements: int) -> int:
    """4-bit values packed two to a byte: what FSDP sees of a quantised weight."""
    return cdiv(num_elements, 2)


def quantisation_state_bytes(num_elements: int) -> int:
    """Scales of a 4-bit weight, which FSDP does not shard: n/64 bytes, and 4 bytes per 256 of them.

    Source: bitsandbytes@0.42.0:bitsandbytes/functional.py:quantize_4bit (compress_statistics).
    """
    scales = cdiv(num_elements, 64)
    return scales + 4 * cdiv(scales, 256)


def base_group(job: TrainingJob, name: str, parameters: list[Parameter], *, root: bool = False) -> Group:
    """The unit of a block's (or the root's) own parameters."""
    ranks, sizes = num_ranks(job), sizes_of(job)
    gathered, stored, trained = [], 0, 0
    frozen = lora_of(job) is not None
    for one in parameters:
        count = math.prod(one.shape) * one.copies
        packed = bool(job.base_quantization) and one.role in (Role.LINEAR, Role.EXPERT)
        gathered.append(packed_bytes(count) if packed else count * sizes.gathered)
        stored += cdiv(packed_bytes(count) if packed else count * sizes.stored, ranks)
        trained += 0 if frozen else count
    return Group(
        name=name,
        gathered_bytes=tuple(gathered),
        stored_bytes=stored,
        trained_gathered_bytes=trained * sizes.gathered,
        reduced_bytes=trained * sizes.reduced,
        num_ranks=ranks,
        reshard_after_forward=not root and job.parallel.fsdp != "shard_grad_op",
    )


def num_ranks(job: TrainingJob) -> int:
    """Ranks that share a parameter."""
    parallel = job.parallel
    if parallel.fsdp is None:
        return 1
    return parallel.shard_group_size or parallel.data_parallel_size * parallel.context_parallel_size


def adapter_group(job: TrainingJob, index: int, num_elements: int) -> tuple[Group, ...]:
    """The unit of a block's adapters (in truth one for each small matrix)."""
    if not num_elements:
        return ()
    ranks, width = num_ranks(job), compute_width(job)
    return (
        Group(
            name=f"adapters {index}",
            gathered_bytes=(width * num_elements,),
            stored_bytes=width * cdiv(num_elements, ranks),
            trained_gathered_bytes=width * num_elements,
            reduced_bytes=width * num_elements,
            num_ranks=ranks,
            reshard_after_forward=job.parallel.fsdp != "shard_grad_op",
        ),
    )


def plan_of(
    job: TrainingJob,
    rules: Rules,
    *,
    style: Style | None = None,
    loss: Callable[[LossPlan], LossPlan] | None = None,
    split_root: bool = False,
) -> StepPlan:
    """Return the plan of a rank.

    Args:
        job: the job.
        rules: by the date of the libraries.
        style, loss: where the model is not Transformers'.
        split_root: embedding, and norm with head, are units of their own instead of the root's.
    """
    model, lora = job.model, lora_of(job)
    training = Training(base=lora is None, lora=lora)
    style = style or style_of(job, rules)
    slice_ = Slice(batch=job.micro_batch_size, seq_len=cdiv(job.seq_len, job.parallel.context_parallel_size))
    blocks = _blocks(job, style, training, slice_)
    weights = []
    for index, block in enumerate(blocks):
        weights += _weights(job, rules, block.group, list(of_layer(model, index)))
        weights += [("weights", one.stored_bytes) for one in block.more if not _offloaded(job)]
    frame = [one for _section, one in frame_parameters(model)]
    root = base_group(job, "root", frame, root=True)
    weights += _weights(job, rules, root, [])
    front = base_group(job, "embedding", frame[:1]) if split_root else root
    back = base_group(job, "norm and head", frame[1:], root=True) if split_root else root
    groups = [one for block in blocks for one in (block.group, *block.more)] + [root]
    trained = [group for group in groups if group.reduced_bytes]
    shards = [cdiv(group.trained_gathered_bytes // compute_width(job), group.num_ranks) for group in trained]
    states = tuple(shard_state_bytes(job.optimizer, shard, job.precision.moments) for shard in shards)
    offloaded = _offloaded(job) or ("optimizer", "cpu") in job.offload
    last = hf_loss(job, rules, style, training, slice_)
    foreach = job.optimizer_impl in (None, "foreach") and not offloaded and rule_of(job.optimizer).temporaries
    return StepPlan(
        blocks=blocks,
        front=front,
        back=back,
        hidden_bytes=slice_.num_tokens * model.hidden_size * style.element_bytes,
        embedding_grad_bytes=math.prod(frame[0].shape) * compute_width(job) if lora is None else 0,
        loss=loss(last) if loss else last,
        weights=tuple(weights),
        setup=(2 * sum(root.gathered_bytes),),
        state_bytes=() if offloaded or not any(states) else states,
        step_work=tuple(cdiv(group.reduced_bytes, group.num_ranks) for group in trained) if foreach else (),
        num_micro_batches=job.grad_accum,
        grads_freed_before_forward=False,
        input_grads=True,
        loss_inside=True,
    )


def _blocks(job: TrainingJob, style: Style, training: Training, slice_: Slice) -> tuple[Block, ...]:
    """The blocks with their units and those of their adapters."""
    blocks = []
    for index, layer in enumerate(job.model.layers):
        graph = decoder_graph(layer, job.model.hidden_size, slice_, style, training)
        added = 0 if training.base else sum(op.weight_grad_bytes for op in graph.ops) // style.grad_bytes
        blocks.append(
            Block(
                graph=graph,
                group=base_group(job, f"layer {index}", list(of_layer(job.model, index))),
                more=adapter_group(job, index, added),
                checkpoint=_checkpoint(job, index),
            )
        )
    return tuple(blocks)


def _offloaded(job: TrainingJob) -> bool:
    return ("params", "cpu") in job.offload


def _checkpoint(job: TrainingJob, index: int) -> Checkpoint | None:
    if job.recompute.kind in ("full", "selective") and index % job.recompute.every == 0:
        return Checkpoint(fused=job.compile)
    return None


def _weights(job: TrainingJob, rules: Rules, group: Group, parameters: list[Parameter]) -> list[tuple[str, int]]:
    """What stays on the device of a unit: its shard, and the scales of quantised weights."""
    found = [] if _offloaded(job) else [("weights", group.stored_bytes)]
    if job.base_quantization:
        linear = [one for one in parameters if one.role in (Role.LINEAR, Role.EXPERT)]
        ranks = 1 if rules.whole_scales else num_ranks(job)
        sizes = [quantisation_state_bytes(math.prod(one.shape) * one.copies) for one in linear]
        found += [("weights", cdiv(size, ranks)) for size in sizes]
    return found


def hf_loss(job: TrainingJob, rules: Rules, style: Style, training: Training, slice_: Slice) -> LossPlan:
    """Final norm, head and loss as Transformers writes them; the head is not quantised."""
    model, hidden = job.model, slice_.num_tokens * job.model.hidden_size * style.element_bytes
    plain = Style(norm=style.norm, rope=style.rope, element_bytes=style.element_bytes, grad_bytes=style.grad_bytes)
    norm = Builder(style=plain, training=training, num_tokens=slice_.num_tokens)
    norm.norm("normed", "x", model.hidden_size)
    tokens = scored_tokens(job) if job.rlhf is not None else slice_.num_tokens
    head = Builder(style=plain, training=training, num_tokens=tokens)
    rows = 1 if is_headless(job) else model.vocab_size
    head.linear("logits", "x", model.hidden_size, rows, names=("lm_head",))
    kinds: dict[str | None, LossKind] = {"chunked": "chunked", "fused": "fused", "liger": "fused", "tiled": "tiled"}
    never = (rules.upcast_logits and model.architecture in NEVER_UPCAST) or style.element_bytes > 2
    found = LossPlan(
        kind=kinds.get(job.loss, "native" if never else "plain"),
        norm=Graph(ops=tuple(norm.ops), input_bytes=hidden),
        head=Graph(ops=tuple(head.ops), input_bytes=hidden),
        num_tokens=tokens,
        vocab=model.vocab_size,
        element_bytes=style.element_bytes,
        num_chunks=8,
        upcast=rules.upcast_logits and not never,
        shift_copies=rules.upcast_logits,
        returned=True,
    )
    return found if job.rlhf is None else _on_log_probs(job, found)


def _on_log_probs(job: TrainingJob, plan: LossPlan) -> LossPlan:
    """Return the loss of a policy: on log-probabilities, or on scores of a scalar head."""
    style = job.rlhf.log_probs if job.rlhf else ""
    kinds: dict[str, Any] = {name: name for name in ("rows", "full", "tiled", "unused", "inplace")}
    return replace(
        plan,
        kind=kinds.get(style, "native"),
        vocab=1 if style == "none" else plan.vocab,
        num_rows=max(1, job.micro_batch_size),
        widened=style == "unused" or (style != "none" and is_widened(job)),
        upcast=False,
        shift_copies=False,
        returned=False,
    )
