"""Hugging Face Trainer: ``guard_trainer(trainer, micro_batch=8)`` before ``trainer.train()``.

The Trainer hands over one batch at a time; they are held until the last of the accumulation window, and the window
then goes through the guard, each micro-batch by the Trainer's own ``training_step``. Clipping, scheduler, logging
and checkpoints stay the Trainer's. Mirrors: transformers@5.23.0:trainer.py:Trainer._run_epoch, training_step.
"""

from __future__ import annotations

from typing import Any

from ullage.errors import InputError
from ullage.guard.adapters.held import Held, settings_for
from ullage.guard.loop import Guard
from ullage.i18n import _

IGNORED = -100


def guard_trainer(trainer: Any, **settings: Any) -> TrainerGuard:
    """Guard a Trainer; the settings are those of :class:`ullage.guard.Guard`."""
    return TrainerGuard(trainer, settings)


class TrainerGuard:
    """Stands in for ``training_step`` and ``compute_loss`` of one Trainer."""

    def __init__(self, trainer: Any, settings: dict[str, Any]) -> None:
        _check(trainer)
        self.trainer = trainer
        self.guard: Guard | None = None
        settings.setdefault("count", self._count)
        settings.setdefault("micro_batch", trainer.args.per_device_train_batch_size)
        if settings.get("recompute") == "auto" and not hasattr(trainer.model, "gradient_checkpointing_enable"):
            raise InputError(_("this model has no gradient_checkpointing_enable"))
        self._settings = settings_for(settings)
        self._held: list[Held] = []
        self._share = 1.0
        self._training_step, self._compute_loss = trainer.training_step, trainer.compute_loss
        trainer.training_step, trainer.compute_loss = self.training_step, self.compute_loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Hold the batch; with the last one of the window, run the window. Return its loss, zero before that."""
        import torch

        if self.guard is None or self.guard.model is not model:
            self.guard = self._build(model)
        self._held.append(Held(batch=self.trainer._prepare_inputs(inputs), extra=num_items_in_batch))
        if not self.trainer.accelerator.sync_gradients:
            return torch.zeros((), device=self.trainer.args.device)
        window, self._held = self._held, []
        return self.guard.gradients(window, self._micro).to(self.trainer.args.device)

    def _micro(self, piece: Held) -> Any:
        """Run one micro-batch forward and backward as the Trainer does."""
        assert self.guard is not None
        self._share = 1.0 if self._is_sum(piece.extra) else piece.share
        try:
            return self._training_step(self.guard.model, dict(piece.batch), piece.extra)
        finally:
            self._share = 1.0

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        """Return the Trainer's loss, times the share of this piece in its batch."""
        found = self._compute_loss(model, inputs, *arguments, **options)
        if self._share == 1.0:
            return found
        return (found[0] * self._share, *found[1:]) if isinstance(found, tuple) else found * self._share

    def _is_sum(self, num_items_in_batch: Any) -> bool:
        """True where the loss is a sum over tokens divided by those of the window: then pieces just add up."""
        trainer = self.trainer
        if getattr(trainer, "loss_is_scaled_for_ga", None) is not None:
            return bool(trainer.loss_is_scaled_for_ga)
        accepts = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(accepts or getattr(trainer, "compute_loss_func", None) is not None)

    def _count(self, inputs: Any) -> int:
        """Return the labels that count in a mean over tokens; the samples where labels are one per sample."""
        from ullage.guard.split import num_samples

        labels = inputs.get("labels") if hasattr(inputs, "get") else None
        if labels is None or labels.ndim < 2 or labels.is_floating_point():
            return num_samples(inputs)
        name = type(self.trainer.accelerator.unwrap_model(self.trainer.model)).__name__
        shifted = name.endswith(("ForCausalLM", "LMHeadModel"))
        return int((labels[..., 1:] if shifted else labels).ne(IGNORED).sum())

    def _build(self, model: Any) -> Guard:
        optimizer = self.trainer.optimizer
        guard = Guard(model, optimizer, **self._settings)
        step = optimizer.step

        def guarded(*arguments: Any, **options: Any) -> None:
            guard.update(lambda: step(*arguments, **options))

        guarded._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # the scheduler counts inside of it
        optimizer.step = guarded
        return guard


def _check(trainer: Any) -> None:
    """Refuse a Trainer whose windows cannot be redone."""
    arguments = trainer.args
    if getattr(arguments, "auto_find_batch_size", False):
        raise InputError(
            _("auto_find_batch_size restarts the whole training with a smaller global batch"),
            remedy=_("leave it off: the guard keeps the global batch"),
        )
    if getattr(arguments, "n_gpu", 1) > 1:
        raise InputError(_("DataParallel in one process cannot be guarded"), remedy=_("start it with torchrun"))
    if getattr(trainer, "is_deepspeed_enabled", False):
        raise InputError(
            _("a DeepSpeed engine runs its own windows, reduces while it goes, and cannot redo them"),
            remedy=_("use FSDP2 or DDP with the guard, or guard each restart with ullage run"),
        )
