"""The running job: shrink instead of dying, agree between ranks, restart with a smaller plan.

Nothing here loads torch until a :class:`Guard` is built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ullage.guard.adapters.accelerate import guard_accelerate as guard_accelerate
    from ullage.guard.adapters.hf_trainer import guard_trainer as guard_trainer
    from ullage.guard.adapters.lightning import GuardCallback as GuardCallback
    from ullage.guard.batches import TokenBatches as TokenBatches
    from ullage.guard.checkpoint import Checkpoint as Checkpoint
    from ullage.guard.experts import ExpertWatch as ExpertWatch
    from ullage.guard.loop import Guard as Guard
    from ullage.guard.outcome import CannotFit as CannotFit
    from ullage.guard.outcome import RestartRequired as RestartRequired
    from ullage.guard.plan import Plan as Plan
    from ullage.guard.store import PlanStore as PlanStore

#: The job has saved a smaller plan and asks to be started again (EX_TEMPFAIL of sysexits.h).
RESTART_EXIT_CODE = 75
#: The smallest plan does not fit.
CANNOT_FIT_EXIT_CODE = 3

_PUBLIC = {
    "CannotFit": "ullage.guard.outcome",
    "Checkpoint": "ullage.guard.checkpoint",
    "ExpertWatch": "ullage.guard.experts",
    "Guard": "ullage.guard.loop",
    "GuardCallback": "ullage.guard.adapters.lightning",
    "RestartRequired": "ullage.guard.outcome",
    "TokenBatches": "ullage.guard.batches",
    "guard_accelerate": "ullage.guard.adapters.accelerate",
    "guard_trainer": "ullage.guard.adapters.hf_trainer",
    "Plan": "ullage.guard.plan",
    "PlanStore": "ullage.guard.store",
}
__all__ = ["CANNOT_FIT_EXIT_CODE", "RESTART_EXIT_CODE", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'ullage.guard' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value
