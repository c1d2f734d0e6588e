"""What the ledger says of a job that could not be made to fit: the same figures that ``ullage fit`` gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import join
from typing import TYPE_CHECKING

from ullage.errors import UllageError
from ullage.guard.plan import Plan
from ullage.guard.run.programs import engine_line, engine_of
from ullage.i18n import _
from ullage.units import format_bytes

if TYPE_CHECKING:
    from ullage.spec.training import TrainingJob


@dataclass(frozen=True, kw_only=True)
class Need:
    """The verdict of a fit; ``why_not`` says why there is none."""

    verdict: str = ""
    need_bytes: int = 0
    total_bytes: int = 0
    advice: tuple[tuple[str, str], ...] = ()
    why_not: str = ""

    def sentence(self) -> str:
        """Return what is needed, for people."""
        if not self.verdict:
            return _("what it needs is not known: {why}").format(why=self.why_not)
        words = _("needs {need} on the fullest GPU by the ledger, of {total}").format(
            need=format_bytes(self.need_bytes), total=format_bytes(self.total_bytes)
        )
        if self.verdict != "does_not_fit":
            words += _(" ({verdict}: the ledger and the run disagree; something else may hold the card)").format(
                verdict=self.verdict
            )
        return words


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known of the job besides its command line: a job file and the machine."""

    job_file: str = ""
    machine: str = ""


def need_of(words: Sequence[str], plan: Plan, known: Known) -> Need:
    """Return what the ledger says of a command with a plan."""
    try:
        if known.job_file:
            return _from_file(known, plan)
        engine = engine_of(words)
        machine = known.machine or this_machine()
        if not machine:
            return Need(why_not=_("no machine is named (--on 8xH100)"))
        if engine:
            return _serving(engine, words, machine)
        if any("pretrain" in word and word.endswith(".py") for word in words) and "--num-layers" in words:
            from ullage.read.machine import parse_machine
            from ullage.read.megatron_args import job_from_megatron_text

            return _training(job_from_megatron_text(join(words), machine=parse_machine(machine)), Plan())
    except (UllageError, OSError) as error:
        return Need(why_not=str(error))
    return Need(why_not=_("the job is not readable from its command line (--job FILE names a job file)"))


def _from_file(known: Known, plan: Plan) -> Need:
    from ullage.read.job_file import read_job_file
    from ullage.spec.serving import ServingJob

    job = read_job_file(Path(known.job_file), machine=known.machine or None)
    if not isinstance(job, ServingJob):
        return _training(job, plan)
    from ullage.fitting import fit_serving

    return _of_serving(fit_serving(job))


def _serving(engine: str, words: Sequence[str], machine: str) -> Need:
    from ullage.fitting import fit_serving
    from ullage.read.launch_line import read_launch_line

    return _of_serving(fit_serving(read_launch_line(f"{engine}:{join(engine_line(words))}", machine=machine)))


def _of_serving(result: object) -> Need:
    from ullage.fitting import FitResult

    assert isinstance(result, FitResult)
    return Need(
        verdict=result.verdict,
        need_bytes=int(result.need.value),
        total_bytes=int(result.total_bytes.value),
        advice=tuple((item.change, item.flags) for item in result.advice),
    )


def _training(job: TrainingJob, plan: Plan) -> Need:
    from ullage.spec.training import Recompute
    from ullage.training_fit import fit_training

    micro, passes = plan.get("micro_batch"), plan.get("grad_accum")
    if isinstance(micro, int) and isinstance(passes, int) and micro >= 1 and passes >= 1:
        job = replace(job, micro_batch_size=micro, grad_accum=passes)
    if plan.get("recompute") == "full":
        job = replace(job, recompute=Recompute(kind="full"))
    result = fit_training(job, advise=False)  # each piece of advice costs another walk: `ullage fit` gives them
    return Need(
        verdict=result.verdict,
        need_bytes=int(result.ledger.device_used.bytes),
        total_bytes=int(result.total_bytes.value),
    )


def this_machine() -> str:
    """Return this machine's GPUs as ``8xNVIDIA H100 80GB HBM3``, empty where NVML does not tell or they differ."""
    from ullage.guard.watch.devices import gpu_names

    names = gpu_names()
    return f"{len(names)}x{names[0]}" if names and len(set(names)) == 1 else ""
