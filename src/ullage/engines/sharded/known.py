"""What a framework's walk does not know is refused: a setting left out without a word would be a wrong answer."""

from __future__ import annotations

from ullage.errors import InputError
from ullage.i18n import _
from ullage.spec.training import TrainingJob


def check_recompute(job: TrainingJob, *kinds: str, every: bool = True) -> None:
    """Refuse a kind of recompute that the walk would leave out.

    Raises:
        InputError: the job's kind is none of ``kinds``, or it names layers in a way that the framework has not.
    """
    if job.recompute.num_layers is not None or (job.recompute.every != 1 and not every):
        raise InputError(
            _("{engine} does not choose the layers that it recomputes so").format(engine=job.engine),
            where="recompute",
            remedy=_("write {known}").format(known=", ".join(kinds)),
        )
    if job.recompute.kind not in kinds:
        raise InputError(
            _("{engine} does not recompute {kind}").format(engine=job.engine, kind=job.recompute.kind),
            where="recompute",
            remedy=_("write {known}").format(known=", ".join(kinds)),
        )


def check_formats(job: TrainingJob, *, mixed: bool) -> None:
    """Refuse number formats that the walk does not follow: activations are in 16 bits.

    Args:
        job: the job.
        mixed: parameters may be wider than activations (autocast, or an FSDP policy).

    Raises:
        InputError: fp32 activations, or wider parameters or a master copy where the framework has none.
    """
    precision = job.precision
    apart = not mixed and (precision.params != precision.compute or precision.master is not None)
    wide = precision.compute in ("float32", "float64")
    if wide or apart:
        raise InputError(
            _("ullage's rules of {engine} do not follow {formats}").format(
                engine=job.engine,
                formats=_("activations in fp32 or fp64") if wide else _("parameters wider than activations"),
            ),
            where="precision",
            remedy=_("write {known}").format(known="amp" if mixed else "bf16"),
        )
