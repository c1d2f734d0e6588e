"""A litgpt job as a plan of one rank's step."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ullage.account.activations.blocks import Builder, Style, Training
from ullage.account.activations.decoder import Slice, decoder_graph
from ullage.account.activations.graph import Checkpoint, Graph
from ullage.account.fsdp import Group
from ullage.account.parameters import Parameter, Role
from ullage.engines.sharded.groups import Formats, Spread, frame_parameters, group_of, of_layer
from ullage.engines.sharded.loss import LossPlan
from ullage.engines.sharded.walk import Block, StepPlan
from ullage.spec import model as spec
from ullage.spec.training import Lora, TrainingJob
from ullage.units import cdiv, dtype_bytes, round_up

CHUNK_TOKENS = 128
OLD_DROPOUT = 0.05
#: Published figures name this commit of 2023-10-16, but appeared on 2023-10-27 and hold what fp32 norms hold.
LABELS = {"8641822": "2023-10-27"}
#: First block with an adapter. Source: litgpt@26857050:litgpt/adapter.py:Config.adapter_start_layer.
ADAPTER_START = 2
_DATE = re.compile(r"20\d\d-\d\d(?:-\d\d)?")
#: bitsandbytes: 4-bit values, a scale per 64, scales of scales per 256.
BLOCK, NESTED = 64, 256


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What differs by version.

    Attributes:
        narrow_norm: RMSNorm in the compute dtype; in fp32 since 2023-10-24 (litgpt@6178c7cc:lit_gpt/rmsnorm.py).
        default_dropout: adapters have dropout although nothing says so: a constant of the 2023 scripts.
            Source: litgpt@8641822:finetune/lora.py:lora_dropout.
        fused_optimizer: AdamW in one kernel; before, the foreach form with temporaries.
        longest_first: the first micro-batch is the longest sample; later ones are shorter.
            Source: litgpt@8641822:finetune/lora.py:train.
        stable_embedding: with a quantised base the embedding is replaced by a trained one, and the old one stays.
            Source: litgpt@ae798aba (2024-10-04):litgpt/finetune/lora.py:main.
    """

    narrow_norm: bool
    default_dropout: float
    fused_optimizer: bool
    longest_first: bool
    stable_embedding: bool


def rules_of(version: str) -> Rules:
    """Return the rules of a version: the lit-gpt of 2023, or litgpt since."""
    found = _DATE.search(version)
    labelled = next((date for label, date in LABELS.items() if label in version), None)
    date = labelled or (found.group() if found else "")
    old = date.startswith("2023")
    return Rules(
        narrow_norm=old and date < "2023-10-24",
        default_dropout=OLD_DROPOUT if old else 0.0,
        fused_optimizer=not old,
        longest_first=old,
        stable_embedding=date >= "2024-10",
    )


def lora_of(job: TrainingJob) -> Lora | None:
    """The low-rank pairs of the job, under litgpt's names of the modules."""
    if job.lora is None or job.method not in ("lora", "qlora"):
        return None
    default = rules_of(job.engine_version).default_dropout
    return replace(job.lora, dropout=job.lora.dropout or default)


def training_of(job: TrainingJob) -> Training:
    """What is trained in a block."""
    if job.method == "llama_adapter":
        return Training(base=False, adapter="prefix")
    if job.method == "llama_adapter_v2":
        return Training(base=False, adapter="scale")
    lora = lora_of(job)
    return Training(base=lora is None, lora=lora)


def style_of(job: TrainingJob, rules: Rules) -> Style:
    """The implementation of a block: fused q, k, v, keys and values repeated, fp32 rotation tables."""
    return Style(
        norm="narrow" if rules.narrow_norm else "late_cast",
        rope="halves_fp32",
        repeat_kv=True,
        rope_copy=True,
        fused_qkv=True,
        gates_first=True,
        linear_weight_copy_bytes=4 if job.base_quantization else 0,
        keeps_frozen_inputs=bool(job.base_quantization),
    )


