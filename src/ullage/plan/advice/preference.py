"""What can be changed where a policy shares its card with a reference and a rollout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ullage.i18n import _
from ullage.plan.advice import costs
from ullage.plan.advice.change import Change
from ullage.spec.rlhf import REFERRED, Rlhf, Rollout
from ullage.spec.training import TrainingJob

#: The least share of a card that halving leaves to vLLM.
LEAST_FRACTION = 0.1


def changes_of_preference(job: TrainingJob) -> Iterator[Change]:
    """Yield what concerns the other models and generation; nothing for other jobs."""
    asked = job.rlhf
    if asked is None:
        return
    copied = asked.reference in (None, "copy") and job.lora is None
    if asked.kind in ("dpo", "kto") and asked.kind in REFERRED and copied and job.engine != "megatron":
        yield Change(
            key="reference",
            change=_("the reference's log-probabilities made before training"),
            cost=costs.PRECOMPUTED,
            flags=f"--rlhf {asked.kind},reference=precomputed",
            typed="precompute_ref_log_probs: true",
            apply=lambda job: replace(job, rlhf=replace(_of(job), reference="precomputed")),
        )
    rollout = asked.rollout
    if rollout is not None and rollout.engine == "vllm":
        yield from _pools(asked, rollout)


def _pools(asked: Rlhf, rollout: Rollout) -> Iterator[Change]:
    if not rollout.sleeps:
        yield Change(
            key="rollout",
            change=_("vLLM's pool given back while the policy is trained"),
            cost=costs.WAKING,
            flags=_words(asked, replace(rollout, sleeps=True)),
            typed="vllm_enable_sleep_mode: true",
            apply=lambda job: replace(job, rlhf=replace(_of(job), rollout=replace(rollout, sleeps=True))),
        )
    half = round(rollout.memory_fraction / 2, 3)
    if half >= LEAST_FRACTION:
        yield Change(
            key="rollout",
            change=_("{share:.0%} of the card for vLLM").format(share=half),
            cost=costs.FEWER_AT_ONCE,
            flags=_words(asked, replace(rollout, memory_fraction=half)),
            typed=f"vllm_gpu_memory_utilization: {half:g}",
            apply=lambda job: replace(job, rlhf=replace(_of(job), rollout=replace(rollout, memory_fraction=half))),
        )


def _words(asked: Rlhf, rollout: Rollout) -> str:
    """Return the option as it would be typed."""
    parts: list[str] = [asked.kind]
    parts += [f"reference={asked.reference}"] if asked.reference else []
    parts += [f"completion={asked.completion_len}"] if asked.completion_len else []
    parts += [f"steps={asked.steps_per_generation}"] if asked.steps_per_generation else []
    parts += [f"vllm={rollout.memory_fraction:g}"]
    parts += ["sleep"] if rollout.sleeps else []
    parts += ["offload"] if rollout.alone else []
    return "--rlhf " + ",".join(parts)


def _of(job: TrainingJob) -> Rlhf:
    assert job.rlhf is not None
    return job.rlhf
