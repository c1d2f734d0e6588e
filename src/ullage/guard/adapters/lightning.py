"""Lightning: ``Trainer(callbacks=[GuardCallback(micro_batch=8)])``, for automatic optimization with one optimizer.

Batches are held until the last of ``accumulate_grad_batches``; the window then goes through the guard, each
micro-batch by Lightning's own ``training_step`` and ``backward`` hooks.
Mirrors: lightning@2.6:pytorch/loops/optimization/automatic.py:_AutomaticOptimization.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ullage.errors import InputError
from ullage.guard.adapters.held import Held, settings_for
from ullage.guard.loop import Guard
from ullage.i18n import _

try:
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.loops.optimization.automatic import ClosureResult
    from lightning.pytorch.trainer import call
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] == "lightning":
        raise InputError(
            _("this needs the package {package}").format(package="lightning"), remedy="pip install lightning"
        ) from error
    raise


class GuardCallback(Callback):
    """Guards the training of a Lightning module; the settings are those of :class:`ullage.guard.Guard`."""

    def __init__(self, **settings: Any) -> None:
        if "micro_batch" not in settings:
            raise InputError(_("{name} must be given").format(name="micro_batch"))
        self._settings = settings_for(settings)
        self.guard: Guard | None = None
        self.held: list[tuple[Held, int]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Stand in for the closures of this trainer."""
        if not pl_module.automatic_optimization:
            raise InputError(
                _("manual optimization steps where the guard cannot see it"),
                remedy=_("use ullage.guard.Guard inside training_step"),
            )
        if len(trainer.optimizers) != 1 or trainer.strategy.handles_gradient_accumulation:
            raise InputError(_("the guard needs one optimizer and a strategy that leaves accumulation to Lightning"))
        loop = trainer.fit_loop.epoch_loop.automatic_optimization
        self.guard = Guard(trainer.strategy.model, trainer.optimizers[0], **self._settings)
        step: Callable[..., None] = type(loop)._optimizer_step.__get__(loop)
        guard = self.guard
        loop._make_closure = lambda kwargs, optimizer, batch_idx: _Closure(self, trainer, kwargs, optimizer, batch_idx)
        loop._optimizer_step = lambda batch_idx, closure: guard.update(lambda: step(batch_idx, closure))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Give the loop its own closures back."""
        loop = trainer.fit_loop.epoch_loop.automatic_optimization
        for name in ("_make_closure", "_optimizer_step"):
            loop.__dict__.pop(name, None)


class _Closure:
    """What Lightning calls for one batch: holds it, or runs the window that it completes."""

    def __init__(self, owner: GuardCallback, trainer: Any, kwargs: Any, optimizer: Any, batch_idx: int) -> None:
        self.owner, self.trainer, self.kwargs = owner, trainer, kwargs
        self.optimizer, self.batch_idx = optimizer, batch_idx
        self._result = ClosureResult(closure_loss=None)

    def __call__(self, *_arguments: Any, **_options: Any) -> Any:
        """Hold the batch; with the last one of the window, run the window and return its loss."""
        import torch

        held = self.owner.held
        names = list(self.kwargs)
        held.append((Held(batch=self.kwargs[names[0]], extra=(names, dict(self.kwargs))), self.batch_idx))
        if self.trainer.fit_loop._should_accumulate():
            return None
        window, first = [each for each, _index in held], held[0][1]
        held.clear()
        loop = self.trainer.fit_loop.epoch_loop.automatic_optimization
        clear = loop._make_zero_grad_fn(first, self.optimizer)
        if clear is not None:
            clear()
        assert self.owner.guard is not None
        with torch.enable_grad():
            loss = self.owner.guard.gradients(window, self._micro)
        self._result = ClosureResult(closure_loss=loss)
        return self._result.loss

    def _micro(self, piece: Held) -> Any:
        """Run one micro-batch forward and backward by Lightning's own hooks."""
        names, kwargs = piece.extra
        loop = self.trainer.fit_loop.epoch_loop.automatic_optimization
        output = loop._training_step({**kwargs, names[0]: piece.batch})
        if output.closure_loss is None:
            raise InputError(_("training_step returned no loss"), remedy=_("return the loss of every batch"))
        loss = output.closure_loss * piece.share
        call._call_strategy_hook(self.trainer, "backward", loss, self.optimizer)
        return loss

    def consume_result(self) -> Any:
        """Return the loss for the progress bar and the loggers."""
        return self._result
