"""Evaluation between steps: a pass without gradients over a batch of its own size, with its logits.

The Trainer evaluates eight sequences at a time unless told otherwise, whatever the training batch; a loss that spares
the logits in training (Liger) makes all of them here. Both are why a job that trained for an hour dies at its first
evaluation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ullage.account.activations.decoder import Slice
from ullage.account.activations.inference import widest_layer
from ullage.account.activations.logits import LossRecipe, loss_peak
from ullage.account.kv_cache import bytes_per_token
from ullage.engines.fsdp.plan import rules_of
from ullage.engines.training import TrainingRank, TrainingStep
from ullage.ledger import Ledger, Term, ranged, total
from ullage.spec.training import Evaluation, TrainingJob
from ullage.units import dtype_bytes

if TYPE_CHECKING:
    from ullage.engines.hf_trainer.defaults import Recipe

#: Terms of a forward pass in training that stand in an evaluation too: whole weights of a sharded unit, and casts.
FORWARD_TERMS = ("unsharded_parameters", "all_gather_output", "all_gather_input", "autocast_casts")
_TRAINER = "transformers@5.23.0:trainer.py:Trainer.evaluation_loop"


def with_evaluation(answer: TrainingStep, asked: Evaluation) -> TrainingStep:
    """Return the step with the moment of an evaluation after it, on every rank.

    Source: transformers@5.23.0:trainer.py:Trainer._maybe_log_save_evaluate (after the optimizer step, gradients freed).
    """
    layer, logits = _layer(answer.job, asked), (_hidden(answer.job, asked), _logits(answer.job, asked))
    last = total("logits", logits).bytes >= layer.bytes
    terms = (*(logits if last else (layer,)), *_cache(answer.job, asked), *_gathered_logits(answer.job, asked))
    ranks = [_evaluated(rank, terms) for rank in answer.ranks]
    return replace(answer, ranks=tuple(sorted(ranks, key=lambda rank: -rank.peak.device_used.bytes)))


def _evaluated(rank: TrainingRank, terms: tuple[Term, ...]) -> TrainingRank:
    base = rank.after_step
    children = (*base.allocated.children, *_standing(rank), *terms)
    moment: Ledger = replace(base, moment="evaluation", allocated=total("allocated", children))
    return replace(rank, moments=(*rank.moments, moment))


def _standing(rank: TrainingRank) -> list[Term]:
    """Return what a forward pass has beside the states, from the moment of the step that has most of it."""
    found: dict[str, Term] = {}
    for ledger in rank.moments:
        for term in ledger.allocated.children:
            if term.name in FORWARD_TERMS and term.bytes > (found[term.name].bytes if term.name in found else 0):
                found[term.name] = term
    return list(found.values())


def _length(job: TrainingJob, asked: Evaluation) -> int:
    """Return the tokens of one sequence that one rank holds."""
    return -(-(asked.seq_len or job.seq_len) // job.parallel.context_parallel_size)


def _tokens(job: TrainingJob, asked: Evaluation) -> int:
    return asked.batch_size * _length(job, asked)


def _layer(job: TrainingJob, asked: Evaluation) -> Term:
    """Return what the widest layer takes."""
    slice_ = Slice(batch=asked.batch_size, seq_len=_length(job, asked))
    found = widest_layer(job.model, slice_, dtype=job.precision.compute, attention=job.attention)
    return ranged(
        "evaluation_layer",
        found.num_bytes,
        low=found.low_bytes,
        high=found.high_bytes,
        formula=f"{_tokens(job, asked):,} tokens through the widest layer, nothing kept",
    )


def _hidden(job: TrainingJob, asked: Evaluation) -> Term:
    """Return the last hidden states; the loss's moment has them, or their norm's input, once more."""
    size = int(_tokens(job, asked) * job.model.hidden_size * dtype_bytes(job.precision.compute))
    return ranged("evaluation_hidden", 2 * size, low=size, high=2 * size, formula="last hidden states, bsh twice")


def _logits(job: TrainingJob, asked: Evaluation) -> Term:
    """Return the logits and their copies in the loss.

    Formula: as the forward pass of a plain loss: 16-bit logits, fp32 copy, log-softmax; of earlier versions the shifted
        copy. Liger's loss spares the logits in training alone; one that spares them here too takes what it takes there.
    Source: liger-kernel@0.8.2:transformers/model/llama.py:lce_forward (skip_logits = self.training and labels ...);
        transformers@5.23.0:loss/loss_utils.py:ForCausalLMLoss; ml-cross-entropy@5f0c7a7:cut_cross_entropy/
        transformers/utils.py:PatchOptions.use_lce (train_only False).
    """
    found = loss_peak(
        LossRecipe(kind="liger") if asked.spares_logits else _loss(job),
        num_tokens=_tokens(job, asked),
        vocab_size=job.model.vocab_size,
        hidden_size=job.model.hidden_size,
        compute_dtype=job.precision.compute,
        head_trained=False,
    )
    size = found.forward_bytes
    return ranged(
        "evaluation_logits", size, low=round(0.95 * size), high=size, formula=found.formula, source=found.source
    )


def _loss(job: TrainingJob) -> LossRecipe:
    """Return the loss as the model computes it by itself, by the version of transformers."""
    found = _recipe(job)
    if found is not None:
        return replace(found.loss, compiled=False)
    earlier = rules_of(job.engine_version).upcast_logits
    return LossRecipe(kind="plain", upcast="head" if earlier else "loss", shift_copies=earlier)


def _recipe(job: TrainingJob) -> Recipe | None:
    """Return what the Trainer's own rules decide, with a plain loss; None under the rules of others."""
    if job.engine not in ("hf_trainer", "single", "ddp"):
        return None
    from ullage.engines.hf_trainer.defaults import resolve

    return resolve(replace(job, loss="plain"))[1]


