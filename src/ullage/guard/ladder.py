"""Which plan comes after a failure: the same once more, a smaller micro-batch, recompute, offload, a restart, none.

No torch, no I/O: every rank computes the same answer from the same failures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ullage.frozen import Frozen
from ullage.guard.classify import Failure
from ullage.guard.plan import Plan, Value
from ullage.i18n import _

RETRY = "retry"
REDO = "redo"
RESTART = "restart"
CANNOT_FIT = "cannot_fit"
OFFLOADED = {"offload": True}
#: Knob that says how many restarts found the plan at its smallest.
FRESH = "fresh_restarts"


class Step(Frozen):
    """What to do next, and the plan to do it with."""

    action: str
    plan: Plan


class Ladder(Frozen):
    """The rungs that this job has.

    ``recompute`` and ``offload`` say whether the job can switch them on while it runs; ``restart_plans`` are knobs
    that only a restart can change, tried in turn; ``can_restart`` says whether there is a store for the plan.
    """

    min_micro_batch: int = 1
    recompute: bool = False
    offload: bool = False
    restart_plans: tuple[Mapping[str, Value], ...] = ()
    can_restart: bool = False

    def after(self, plan: Plan, failures: Sequence[Failure], *, retried: bool) -> Step:
        """Return the next step after an out-of-memory in forward or backward on some ranks."""
        own = [failure for failure in failures if failure.kind != "peer"]
        reason = describe(own)
        if any(failure.kind == "dead" for failure in own):
            return self._restart(plan, reason)
        if own and all(failure.transient for failure in own) and not retried:
            return Step(action=RETRY, plan=plan)
        largest = max((failure.micro_batch for failure in own), default=1)
        if largest > self.min_micro_batch:
            return Step(action=REDO, plan=self._halved(plan, own, largest, reason))
        return self._beyond(plan, reason)

    def after_optimizer(self, plan: Plan, failures: Sequence[Failure]) -> Step:
        """Return the next step after an out-of-memory in the optimizer: a smaller micro-batch would not help."""
        return self._beyond(plan, describe(failures), recompute=False)

    def _halved(self, plan: Plan, own: Sequence[Failure], largest: int, reason: str) -> Plan:
        smaller = max(self.min_micro_batch, largest // 2)
        shape = max(failure.shape for failure in own if failure.micro_batch == largest)
        words = _("{reason}: micro-batch {old} to {new}").format(reason=reason, old=largest, new=smaller)
        return plan.shrunk(words, **shape_knob(shape, smaller))

    def _beyond(self, plan: Plan, reason: str, *, recompute: bool = True) -> Step:
        if recompute and self.recompute and plan.get("recompute", "none") != "full":
            words = _("{reason}: full recompute").format(reason=reason)
            return Step(action=REDO, plan=plan.shrunk(words, recompute="full"))
        if self.offload and not plan.get("offload", False):
            words = _("{reason}: offload").format(reason=reason)
            return Step(action=REDO, plan=plan.shrunk(words, **OFFLOADED))
        return self._restart(plan, reason)

    def _restart(self, plan: Plan, reason: str) -> Step:
        if not self.can_restart:
            return Step(action=CANNOT_FIT, plan=plan)
        done = int(plan.get("restart_plan", 0))
        if done < len(self.restart_plans):
            words = _("{reason}: restart with the next plan").format(reason=reason)
            changes = {**dict(self.restart_plans[done]), "restart_plan": done + 1, FRESH: 0}
            return Step(action=RESTART, plan=plan.shrunk(words, **changes))
        if int(plan.get(FRESH, 0)) < 1:  # once with the same plan: a fresh process has no fragments
            words = _("{reason}: restart with fresh memory").format(reason=reason)
            return Step(action=RESTART, plan=plan.shrunk(words, **{FRESH: 1}))
        return Step(action=CANNOT_FIT, plan=plan)


def shape_knob(shape: int, micro_batch: int) -> dict[str, Value]:
    """Return the knob that remembers the micro-batch of a shape; shape 0 is the plain ``micro_batch``."""
    return {f"micro_batch@{shape}" if shape else "micro_batch": micro_batch}


def describe(failures: Sequence[Failure]) -> str:
    """Return the reason in a few words, the same on every rank."""
    if not failures:
        return _("out of memory")
    first = min(failures, key=lambda failure: failure.rank)
    ranks = ", ".join(str(failure.rank) for failure in sorted(failures, key=lambda failure: failure.rank)[:8])
    where = first.phase or _("step")
    if first.kind == "dead":
        return _("device lost on rank {ranks} in {where}").format(ranks=ranks, where=where)
    return _("out of memory on rank {ranks} in {where}").format(ranks=ranks, where=where)
