"""The micro-batch that is safe for each shape: remembered in the plan, lowered at once, raised with care.

A shape is the number of elements of one sample, rounded up to a power of two. What is safe for a shape is safe for
every smaller one, so an unknown shape takes the smallest micro-batch known at or below it.
"""

from __future__ import annotations

from ullage.guard.ladder import shape_knob
from ullage.guard.plan import Plan
from ullage.i18n import _

PREFIX = "micro_batch@"
MAX_SHAPES = 64
#: A raise that failed doubles the wait before the next, up to this factor.
MAX_PATIENCE = 1024


def round_up(elements: int) -> int:
    """Return the next power of two."""
    return 1 << max(0, elements - 1).bit_length()


def known_shapes(plan: Plan) -> dict[int, int]:
    """Return the safe micro-batch of each shape in the plan."""
    return {
        int(name[len(PREFIX) :]): int(value)
        for name, value in plan.knobs
        if name.startswith(PREFIX) and name[len(PREFIX) :].isdecimal()
    }


def micro_batch_for(plan: Plan, shape: int, default: int) -> int:
    """Return the micro-batch for a shape: at most ``default`` and what is known of it and of smaller shapes."""
    general = min(default, int(plan.get("micro_batch", default)))
    return max(1, min([general, *(size for known, size in known_shapes(plan).items() if known <= shape)]))


def bounded(plan: Plan) -> Plan:
    """Return the plan with at most ``MAX_SHAPES`` shapes: the largest ones are folded into the one below them."""
    shapes = sorted(known_shapes(plan).items())
    if len(shapes) <= MAX_SHAPES:
        return plan
    kept = dict(plan.knobs)
    while len(shapes) > MAX_SHAPES:
        (shape, size), (below, least) = shapes.pop(), shapes.pop()
        shapes.append((below, min(size, least)))
        del kept[f"{PREFIX}{shape}"]
        kept[f"{PREFIX}{below}"] = min(size, least)
    return Plan(generation=plan.generation, knobs=tuple(kept.items()), reason=plan.reason, history=plan.history)


class Raiser:
    """When to try a larger micro-batch again: after enough good steps, more after each raise that failed."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.good: dict[int, int] = {}
        self.patience: dict[int, int] = {}
        self.raised: dict[int, int] = {}

    def succeeded(self, shape: int) -> bool:
        """Count a good step of a limited shape; True when it is time to raise."""
        if not self.after:
            return False
        self.good[shape] = self.good.get(shape, 0) + 1
        return self.good[shape] >= self.after * self.patience.get(shape, 1)

    def put_off(self, shape: int) -> None:
        """Begin to count anew: there was no head-room."""
        self.good[shape] = 0

    def failed(self, shape: int) -> None:
        """Count anew; wait longer when the failure undid a raise."""
        self.good[shape] = 0
        if self.raised.pop(shape, 0):
            self.patience[shape] = min(MAX_PATIENCE, 4 * self.patience.get(shape, 1))

    def raise_(self, plan: Plan, shape: int, current: int, limit: int) -> Plan:
        """Return the plan with the micro-batch of a shape doubled, at most ``limit``."""
        larger = min(limit, 2 * current)
        self.good[shape] = 0
        self.raised[shape] = larger
        words = _("{num} good steps: micro-batch {old} to {new}")
        return plan.changed(
            words.format(num=self.after * self.patience.get(shape, 1), old=current, new=larger),
            **shape_knob(shape, larger),
        )


def has_room(peak_bytes: int, base_bytes: int, limit_bytes: int, current: int, larger: int) -> bool:
    """True when a larger micro-batch is predicted to fit.

    Formula: base + (peak − base) × larger / current ≤ limit, with base what is held before the step (weights,
    optimizer states) and the rest taken to grow with the micro-batch.
    """
    return base_bytes + (peak_bytes - base_bytes) * larger <= current * limit_bytes if limit_bytes else True
