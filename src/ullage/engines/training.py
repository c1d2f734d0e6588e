"""What every training engine answers, and what it answers with.

An engine room offers ``step(job) -> TrainingStep``: it fills in the defaults of the job's engine version, works out the
classes of equal ranks, and walks one optimizer step moment by moment. The peak of a rank is the largest of its moments;
the peak of the job is the largest of its ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module

from ullage.engines.follows import check_followed
from ullage.errors import InputError
from ullage.i18n import _
from ullage.ledger import Ledger
from ullage.spec.training import TrainingJob


@dataclass(frozen=True, kw_only=True)
class TrainingRank:
    """A class of equal ranks over one step.

    Attributes:
        rank: the first of them; num_ranks: how many they are.
        pp_rank: pipeline stage.
        moments: one ledger per moment of the step, in the order they happen (``forward``, ``loss``, ``backward``,
            ``gradient reduction``, ``optimizer step`` ...; ``ledger.moment`` names it, first step and steady state
            apart where they differ).
        after_step: between two steps: weights, gradients that stay, optimizer states, persistent buffers.
        host_bytes: host memory that offload needs per rank.
    """

    rank: int
    num_ranks: int
    pp_rank: int
    moments: tuple[Ledger, ...]
    after_step: Ledger
    host_bytes: int = 0

    @property
    def peak(self) -> Ledger:
        """The moment with the most on the device; where cached blocks hide the difference, with the most allocated."""
        return max(self.moments, key=lambda ledger: (ledger.device_used.bytes, ledger.allocated.bytes))


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """One optimizer step of a job.

    Attributes:
        job: the job with every default filled in; ``job.assumed`` says which.
        ranks: one per class of equal ranks, the fullest first.
    """

    job: TrainingJob
    ranks: tuple[TrainingRank, ...]
    warnings: tuple[str, ...] = ()


#: engine name -> module with ``step`` and ``VERSIONS``; imported only when asked for.
TRAINING_ENGINES = {
    "megatron": "ullage.engines.megatron",
    "hf_trainer": "ullage.engines.hf_trainer",
    "single": "ullage.engines.hf_trainer",
    "ddp": "ullage.engines.hf_trainer",
    "unsloth": "ullage.engines.unsloth",
    "fsdp1": "ullage.engines.fsdp",
    "fsdp2": "ullage.engines.fsdp",
    "torchtitan": "ullage.engines.torchtitan",
    "torchtune": "ullage.engines.torchtune",
    "litgpt": "ullage.engines.litgpt",
    "deepspeed": "ullage.engines.deepspeed",
}


def step(job: TrainingJob) -> TrainingStep:
    """Walk one step of the job under its engine's rules.

    Raises:
        InputError: the engine is not known or not built yet, or the layout is impossible.
    """
    job = _by_its_name(job)
    check_followed(job)
    module_name = TRAINING_ENGINES.get(job.engine)
    if module_name is not None and job.rlhf is not None and not job.rlhf.alone:
        module_name = "ullage.engines.rlhf"
    if module_name is None:
        raise InputError(
            _("unknown engine {engine!r}").format(engine=job.engine),
            remedy=_("known are {known}").format(known=", ".join(TRAINING_ENGINES)),
        )
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name:
            raise
        raise InputError(_("no rules are written for the engine {engine!r} yet").format(engine=job.engine)) from None
    walk: Callable[[TrainingJob], TrainingStep] = module.step
    if job.evaluation is None:
        return walk(_said(job))
    from ullage.engines.evaluation import with_evaluation

    answer = with_evaluation(walk(_said(replace(job, evaluation=None))), job.evaluation)
    return replace(answer, job=replace(answer.job, evaluation=job.evaluation))


def _by_its_name(job: TrainingJob) -> TrainingJob:
    """Return the job with the rules of Unsloth, where a version of whatever it patches names it."""
    return replace(job, engine="unsloth") if "unsloth" in job.engine_version.lower() else job


def _said(job: TrainingJob) -> TrainingJob:
    """Return the job with what the tables of recurrent layers take for granted, where it has such layers."""
    from ullage.account.activations.recurrent import RECURRENT

    sentence = _("recurrent layers run by flash-linear-attention, mamba-ssm and causal-conv1d")
    recurrent = any(isinstance(mixer, RECURRENT) for layer in job.model.layers for mixer in layer.mixers)
    if not recurrent or sentence in job.assumed or "recurrent_kernels" in dict(job.flags):
        return job
    return replace(job, assumed=(*job.assumed, sentence))
