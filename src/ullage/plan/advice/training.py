"""The catalogue for training: what can be changed in a step, cheap changes first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from ullage.account.adapters.names import rule_of
from ullage.errors import InputError
from ullage.i18n import _
from ullage.plan.advice import costs
from ullage.plan.advice.change import Change
from ullage.plan.advice.typed import typed
from ullage.spec.training import Lora, Recompute, TrainingJob

HUGGING_FACE = ("hf_trainer", "single", "ddp")
MIN_SEQ_LEN = 512
MOST_HALVINGS = 6
#: PyTorch's recipe for many adapters: rank 16 on every linear layer.
ADAPTERS = Lora(rank=16, targets=("all-linear",))


def changes_of_training(job: TrainingJob, num_active: int) -> Iterator[Change]:
    """Yield every change that applies to a training job."""
    from ullage.plan.advice.evaluation import changes_of_evaluation
    from ullage.plan.advice.layout import layouts, offloads
    from ullage.plan.advice.preference import changes_of_preference

    yield from _free(job)
    yield from changes_of_preference(job)
    yield from changes_of_evaluation(job)
    yield from _batches(job)
    yield from _recompute(job)
    yield from _optimizers(job)
    yield from layouts(job)
    yield from offloads(job, num_active)
    yield from _other_jobs(job)


def _free(job: TrainingJob) -> Iterator[Change]:
    """Yield what costs no time."""
    settings = _with_expandable(job)
    if settings is not None:
        yield Change(
            key="allocator",
            change=_("segments that grow, so that pieces join"),
            cost=costs.FREE,
            flags="",
            typed=f"PYTORCH_ALLOC_CONF={settings}",
            apply=lambda job: replace(job, alloc_conf=settings),
        )
    if job.attention in ("eager", "unfused"):
        yield Change(
            key="attention",
            change=_("flash attention instead of scores written out"),
            cost=costs.FLASH,
            flags="--attention flash",
            typed=typed(job, "attention"),
            apply=lambda job: replace(job, attention="flash"),
        )
    for kind in ("fused", "liger") if job.engine in HUGGING_FACE else ("chunked", "fused"):
        if job.loss in (None, "plain"):
            yield _loss(job, kind)
    yield from _kernels(job)


def _with_expandable(job: TrainingJob) -> str | None:
    """Return the allocator's settings with segments that grow; None where they do already, or may not.

    ``max_split_size_mb`` and the like go with them no more: PyTorch refuses the pair, and they are another choice.
    """
    if job.machine.gpu.vendor not in ("nvidia", "amd"):
        return None
    from ullage.allocator.settings import merge, parse_settings

    try:
        if parse_settings(job.alloc_conf).expandable_segments:
            return None
        return merge(job.alloc_conf, "expandable_segments:True")
    except InputError:
        return None


def _kernels(job: TrainingJob) -> Iterator[Change]:
    """Yield other kernels for the same sums."""
    if not job.compile and job.engine in ("torchtitan", "fsdp2", *HUGGING_FACE):
        yield Change(
            key="compile",
            change=_("torch.compile"),
            cost=costs.COMPILED,
            flags="--compile",
            typed=typed(job, "compile"),
            apply=lambda job: replace(job, compile=True),
        )
    if job.optimizer_impl in ("foreach", "for_loop"):
        yield Change(
            key="optimizer_impl",
            change=_("the fused optimizer, which needs no temporaries"),
            cost=costs.FREE,
            flags="--optimizer-impl fused",
            typed=typed(job, "optimizer_impl"),
            apply=lambda job: replace(job, optimizer_impl="fused"),
        )


def _loss(job: TrainingJob, kind: str) -> Change:
    names = {
        "liger": _("Liger's fused kernels, the loss among them"),
        "chunked": _("the loss in chunks"),
        "fused": _("fused loss"),
    }
    return Change(
        key="loss",
        change=names[kind],
        cost=costs.FUSED_LOSS,
        flags=f"--loss {kind}",
        typed=typed(job, f"loss.{kind}"),
        apply=lambda job: replace(job, loss=kind),
    )


def _batches(job: TrainingJob) -> Iterator[Change]:
    """Yield smaller micro-batches with the accumulation that keeps the global batch."""
    micro, times = job.micro_batch_size, 1
    for _halving in range(MOST_HALVINGS):
        if micro == 1:
            return
        smaller = max(1, micro // 2) if micro % 2 == 0 else 1
        times, micro = times * (micro // smaller), smaller
        passes = job.grad_accum * times
        yield Change(
            key="micro_batch",
            change=_("a micro-batch of {micro} with {passes} passes a step").format(micro=micro, passes=passes),
            cost=costs.smaller_batch(times),
            flags=f"--micro-batch {micro} --grad-accum {passes}",
            typed=typed(job, "micro_batch", micro=micro, passes=passes),
            apply=_batch(micro, times),
        )


def _batch(micro: int, times: int) -> Callable[[TrainingJob], TrainingJob]:
    return lambda job: replace(job, micro_batch_size=micro, grad_accum=job.grad_accum * times)


def _recompute(job: TrainingJob) -> Iterator[Change]:
    """Yield recompute in growing amounts."""
    if job.recompute.kind == "none":
        yield Change(
            key="recompute",
            change=_("selective recompute"),
            cost=costs.SELECTIVE,
            flags="--recompute selective",
            typed=typed(job, "recompute.selective"),
            apply=lambda job: replace(job, recompute=Recompute(kind="selective")),
        )
    if job.recompute.kind == "full" and job.recompute.every == 1 and job.recompute.num_layers is None:
        return
    if job.engine != "megatron" and job.recompute.every == 1:
        yield Change(
            key="recompute",
            change=_("recompute of every other layer"),
            cost=costs.HALF_RECOMPUTE,
            flags="--recompute every=2",
            typed=typed(job, "recompute.every"),
            apply=lambda job: replace(job, recompute=Recompute(kind="full", every=2)),
        )
    yield Change(
        key="recompute",
        change=_("full recompute"),
        cost=costs.FULL_RECOMPUTE,
        flags="--recompute full",
        typed=typed(job, "recompute.full"),
        apply=lambda job: replace(job, recompute=Recompute(kind="full")),
    )


def _optimizers(job: TrainingJob) -> Iterator[Change]:
    """Yield smaller optimizer states."""
    if job.optimizer in ("adamw", "adam", "paged_adamw") and job.engine != "megatron":
        yield Change(
            key="optimizer",
            change=_("8-bit moments"),
            cost=costs.EIGHT_BITS,
            flags="--optimizer adamw_8bit",
            typed=typed(job, "optimizer"),
            apply=lambda job: replace(job, optimizer="adamw_8bit"),
        )
    if job.engine == "megatron" and job.optimizer in ("adamw", "adam") and job.precision.moments == "float32":
        yield Change(
            key="optimizer",
            change=_("moments in BF16"),
            cost=costs.SHORT_MOMENTS,
            flags="",
            typed="--use-precision-aware-optimizer --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16",
            apply=_short_moments,
        )
    if _may_quantise(job) and job.engine in (*HUGGING_FACE, "unsloth", "litgpt"):
        yield Change(
            key="base_quantization",
            change=_("the frozen base in 4 bits"),
            cost=costs.QUANTISED_BASE,
            flags="--base-quantization nf4",
            typed=typed(job, "base_quantization"),
            apply=lambda job: replace(job, base_quantization="nf4", method=_quantised_method(job)),
        )


def _may_quantise(job: TrainingJob) -> bool:
    """Return whether a frozen base may be quantised: adapters on it do not read its weights."""
    lora = job.lora
    if lora is None or job.base_quantization is not None:
        return False
    return lora.kind == "lora" or not rule_of(lora.kind).reads_weight


def _quantised_method(job: TrainingJob) -> str:
    return job.method if job.lora is not None and job.lora.kind != "lora" else "qlora"


def _short_moments(job: TrainingJob) -> TrainingJob:
    switch = (("use-precision-aware-optimizer", "true"),)
    return replace(
        job, precision=replace(job.precision, moments="bfloat16"), flags=(*job.flags, *switch) if job.flags else ()
    )


def _other_jobs(job: TrainingJob) -> Iterator[Change]:
    """Yield what makes it another job: adapters, shorter samples."""
    if job.lora is None and job.method == "full" and job.engine in (*HUGGING_FACE, "fsdp2", "deepspeed"):
        yield Change(
            key="lora",
            change=_("train adapters of rank {rank} on every linear layer").format(rank=ADAPTERS.rank),
            cost=costs.ADAPTERS,
            flags=f"--lora r={ADAPTERS.rank}",
            typed=typed(job, "lora"),
            apply=lambda job: replace(job, lora=ADAPTERS, method="lora"),
        )
    if job.seq_len >= 2 * MIN_SEQ_LEN:
        half = job.seq_len // 2
        yield Change(
            key="seq_len",
            change=_("samples of {count:,} tokens").format(count=half),
            cost=costs.SHORTER,
            flags=f"--seq {half}",
            typed=typed(job, "seq_len", half=half),
            apply=lambda job: replace(job, seq_len=half),
        )
