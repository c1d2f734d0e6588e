"""What a job does to balance its experts, and how full the fullest rank gets when it is less than perfect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ullage.account.routing import SIGMAS, SOURCE, Routing, load_quantile
from ullage.engines.training import TrainingStep
from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.spec.model import MoEFFN
from ullage.spec.training import TrainingJob
from ullage.units import cdiv

#: Engines that spread experts.
ENGINES = ("megatron", "torchtitan")
SHARES = (0.95, 0.99)


class Quantile(Frozen):
    """In ``share`` of all steps the fullest rank has no more than ``load`` of the balanced rows, and these bytes."""

    share: float
    load: float
    device_used_bytes: int


class RoutingFit(Frozen):
    """The fullest rank over uneven routing; ``balancing`` "" where the width was given."""

    balancing: str
    sigma: float
    source: str
    balanced_bytes: int
    quantiles: tuple[Quantile, ...]


def parse_routing(text: str, where: str = "--routing") -> float:
    """Return the width of the experts' popularity: ``bias``, ``auxiliary-loss``, or a number such as 0.5.

    Raises:
        InputError: neither.
    """
    name = text.strip().lower().replace("-", " ")
    if name in SIGMAS:
        return SIGMAS[name]
    try:
        sigma = float(text)
    except ValueError:
        sigma = -1.0
    if not 0 <= sigma <= 3:
        known = ", ".join(known.replace(" ", "-") for known in SIGMAS)
        raise InputError(
            _("{text!r} is no width of the experts' popularity").format(text=text[:40]),
            where=where,
            remedy=_("write {known}, or a number from 0 to 3").format(known=known),
        )
    return sigma


def uneven(answer: TrainingStep, job: TrainingJob, walk: Callable[[TrainingJob], TrainingStep]) -> RoutingFit | None:
    """Return how full the fullest rank gets; None where experts are not spread or rows are padded to a capacity.

    Args:
        answer: the balanced step.
        job: as asked for; walk: walks it.
    """
    mixture = _mixture(job)
    if mixture is None or job.parallel.expert_parallel_size == 1 or job.engine not in ENGINES:
        return None
    balancing, sigma = _balancing(job)
    routing = _routing(job, mixture, sigma)
    quantiles = []
    for share in SHARES:
        load = load_quantile(routing, share)
        quantiles.append(Quantile(share=share, load=load, device_used_bytes=_fullest(walk(_loaded(job, load)))))
    return RoutingFit(
        balancing=balancing,
        sigma=sigma,
        source=SOURCE if balancing else "",
        balanced_bytes=_fullest(answer),
        quantiles=tuple(quantiles),
    )


def _loaded(job: TrainingJob, load: float) -> TrainingJob:
    return replace(job, expert_load=load)


def _fullest(answer: TrainingStep) -> int:
    return max(rank.peak.device_used.bytes for rank in answer.ranks)


def _mixture(job: TrainingJob) -> MoEFFN | None:
    blocks = (block for layer in job.model.layers for block in layer.ffns)
    return next((block for block in blocks if isinstance(block, MoEFFN) and not block.hash_routed), None)


def _balancing(job: TrainingJob) -> tuple[str, float]:
    """Return the way of balancing and its width: as given, as Megatron's flags say, else as the model was trained.

    Source: Megatron-LM@d98e8a6:megatron/training/arguments.py (--moe-router-enable-expert-bias,
        --moe-router-force-load-balancing).
    """
    if job.routing_sigma is not None:
        return "", job.routing_sigma
    flags = dict(job.flags)
    if flags.get("moe-router-force-load-balancing", "").lower() in ("true", "1", "yes"):
        return "", 0.0
    mixture = _mixture(job)
    biased = flags.get("moe-router-enable-expert-bias", "").lower() in ("true", "1", "yes")
    name = "bias" if biased or (mixture is not None and mixture.correction_bias) else "auxiliary loss"
    return name, SIGMAS[name]


def _routing(job: TrainingJob, mixture: MoEFFN, sigma: float) -> Routing:
    """Return the mixture on its ranks: layers of a stage stand together, or one at a time where they are recomputed."""
    parallel = job.parallel
    layers = sum(any(isinstance(block, MoEFFN) for block in layer.ffns) for layer in job.model.layers)
    stage = cdiv(layers, parallel.pipeline_parallel_size)
    again = job.recompute.kind == "full" and job.recompute.num_layers is None and job.recompute.every == 1
    tokens = job.micro_batch_size * cdiv(job.seq_len, parallel.context_parallel_size)
    return Routing(
        sigma=sigma,
        num_experts=mixture.num_experts,
        num_ranks=parallel.expert_parallel_size,
        num_choices=tokens * mixture.top_k,
        num_kept=1 if again else stage,
        num_tried=stage if again else 1,
    )
