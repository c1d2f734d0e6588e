"""The loss of a job: cross entropy of next tokens, or of a policy that is compared, scored or ranked."""

from __future__ import annotations

from dataclasses import replace

from ullage.account.activations.log_probs import log_probs_of, tiled_peak
from ullage.account.activations.logits import LossPeak, loss_peak
from ullage.engines.hf_trainer.defaults import Recipe
from ullage.engines.hf_trainer.layers import micro_batch
from ullage.spec.training import TrainingJob


def loss_of(job: TrainingJob, recipe: Recipe) -> LossPeak:
    """Return the peak of a job's loss."""
    if job.rlhf is not None:
        return log_probs_of(job).loss
    if recipe.loss.kind == "tiled":
        return tiled_peak(job).loss
    return loss_peak(
        recipe.loss,
        num_tokens=micro_batch(job).num_tokens,
        vocab_size=job.model.vocab_size,
        hidden_size=job.model.hidden_size,
        compute_dtype=recipe.implementation.compute_dtype,
        head_trained=recipe.implementation.trained,
    )


def outside_graph(job: TrainingJob, recipe: Recipe) -> int:
    """Return what a loss outside a compiled model takes more: a loop of one's own may compute it there."""
    if not recipe.loss.compiled or job.engine != "single":
        return 0
    inside = loss_of(job, recipe)
    eager = loss_of(job, replace(recipe, loss=replace(recipe.loss, compiled=False)))
    return max(0, max(eager.forward_bytes, eager.backward_bytes) - max(inside.forward_bytes, inside.backward_bytes))