def stored_bytes(job: TrainingJob, parameter: Parameter, num_elements: int) -> int:
    """Bytes of a parameter at rest: linear layers in 4 bits where asked for, the head too.

    Formula: NF4 n/2 + 4*n/64; with double quantisation n/2 + n/64 + 4*n/(64*256).
    Source: bitsandbytes@0.42.0:bitsandbytes/functional.py:quantize_4bit; lightning@2.1:
        fabric/plugins/precision/bitsandbytes.py:BitsandbytesPrecision.convert_module (every Linear).
    """
    linear = parameter.role is Role.LINEAR or "lm_head" in parameter.name
    if not job.base_quantization or not linear:
        return num_elements * int(dtype_bytes("bfloat16"))
    if job.base_quantization.startswith("int8"):
        return num_elements
    scales = cdiv(num_elements, BLOCK)
    nested = ("double_quantization", "true") in job.flags or job.base_quantization.endswith("dq")
    return cdiv(num_elements, 2) + (scales + 4 * cdiv(scales, NESTED) if nested else 4 * scales)


def adapter_bytes(job: TrainingJob) -> tuple[int, int]:
    """Trained parameters that are added to a block, and to the head: numbers of elements."""
    training, model = training_of(job), job.model
    style = style_of(job, rules_of(job.engine_version))
    one = Slice(batch=1, seq_len=1)
    if training.base:
        return (0, 0)
    if training.adapter == "prefix":
        return (10 * model.hidden_size + _heads(model), 0)
    graph = decoder_graph(model.layers[0], model.hidden_size, one, style, training)
    added = sum(op.weight_grad_bytes for op in graph.ops) // style.grad_bytes
    if training.adapter == "scale":
        added = sum(2 * op.num_bytes // style.element_bytes for op in graph.ops if op.name.endswith(".shifted"))
    head = 0
    if training.lora is not None and training.lora_on("head"):
        head = training.lora.rank * (model.hidden_size + vocab_of(model))
    return (added, head)


def _heads(model: spec.Model) -> int:
    for part in model.layers[0].mixers:
        if isinstance(part, spec.Attention):
            return part.num_heads
    return 0


def vocab_of(model: spec.Model) -> int:
    """Rows of embedding and head, padded to 64 where the checkpoint is not padded.

    Source: litgpt@26857050:litgpt/config.py:Config.__post_init__ (padding_multiple).
    """
    return round_up(model.vocab_size, 64)


def plan_of(job: TrainingJob, rules: Rules, num_ranks: int) -> StepPlan:
    """Return the plan of a rank; ``num_ranks`` above 1 shards blocks over FSDP2 with full recompute."""
    model, training = job.model, training_of(job)
    style = style_of(job, rules)
    slice_ = Slice(batch=job.micro_batch_size, seq_len=job.seq_len)
    checkpoint = Checkpoint() if job.recompute.kind == "full" else None
    spread, formats = Spread(num_ranks=num_ranks), Formats(stored=2, gathered=2, reduced=2)
    added, added_head = adapter_bytes(job)
    blocks, weights = [], []
    for index, layer in enumerate(model.layers):
        parameters = of_layer(model, index)
        group = group_of(f"layer {index}", parameters, spread, formats, trained=lambda one: training.base)
        if not training.base:
            group = replace(group, reduced_bytes=added * 2, trained_gathered_bytes=added * 2)
        blocks.append(
            Block(
                graph=decoder_graph(layer, model.hidden_size, slice_, style, training),
                group=group,
                checkpoint=checkpoint,
                without_grad=training.adapter == "prefix" and index < ADAPTER_START,
            )
        )
        weights += [("weights", size) for size in _resident(job, parameters, num_ranks)]
        weights.append(("weights", 2 * cdiv(added, num_ranks)))
    frame = [one for _section, one in frame_parameters(model)]
    if model.tied_embeddings:  # litgpt stores a head of its own
        frame.append(Parameter(name="lm_head.weight", shape=(model.vocab_size, model.hidden_size), role=Role.EMBEDDING))
    root = group_of("root", frame, spread, formats, trained=lambda one: training.base, reshard_after_forward=False)
    weights += [("weights", size) for size in _resident(job, frame, num_ranks)]
    weights.append(("weights", 2 * cdiv(added_head, num_ranks)))
    weights.append(("buffers", 2 * job.seq_len * _rotary(model) * 4))
    if job.base_quantization and rules.stable_embedding:
        table = vocab_of(model) * model.hidden_size * 2
        weights += [("weights", table), ("gradients", table)]
    return StepPlan(
        blocks=tuple(blocks),
        front=root,
        back=root,
        hidden_bytes=slice_.num_tokens * model.hidden_size * 2,
        embedding_grad_bytes=vocab_of(model) * model.hidden_size * 2 if training.base else 0,
        loss=_loss(job, style, training),
        weights=tuple(weights),
        state_bytes=_states(job, [block.group for block in blocks] + [root], added_head, num_ranks),
        step_work=_step_work(job, rules, blocks),
        num_micro_batches=1 if rules.longest_first else max(job.grad_accum, 2),
        grads_freed_before_forward=False,
        input_grads=training.base,
    )


def _resident(job: TrainingJob, parameters: tuple[Parameter, ...] | list[Parameter], num_ranks: int) -> list[int]:
    """Bytes of each parameter on a rank."""
    sizes = []
    for one in parameters:
        count = one.copies
        for length in one.shape:
            count *= length
        sizes.append(stored_bytes(job, one, cdiv(count, num_ranks)))
    return sizes


def _states(job: TrainingJob, groups: list[Group], added_head: int, num_ranks: int) -> tuple[int, ...]:
    """Two moments in the parameters' dtype; a paged optimizer's states are not the allocator's.

    Source: litgpt@26857050:litgpt/utils.py:instantiate_bnb_optimizer (PagedAdamW with a quantised base).
    """
    if job.base_quantization or job.optimizer.startswith("paged"):
        return ()
    if job.optimizer == "sgd":
        return ()
    moments = int(dtype_bytes(job.precision.moments))
    trained = [group.reduced_bytes // 2 for group in groups]
    trained.append(added_head)
    return tuple(2 * moments * cdiv(size, num_ranks) for size in trained)


def _step_work(job: TrainingJob, rules: Rules, blocks: list[Block]) -> tuple[int, ...]:
    """Temporaries of AdamW's foreach form: one copy of the second moments."""
    if rules.fused_optimizer or job.base_quantization:
        return ()
    return tuple(block.group.reduced_bytes for block in blocks)


def _rotary(model: spec.Model) -> int:
    for part in model.layers[0].mixers:
        if isinstance(part, spec.Attention):
            return part.rotary_dim or part.head_dim
    return 0


def _loss(job: TrainingJob, style: Style, training: Training) -> LossPlan:
    """Final norm, head in chunks of 128 tokens that all stay, loss chunk by chunk; logits are held until the next ones.

    Source: litgpt@26857050:litgpt/finetune/lora.py:fit, litgpt/utils.py:chunked_cross_entropy.
    """
    model, num_tokens = job.model, job.micro_batch_size * job.seq_len
    vocab, hidden = vocab_of(model), num_tokens * model.hidden_size * style.element_bytes
    norm = Builder(style=style, training=training, num_tokens=num_tokens)
    norm.norm("normed", "x", model.hidden_size, kind=model.final_norms[0].kind if model.final_norms else "rms")
    head = Builder(style=style, training=training, num_tokens=num_tokens)
    head.linear("logits", "x", model.hidden_size, vocab, names=("head",))
    return LossPlan(
        kind="listed_chunks",
        norm=Graph(ops=tuple(norm.ops), input_bytes=hidden),
        head=Graph(ops=tuple(head.ops), input_bytes=hidden),
        num_tokens=num_tokens,
        vocab=vocab,
        element_bytes=4,
        widened=True,
        num_chunks=cdiv(job.seq_len, CHUNK_TOKENS),
        logits_held=True,
    )
