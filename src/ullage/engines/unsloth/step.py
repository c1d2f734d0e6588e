"""One optimizer step under Unsloth, moment by moment."""

from __future__ import annotations

from dataclasses import replace

from ullage.account.activations.embedding import embedding_gradient_tables
from ullage.account.gradients import accumulation_bytes, clipping_bytes
from ullage.account.optimizer import temporaries
from ullage.engines.hf_trainer import adapted
from ullage.engines.hf_trainer.layers import Pass, worst_backward
from ullage.engines.hf_trainer.outside import outside, reserved_overhead
from ullage.engines.hf_trainer.step import ACTIVATION_ERROR
from ullage.engines.training import TrainingRank, TrainingStep
from ullage.engines.unsloth.layers import forward_pass
from ullage.engines.unsloth.loss import LossMemory, loss_memory
from ullage.engines.unsloth.rules import Rules, resolve
from ullage.engines.unsloth.states import States, states
from ullage.frozen import Frozen
from ullage.ledger import Ledger, Term, exact, ranged, total
from ullage.spec.training import TrainingJob
from ullage.units import MiB, dtype_bytes


class Walk(Frozen):
    """What every moment draws on; ``one_pass``: as it keeps from the second pass on."""

    job: TrainingJob
    rules: Rules
    states: States
    one_pass: Pass
    loss: LossMemory


def step(job: TrainingJob) -> TrainingStep:
    """Walk one step.

    Raises:
        InputError: what the rules do not cover.
    """
    filled, rules = resolve(job)
    held = states(filled, rules)
    passes = [forward_pass(filled, rules, steady=steady) for steady in (False, True)]
    loss = loss_memory(filled, rules, free_bytes=_free(filled, held, passes[0]))
    moments: list[Ledger] = []
    for one_pass, first in zip(passes, (True, False), strict=True):
        walk = Walk(job=filled, rules=rules, states=held, one_pass=one_pass, loss=loss)
        standing = () if first else (held.optimizer,)
        moments += (_ledger(walk, name, standing + terms) for name, terms in _moments(walk, first=first))
    after = _ledger(walk, "after step", (held.optimizer,))
    on_host = len(filled.model.layers) * passes[1].stream_bytes if rules.offloads else 0
    rank = TrainingRank(rank=0, num_ranks=1, pp_rank=0, moments=tuple(moments), after_step=after, host_bytes=on_host)
    return TrainingStep(job=filled, ranks=(rank,), warnings=filled.assumed)


def _free(job: TrainingJob, held: States, one_pass: Pass) -> tuple[int, int, int]:
    """Return what is free when the first loss is computed: expected, least and most.

    Formula: the device, less context, states and what the forward pass keeps, and the allocator's share on top; the
        optimizer has no states yet.
    Source: unsloth-zoo@ce232d6c:fused_losses/cross_entropy_loss.py:_get_chunk_multiplier (torch.cuda.mem_get_info).
    """
    standing = total("allocated", (*held.held, exact("kept", one_pass.kept_bytes + 2 * one_pass.head_input_bytes)))
    around, device = outside(job), job.machine.gpu.total_bytes
    overhead = reserved_overhead(replace(job, loss="chunked"), standing, shift_copies=False)
    expected = device - around.bytes - standing.bytes - overhead.bytes
    least = device - around.high_bytes - standing.high_bytes - overhead.high_bytes
    most = device - around.low_bytes - standing.low_bytes
    return max(MiB, expected), max(MiB, least), max(MiB, most)


def _moments(walk: Walk, *, first: bool) -> list[tuple[str, tuple[Term, ...]]]:
    found = [("loss", _loss(walk)), ("backward", _backward(walk))]
    lora = walk.job.lora
    if lora is not None and "embed_tokens" in lora.trained_modules:
        found.append(("embedding backward", _embedding_backward(walk)))
    if first:
        return [(f"first step: {name}", terms) for name, terms in found]
    return [*found, ("optimizer step", _optimizer_step(walk))]


def _kept_gradients(walk: Walk) -> Term:
    return walk.states.gradients if walk.job.grad_accum > 1 else exact("gradients", 0)


def _loss(walk: Walk) -> tuple[Term, ...]:
    """Return the moment of the loss: all layers have run; the final norm's input and output stand."""
    loss, one_pass = walk.loss, walk.one_pass
    return (
        _kept_gradients(walk),
        _grown(walk, _kept(walk, one_pass.kept_bytes)),
        _grown(walk, _near("final_norm_and_head_input", one_pass.frame_bytes + one_pass.head_input_bytes)),
        _grown(
            walk,
            ranged(
                "loss",
                loss.num_bytes,
                low=loss.low_bytes,
                high=loss.high_bytes,
                formula=loss.formula,
                source=loss.source,
            ),
        ),
    )


