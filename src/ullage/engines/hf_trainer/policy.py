"""The loss of a policy that is compared, scored or ranked, in the place of next-token cross entropy."""

from __future__ import annotations

from ullage.account.activations.log_probs import log_probs_of
from ullage.account.activations.logits import LossPeak, loss_peak
from ullage.engines.hf_trainer.defaults import Recipe
from ullage.engines.hf_trainer.layers import micro_batch
from ullage.spec.training import TrainingJob


def loss_of(job: TrainingJob, recipe: Recipe) -> LossPeak:
    """Return the peak of a job's loss."""
    if job.rlhf is not None:
        return log_probs_of(job).loss
    return loss_peak(
        recipe.loss,
        num_tokens=micro_batch(job).num_tokens,
        vocab_size=job.model.vocab_size,
        hidden_size=job.model.hidden_size,
        compute_dtype=recipe.implementation.compute_dtype,
        head_trained=recipe.implementation.trained,
    )
