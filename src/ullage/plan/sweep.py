"""The memory of many layouts of a training job at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ullage.errors import InputError
from ullage.fitting import DEFAULT_RESERVE, parse_reserve
from ullage.i18n import _
from ullage.plan.layouts import Layouts, Reason
from ullage.plan.megatron.walk import Walk
from ullage.spec.training import TrainingJob

#: Layouts that are weighed at a time: arrays stay in the processor's caches.
MAX_AT_ONCE = 500_000


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """What :func:`evaluate` answers; element i of every array is layout i.

    Attributes:
        reason: a :class:`~ullage.plan.layouts.Reason`; where it is not 0 the bytes are -1.
        allocated_peak_bytes, reserved_peak_bytes, device_used_bytes: of the fullest rank at its worst moment.
        pp_rank: the first pipeline stage where that is.
        fits: ``device_used_bytes`` and the reserve are no more than the device has. The range is the ledger's.
        terms: what ``allocated_peak_bytes`` is made of, by name.
    """

    reason: Any
    allocated_peak_bytes: Any
    reserved_peak_bytes: Any
    device_used_bytes: Any
    pp_rank: Any
    fits: Any
    terms: dict[str, Any] = field(default_factory=dict)

    @property
    def legal(self) -> Any:
        """Where a layout can be."""
        return self.reason == Reason.LEGAL


def evaluate(
    template: TrainingJob, layouts: Layouts, *, reserve: str = DEFAULT_RESERVE, terms: bool = False
) -> Evaluation:
    """Weigh layouts: the bytes are those of ``ullage.fit_train(layouts.job(template, i))``, to the byte.

    Args:
        template: model, machine, framework, precision and kernels; its layout and step are not looked at.
        layouts: from :func:`ullage.plan.layouts.layouts` or :func:`ullage.plan.layouts.grid`.
        reserve: memory to keep free, such as ``20%``.
        terms: return arrays of terms too.

    Raises:
        InputError: a framework whose layouts cannot be weighed at once.
        UnknownArchitectureError: a part of the model without a table.
    """
    if template.engine != "megatron":
        raise InputError(
            _("layouts are weighed under Megatron-LM's rules, not {engine}'s").format(engine=template.engine)
        )
    gpu = template.machine.gpu
    walk = Walk(template, layouts, terms=terms)
    limit = gpu.total_bytes - parse_reserve(reserve, gpu.total_bytes)
    return Evaluation(
        reason=walk.reason,
        allocated_peak_bytes=walk.allocated,
        reserved_peak_bytes=walk.reserved,
        device_used_bytes=walk.used,
        pp_rank=walk.pp_rank,
        fits=(walk.reason == 0) & (walk.used <= limit),
        terms=walk.terms,
    )
