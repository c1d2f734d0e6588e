"""The Trainer under FSDP (flat parameters, one unit per decoder layer, the rest in the root unit)."""

from __future__ import annotations

from dataclasses import replace

from ullage.account.sharding import whole
from ullage.account.weights import weights_term
from ullage.engines.hf_trainer.states import NF4, base_quantization, wide_experts
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.ledger import Certainty, Term, exact, ranged
from ullage.spec import model as spec
from ullage.spec.training import TrainingJob

#: Trained layers: the unsharded gradient and the padded copy that the reduction sends.
#: Source: torch@2.4.1:distributed/fsdp/_runtime_utils.py:_post_backward_hook.
GRADIENT_COPIES = 2


class Unsharded(Frozen):
    """Unsharded parameters: of the root unit (embedding, head, final norm), and of the largest layer."""

    root_bytes: int
    layer_bytes: int


def is_sharded(job: TrainingJob) -> bool:
    """Return whether parameters, gradients and states are spread over the ranks."""
    return job.parallel.fsdp == "full_shard" and num_shards(job) > 1


def is_fsdp2(job: TrainingJob) -> bool:
    """Return whether FSDP 2 is named; its own rules follow no 8-bit base."""
    return "fsdp2" in job.engine_version.lower() and is_sharded(job) and job.base_quantization in (None, "nf4", "fp4")


def as_fsdp2(job: TrainingJob) -> TrainingJob:
    """Return the job for the rules of FSDP 2, which the Trainer hands its model to where Accelerate is told so.

    States in 8 or 4 bits are counted as 8 bits without scales; checkpoints on the host as if they were on the GPU.
    Source: accelerate@1.13.0:utils/fsdp_utils.py:fsdp2_prepare_model.
    """
    narrow = {"adamw_8bit": "int8", "adamw_4bit": "int8"}.get(job.optimizer)
    assumed = job.assumed
    if any(what == "activations" for what, _where in job.offload):
        assumed += (_("under FSDP 2 checkpoints on the host are counted as if they were on the GPU"),)
    return replace(
        job,
        engine="fsdp2",
        optimizer="adamw" if narrow else job.optimizer,
        precision=replace(job.precision, moments=narrow) if narrow else job.precision,
        offload=tuple(pair for pair in job.offload if pair[0] != "activations"),
        assumed=assumed,
    )


def num_shards(job: TrainingJob) -> int:
    """Return the ranks that share one copy."""
    return job.parallel.shard_group_size or job.parallel.data_parallel_size


