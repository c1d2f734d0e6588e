"""What a guard is told about the job."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.guard.plan import Value
from ullage.guard.store import PlanStore
from ullage.i18n import _


class Settings(Frozen):
    """The settings of :class:`ullage.guard.Guard`.

    Attributes:
        micro_batch: Samples of the first micro-batches; the guard goes below it when it must, never above.
        min_micro_batch: The smallest micro-batch that makes sense.
        store: Where the plan is kept between attempts; by default the one that ``ullage run`` named, if any.
        scaler: The ``torch.amp.GradScaler``.
        scheduler: Stepped after each optimizer step that was not skipped.
        max_grad_norm: Clip the norm of the gradients of the window.
        clip: Called instead of the usual clipping, after unscaling.
        backward: Called with the weighted loss instead of ``loss.backward()``.
        schedule: ``loss_fn`` is given the window as a list of (micro-batch, weight), and runs all forwards and
            backwards itself, as the schedule of a pipeline does; it returns the loss, detached.
        group: The ranks that must agree; all by default.
        loss_reduction: What ``loss_fn`` returns: ``mean`` over the counted items, or ``sum`` (divided by you).
        count: Weight of a micro-batch, such as its tokens; the number of its samples by default.
        normalize: ``local``: the mean over this rank's window, as a plain loop has it; ``global``: over all ranks.
        num_samples, split: How to measure and cut batches of an unusual form.
        shape: Size class of a batch; by default the elements of a sample, rounded up to a power of two.
        recompute: Called with True to switch activation checkpointing on; ``auto`` uses
            ``model.gradient_checkpointing_enable``; None: the job cannot.
        offload: Called with True to switch offload on; ``auto`` keeps saved activations in host memory.
        restart_plans: Knobs that only a restart can change, tried in turn after all else.
        before_restart: Called on every rank before an orderly restart, where the weights are whole: save them here.
        checkpoint: A :class:`ullage.guard.Checkpoint`, to restore after a failed optimizer step.
        rewind: Called with the restored position; without it, a failed optimizer step ends in a restart.
        job: A ``TrainingFit`` or ``TrainingJob``: refused at the start if it cannot fit.
        reserve: What must stay free of the device, as in ``ullage fit``.
        memory_fraction: Cap of the device's memory for PyTorch, which leaves the rest to NCCL and others.
        raise_after: Good windows before a larger micro-batch is tried again; 0: never.
        votes: ``auto`` or ``always``: whether FSDP votes before collectives whose order is known.
        on_event: Called with each sentence that the guard logs.
    """

    micro_batch: int
    min_micro_batch: int = 1
    store: PlanStore | None = None
    scaler: Any = None
    scheduler: Any = None
    max_grad_norm: float | None = None
    clip: Callable[[], Any] | None = None
    backward: Callable[[Any], None] | None = None
    schedule: bool = False
    group: Any = None
    loss_reduction: str = "mean"
    count: Callable[[Any], int] | None = None
    normalize: str = "local"
    num_samples: Callable[[Any], int] | None = None
    split: Callable[[Any, int, int], Any] | None = None
    shape: Callable[[Any], int] | None = None
    recompute: Callable[[bool], None] | str | None = None
    offload: Callable[[bool], None] | str | None = None
    restart_plans: tuple[Mapping[str, Value], ...] = ()
    before_restart: Callable[[], Any] | None = None
    checkpoint: Any = None
    rewind: Callable[[Any], None] | None = None
    job: Any = None
    reserve: str = "20%"
    memory_fraction: float | None = None
    raise_after: int = 200
    votes: str = "auto"
    on_event: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without torch."""
        for name, least in (("micro_batch", 1), ("min_micro_batch", 1), ("raise_after", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(_("{name} must be at least {least}").format(name=name, least=least))
        for name, allowed in (
            ("loss_reduction", ("mean", "sum")),
            ("normalize", ("local", "global")),
            ("votes", ("auto", "always")),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(_("{name} must be one of {allowed}").format(name=name, allowed=", ".join(allowed)))
        for name in ("recompute", "offload"):
            value = getattr(self, name)
            if value is not None and value != "auto" and not callable(value):
                raise InputError(_("{name} must be a function, 'auto' or None").format(name=name))
        if self.memory_fraction is not None and not 0 < self.memory_fraction <= 1:
            raise InputError(_("{name} must be above 0 and at most 1").format(name="memory_fraction"))
        if self.normalize == "global" and self.loss_reduction == "sum":
            raise InputError(_("a sum is not normalized: give loss_reduction='mean' with normalize='global'"))
