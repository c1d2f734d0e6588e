"""What torchtune does by itself, by version, and what its recipes' configurations set where a job says nothing."""

from __future__ import annotations

import re

from ullage.frozen import Frozen
from ullage.spec.training import TrainingJob

VERSIONS = ("0.1", "0.3", "0.6")
#: Releases and their dates (torchtune's tags), and the last commit.
RELEASES = {
    "0.1": "2024-04-15", "0.2": "2024-07-16", "0.3": "2024-09-17", "0.4": "2024-11-13", "0.5": "2024-12-20",
    "0.6": "2025-03-18", "bd2a0fc": "2026-04-23",
}  # fmt: skip
_DATE = re.compile(r"(?<!\d)20\d\d-\d\d")
#: Parameters from which recipes of one device recompute, and those of adapters on several.
RECOMPUTED_ALONE, RECOMPUTED_ADAPTERS = 2e9, 60e9


class Rules(Frozen):
    """How a version runs a step.

    Attributes:
        chunked_loss: the output in eight chunks; before, fp32 logits, copied to be shifted, held by the recipe.
            Source: torchtune@4fba6cd (2024-08-28); torchtune@0.1.0:recipes/lora_finetune_single_device.py.
        fused_adamw: configurations ask for it. Source: torchtune@cca50f0 (2024-09-14).
    """

    chunked_loss: bool = True
    fused_adamw: bool = True


def rules_of(version: str) -> Rules:
    """Return the rules of a version: a release, a commit or a date; the newest without one."""
    date = "newest"  # after every date
    for name, day in RELEASES.items():
        if re.search(rf"(?<![\d.]){re.escape(name)}(?!\d)", version):
            date = day
            break
    found = _DATE.search(version)
    date = found.group() if found else date
    return Rules(chunked_loss=date >= "2024-08-28", fused_adamw=date >= "2024-09-14")


def recomputes(job: TrainingJob, num_parameters: int) -> bool:
    """Whether the recipe's configuration recomputes, where the job does not say.

    Recipes of one device and of full training do from 2 billion parameters on; those of adapters on several devices
    from 70 billion on. Known error: some configurations do otherwise (Gemma, Mistral, Qwen2 0.5B and 1.5B).

    Source: torchtune@0.6.1:recipes/configs (enable_activation_checkpointing).
    """
    alone = job.machine.num_gpus == 1 or job.method == "full"
    return num_parameters >= (RECOMPUTED_ALONE if alone else RECOMPUTED_ADAPTERS)


def steps_in_backward(job: TrainingJob) -> bool:
    """Whether each parameter's optimizer steps as soon as its gradient is there: with paged optimizers on one device.

    Source: torchtune@0.6.1:recipes/configs/llama3_1/8B_full_single_device.yaml (optimizer_in_bwd: True), and all others
        with a paged optimizer; recipes/full_finetune_single_device.py refuses it with gradient accumulation.
    """
    return job.machine.num_gpus == 1 and job.optimizer.startswith("paged") and job.grad_accum == 1
