"""Accelerate: ``guard_accelerate(accelerator, model, optimizer, micro_batch=8)`` after ``accelerator.prepare``."""

from __future__ import annotations

from typing import Any

from ullage.errors import InputError
from ullage.guard.loop import Guard
from ullage.i18n import _


def guard_accelerate(accelerator: Any, model: Any, optimizer: Any, **settings: Any) -> Guard:
    """Return a guard whose backward and clipping are the accelerator's (with its loss scaling).

    The guard accumulates by itself: give it the whole window of a step, and leave ``gradient_accumulation_steps`` at 1.
    """
    if accelerator.gradient_accumulation_steps != 1:
        raise InputError(
            _("gradient_accumulation_steps={steps} and the guard would both accumulate").format(
                steps=accelerator.gradient_accumulation_steps
            ),
            remedy=_("leave it at 1 and give guard.step_window the batches of a step"),
        )
    if str(getattr(accelerator.distributed_type, "value", "")) in ("DEEPSPEED", "MEGATRON_LM"):
        raise InputError(
            _("Accelerate with {name} runs its own windows").format(name=accelerator.distributed_type.value),
            remedy=_("use FSDP2 or DDP with the guard, or guard each restart with ullage run"),
        )
    norm = settings.pop("max_grad_norm", None)
    if norm is not None:
        settings["clip"] = lambda: accelerator.clip_grad_norm_(model.parameters(), norm)
    return Guard(model, optimizer, backward=accelerator.backward, **settings)