def _backward(walk: Walk) -> tuple[Term, ...]:
    """Return the moment of the worst layer's backward."""
    accumulates = walk.job.grad_accum > 1
    worst = worst_backward(walk.one_pass, grads_before=walk.loss.head_grad_bytes, all_grads=accumulates)
    kept = sum(one.kept_bytes for one in walk.one_pass.layers[: worst.layer + 1])
    work = walk.one_pass.layers[worst.layer].points[worst.point][0]
    again = accumulation_bytes(walk.states.trained, dtype="float32") if accumulates else 0
    if accumulates and walk.states.copies.tensors:
        again = accumulation_bytes(walk.states.copies, dtype=walk.states.copies_dtype)
    formula = f"layer {worst.layer}: recomputed tensors and gradients of activations"
    return (
        _kept_gradients(walk) if accumulates else exact("gradients", worst.grad_bytes),
        _grown(walk, _kept(walk, kept + min(0, work))),
        _grown(walk, _near("layer_backward", max(0, work), formula=formula)),
        exact("accumulation_temporary", again, formula="the new gradient of the largest tensor"),
    )


def _embedding_backward(walk: Walk) -> tuple[Term, ...]:
    """Return the end of the backward, where the embeddings are trained: their gradient and what makes it.

    Source: torch@2.13.0:aten/src/ATen/native/cuda/EmbeddingBackwardKernel.cu:embedding_backward_cuda_kernel.
    """
    model, tokens = walk.job.model, walk.job.micro_batch_size * walk.job.seq_len
    sorting = sum(embedding_gradient_tables(tokens, model.vocab_size, model.hidden_size))
    more = int(model.vocab_size * model.hidden_size * dtype_bytes(walk.states.copies_dtype))
    laid = walk.one_pass.stream_bytes + sorting + (more if walk.job.grad_accum > 1 else 0)
    return (walk.states.gradients, _grown(walk, exact("embedding_backward", laid, formula="sorted indices, fp32 rows")))


def _optimizer_step(walk: Walk) -> tuple[Term, ...]:
    """Return the optimizer step: all gradients, and the step's own copies where PyTorch runs it over all at once."""
    held, job = walk.states, walk.job
    groups = ((held.trained, "float32"), (held.copies, held.copies_dtype))
    impl = job.optimizer_impl or "foreach"
    extra = sum(temporaries(job.optimizer, one, impl=impl, params=dtype) for one, dtype in groups)
    low = extra if job.optimizer_impl else 0
    return (
        held.gradients,
        ranged("optimizer_temporaries", extra, low=low, high=extra, source="torch@2.13.0:torch/optim/adam.py"),
        exact("gradient_norms", clipping_bytes(held.trained), source="torch@2.13.0:torch/nn/utils/clip_grad.py"),
    )


def _grown(walk: Walk, term: Term) -> Term:
    """Return a term that grows with the length, with the range of a length that is only known not to be exceeded."""
    return adapted.shortened(term) if walk.rules.length_unknown else term


def _kept(walk: Walk, num_bytes: int) -> Term:
    """Return what the layers keep, or nothing, where checkpoints may be on the host."""
    found = _near("kept_activations", num_bytes)
    return replace(found, low_bytes=0) if walk.rules.place_unknown else found


def _near(name: str, num_bytes: int, *, formula: str = "") -> Term:
    """Return a term of activations with their error."""
    margin = round(num_bytes * ACTIVATION_ERROR)
    return ranged(name, num_bytes, low=num_bytes - margin, high=num_bytes + margin, formula=formula)


def _ledger(walk: Walk, moment: str, terms: tuple[Term, ...]) -> Ledger:
    tokens = walk.job.micro_batch_size * walk.job.seq_len * 3 * 8
    inputs = ranged("inputs_and_scalars", tokens, low=0, high=2 * tokens + 4 * clipping_bytes(walk.states.trained))
    allocated = total("allocated", [term for term in (*walk.states.held, *terms, inputs) if term.high_bytes])
    job = replace(walk.job, loss="fused" if walk.rules.loss == "in_place" else "chunked")
    return Ledger(
        rank=0,
        moment=moment,
        allocated=allocated,
        reserved_overhead=reserved_overhead(job, allocated, shift_copies=False),
        outside=outside(job),
    )