def shard(term: Term, ranks: int) -> Term:
    """Return one rank's part of a term; flat parameters are padded to a multiple of the ranks."""
    return replace(
        term,
        bytes=-(-term.bytes // ranks),
        low_bytes=-(-term.low_bytes // ranks),
        high_bytes=-(-term.high_bytes // ranks),
        formula=f"({term.formula}) / {ranks}",
        children=tuple(shard(child, ranks) for child in term.children) if _divides(term, ranks) else (),
    )


def sharded_weights(job: TrainingJob, weights: Term) -> Term:
    """Return one rank's weights: packed values are spread, the scales of a 4-bit base stay whole on every rank.

    So do GPTQ's scales and group numbers, which are buffers; its packed values and zeros are made parameters.
    Source: fms-acceleration@876e2ed6:plugins/accelerated-peft/src/fms_acceleration_peft/autogptq_utils.py
        (PATCH_FOR_FSDP_TRITON_V2); transformers@4.45.2:quantizers/quantizer_bnb_4bit.py (bnb_4bit_quant_storage: the
        packed tensor is a flat parameter; its quant_state is an attribute, which FSDP does not see).
    Known error: published bytes of 4 ranks show half of the scales more.
    """
    ranks = num_shards(job)
    found = shard(weights, ranks)
    if job.base_quantization == "gptq":
        buffers = gptq_buffer_bytes(job)
        extra = buffers - buffers // ranks
        return replace(
            found,
            bytes=found.bytes + extra,
            low_bytes=found.low_bytes + extra,
            high_bytes=found.high_bytes + extra,
            children=(),
            formula=f"{found.formula} + whole scales and group numbers",
        )
    if job.base_quantization not in ("nf4", "fp4"):
        return found
    scales = scale_bytes(job, weights.bytes)
    extra = scales - scales // ranks
    return replace(
        found,
        bytes=found.bytes + extra,
        low_bytes=found.low_bytes + extra,
        high_bytes=found.high_bytes + 6 * extra,
        children=(),
        formula=f"{found.formula} + whole scales",
    )


def gptq_buffer_bytes(job: TrainingJob) -> int:
    """Return the bytes of GPTQ's scales and group numbers: the differences of wider scales and of no numbers."""
    share = replace(whole(job.model), mtp=False, towers=False)
    quantization = base_quantization(job)
    stored = quantization.rules[-1].format if quantization is not None else None
    if quantization is None or stored is None:
        return 0
    sizes = []
    for one in (stored, replace(stored, scale_dtype="float32"), replace(stored, column_index_bytes=0)):
        rules = (*quantization.rules[:-1], spec.QuantRule(pattern="", format=one))
        changed = replace(quantization, rules=rules)
        sizes.append(weights_term(job.model, share, quantization=changed, dtype=job.precision.compute).bytes)
    return max(0, sizes[1] - sizes[0]) + max(0, sizes[0] - sizes[2])


def scale_bytes(job: TrainingJob, whole_bytes: int) -> int:
    """Return the bytes of all scales of a 4-bit base, of its weights' bytes."""
    packed = spec.QuantRule(pattern="", format=replace(NF4, block=None, scales_per_scale=0))
    values = spec.Quantization(method="nf4", rules=(*wide_experts(job), packed))
    share = replace(whole(job.model), mtp=False, towers=False)
    without = weights_term(job.model, share, quantization=values, dtype=job.precision.compute).bytes
    return max(0, whole_bytes - without)


def _divides(term: Term, ranks: int) -> bool:
    """Return whether the parts of a term still add up after each was rounded up."""
    return bool(term.children) and all(
        value % ranks == 0 for child in term.children for value in (child.bytes, child.low_bytes, child.high_bytes)
    )


def unsharded(job: TrainingJob) -> Unsharded:
    """Return what is gathered: the root unit stays gathered from the forward to the end of the backward.

    Source: torch@2.4.1:distributed/fsdp/_runtime_utils.py:_root_pre_forward, _pre_backward_hook (the root is not
        resharded after forward).
    """
    model = job.model
    dtype = job.precision.params if job.base_quantization is None else job.precision.compute
    quantization = base_quantization(job)
    frame = replace(whole(model), layers=(0, 0), mtp=False, towers=False)
    root = weights_term(model, frame, quantization=quantization, dtype=dtype).bytes
    largest = 0
    seen: set[spec.Layer] = set()
    for index, layer in enumerate(model.layers):
        if layer not in seen:
            seen.add(layer)
            one = replace(frame, layers=(index, index + 1), embedding=False, head=False, final=False)
            largest = max(largest, weights_term(model, one, quantization=quantization, dtype=dtype).bytes)
    return Unsharded(root_bytes=root, layer_bytes=largest)


def gathered_terms(job: TrainingJob, *, trained: bool, backward: bool) -> tuple[Term, ...]:
    """Return the unsharded parameters, and the gradients that wait to be reduced, of one moment.

    Formula: root unit + one layer (up to two with prefetch); backward of trained layers: two copies of one layer's
        gradients.
    """
    if not is_sharded(job):
        return ()
    found = unsharded(job)
    parameters = ranged(
        "unsharded_parameters",
        found.root_bytes + found.layer_bytes,
        low=found.root_bytes,
        high=found.root_bytes + 3 * found.layer_bytes,
        formula="root unit + one layer",
        source="torch@2.4.1:distributed/fsdp/_runtime_utils.py:_unshard",
    )
    if not (trained and backward):
        return (parameters,)
    return (parameters, exact("unsharded_gradients", GRADIENT_COPIES * found.layer_bytes, formula="one layer, twice"))


def input_gradients(num_layers: int, stream_bytes: int) -> Term:
    """Return the gradients of the layers' inputs, which stay until the end of a backward through frozen layers.

    Formula: (layers - 2) x bsh: a hook on several gradients holds each recomputed layer's detached input, and with it
        its gradient and its checkpoint; the first layer's own gradient and the running one are counted elsewhere.
    Source: torch@2.4.1:distributed/fsdp/_runtime_utils.py:_register_post_backward_reshard_only_hook (inputs of units
        without trained parameters), torch/utils/checkpoint.py:CheckpointFunction.backward (detached inputs).
    Known error: none against published slopes over the batch size (docs/training.md).
    """
    size = max(0, num_layers - 2) * stream_bytes
    term = ranged("held_input_gradients", size, low=0, high=size + 2 * stream_bytes, formula=f"{num_layers} - 2 layers")
    return replace(term, certainty=Certainty.MODELLED)