def _cache(job: TrainingJob, asked: Evaluation) -> tuple[Term, ...]:
    """Return keys and values of the batch: before transformers 5 a model makes a cache unless it is told not to.

    Who recomputes layers was made to switch it off (trl, axolotl, LLaMA-Factory do); of others nobody knows.
    Source: transformers@5.23.0:training_args.py:TrainingArguments.use_cache (False), @4.57.0:models/llama/
        modeling_llama.py:LlamaModel.forward (config.use_cache, True).
    """
    found = _recipe(job)
    if found is not None and found.version >= (5, 0):
        return ()
    length = asked.seq_len or job.seq_len
    size = int(asked.batch_size * length * bytes_per_token(job.model, job.precision.compute))
    expected = 0 if found is None or job.recompute.kind != "none" else size
    return (ranged("evaluation_kv_cache", expected, low=0, high=size, formula="keys and values, use_cache"),)


def _gathered_logits(job: TrainingJob, asked: Evaluation) -> tuple[Term, ...]:
    """Return the logits of all batches, where a metric wants them: of every rank, joined batch by batch.

    Formula: batches x ranks x tokens x V x bytes, and as much again while the last batch is joined to the others; fp32
        under mixed precision.
    Source: transformers@5.23.0:trainer.py:Trainer.evaluation_loop (gather_function, all_preds.add, moved to the host
        every ``eval_accumulation_steps``); trainer_pt_utils.py:EvalLoopContainer.add (nested_concat);
        accelerate@1.10.0:utils/operations.py:convert_outputs_to_fp32.
    """
    if not asked.kept_batches:
        return ()
    ranks = job.parallel.data_parallel_size
    narrow = job.engine in ("single", "deepspeed")
    width = int(dtype_bytes(job.precision.compute)) if narrow else 4
    each = _tokens(job, asked) * ranks * job.model.vocab_size * width
    size = 2 * asked.kept_batches * each
    formula = f"2 x {asked.kept_batches} batches x {ranks} ranks x {_tokens(job, asked):,} tokens x V x {width}"
    return (ranged("kept_logits", size, low=size // 4, high=size, formula=formula, source=_TRAINER),)
