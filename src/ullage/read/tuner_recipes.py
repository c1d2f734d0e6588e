"""Recipe files of torchtune and litgpt by name: which reader, and the job that they make."""

from __future__ import annotations

from pathlib import Path

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.recipe_fields import Fields
from ullage.read.tuner_words import TunerWords, lay_over
from ullage.read.yamlfile import read_yaml
from ullage.spec.training import TrainingJob

TUNERS = ("torchtune", "litgpt")
#: Options of the command line that a recipe states itself.
STATED = (
    "engine", "dp", "tp", "pp", "cp", "ep", "sp", "zero", "fsdp", "micro_batch", "grad_accum", "precision", "optimizer",
    "optimizer_impl", "recompute", "loss", "lora", "method", "base_quantization", "offload", "compile",
)  # fmt: skip


def read_tuner(kind: str, rest: str, num_gpus: int) -> TunerWords:
    """Read a recipe for so many GPUs.

    Raises:
        InputError: not such a recipe, or one of a kind that is not followed.
    """
    path = Path(rest)
    fields = Fields(read_yaml(path), rest)
    if kind == "litgpt":
        from ullage.read.litgpt_recipe import litgpt_recipe

        return litgpt_recipe(fields, num_gpus)
    from ullage.read.torchtune_recipe import torchtune_recipe

    if num_gpus > 1 and "single_device" in path.name:
        raise InputError(
            _("a recipe of one device does not use {world} GPUs").format(world=num_gpus),
            where=rest,
            remedy=_("give one GPU with --on"),
        )
    return torchtune_recipe(fields)


def with_tuner(job: TrainingJob, words: TunerWords) -> TrainingJob:
    """Lay a recipe over a job."""
    return lay_over(job, words)
